"""Pipelines of diffusers on our model, and with our policies, give the tokens of our own loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, Canvas, Rows
from mmdlm.interop import BlockCausalModel, PolicyScheduler, SchedulerPolicy, UniformSchedulerPolicy
from mmdlm.interop.diffusers_pipelines import ModelOutput
from mmdlm.sampling import (
    Blocks,
    Cached,
    Committed,
    Edited,
    Even,
    Fixed,
    Margin,
    Path,
    Peak,
    Unmask,
    presets,
    sample,
)
from tokenizers_mm import prepare_torchvision

prepare_torchvision()
from diffusers import (  # noqa: E402
    AmusedPipeline,
    BlockRefinementScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)

MASK, BLOCK = 15, 8
PROMPTS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4]])


@pytest.fixture(scope="module")
def causal(model) -> BlockCausalModel:
    return BlockCausalModel(model, block=BLOCK)


def theirs(causal: nn.Module, scheduler, prompt: Tensor, length: int, steps: int, **more) -> Tensor:
    """(B, length): what the pipeline generates, `steps` a block."""
    pipe = LLaDA2Pipeline(model=causal, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    given = {"gen_length": length, "block_length": BLOCK, "num_inference_steps": steps, "mask_token_id": MASK}
    given |= {"editing_threshold": None, "output_type": "seq"} | more
    return pipe(input_ids=prompt, **given).sequences


def question(causal: BlockCausalModel, prompt: Tensor, length: int) -> Canvas:
    """The canvas whose holes the pipeline fills."""
    holes = torch.full((len(prompt), length), MASK)
    return causal.canvas(torch.cat([prompt, holes], dim=1))


def ours(causal: BlockCausalModel, policy, canvas: Canvas, steps: int) -> tuple[Tensor, Tensor]:
    """What our loop generates, without a cache and with the exact one."""
    first = int(canvas.masked[0].long().argmax())
    steps *= -(-canvas.shape[1] // BLOCK) - first // BLOCK
    plain, cached = (
        sample(denoiser, canvas, policy=policy, steps=steps, mask=MASK)
        for denoiser in (causal.predictor, Cached(causal.predictor, Committed()))
    )
    assert cached.positions < plain.positions
    return plain.canvas.tokens[:, first:], cached.canvas.tokens[:, first:]


# Where a prompt or an answer ends inside of a block, its quota is a share of the whole block and ours one of
# the holes: the same only at one a step.
@pytest.mark.parametrize(("given", "length", "steps"), [(8, 24, 4), (8, 16, 2), (11, 21, 8), (3, 15, 8)])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_llada2_pipeline_gives_the_tokens_of_our_loop(causal, given, length, steps, threshold) -> None:
    prompt = PROMPTS[:, :given]
    expected = theirs(causal, BlockRefinementScheduler(), prompt, length, steps, threshold=threshold)
    policy = presets.llada2(block=BLOCK, threshold=threshold)
    for tokens in ours(causal, policy, question(causal, prompt, length), steps):
        assert torch.equal(tokens, expected)


def test_llada2_pipeline_edits_what_our_loop_edits(causal) -> None:
    """Without a threshold a block is full at its last step, and so not looked at again."""
    prompt, more = PROMPTS[:, :8], {"threshold": 2.0, "editing_threshold": 0.2}
    expected = theirs(causal, BlockRefinementScheduler(), prompt, 24, 4, **more)
    canvas = question(causal, prompt, 24)
    for tokens in ours(causal, presets.llada2(block=BLOCK, threshold=1.0, edit=0.2, after=0), canvas, 4):
        assert torch.equal(tokens, expected)
    assert not torch.equal(ours(causal, presets.llada2(block=BLOCK, threshold=1.0), canvas, 4)[0], expected)


@pytest.mark.parametrize("edit", [0.1, 0.3])
def test_llada2_pipeline_looks_again_at_full_blocks_as_our_loop_does(causal, edit: float) -> None:
    """One row: in a batch the pipeline looks at all as long as one changes. Our row has steps to spare."""
    prompt = PROMPTS[:1, :8]
    more = {"threshold": 0.3, "editing_threshold": edit, "max_post_steps": 16}
    expected = theirs(causal, BlockRefinementScheduler(), prompt, 24, BLOCK, **more)
    canvas, policy = (
        question(causal, prompt, 24),
        presets.llada2(block=BLOCK, threshold=0.3, edit=edit, after=0),
    )
    assert not torch.equal(ours(causal, policy, canvas, 40)[0], expected)
    policy = presets.llada2(block=BLOCK, threshold=0.3, edit=edit, after=17)  # their 16 counts from 0
    for tokens in ours(causal, policy, canvas, 40):
        assert torch.equal(tokens, expected)
    assert torch.equal(theirs(causal, PolicyScheduler(policy, mask=MASK), prompt, 24, 40), expected)


@pytest.mark.parametrize("given", [8, 11])
def test_its_scheduler_in_our_loop_gives_the_tokens_of_its_pipeline(causal, given: int) -> None:
    """A prompt that ends inside of a block, too: the scheduler sees the block as its pipeline shows it."""
    prompt, scheduler = PROMPTS[:, :given], BlockRefinementScheduler(threshold=0.4)
    expected = theirs(causal, scheduler, prompt, 32 - given, 4, threshold=0.4)
    canvas = question(causal, prompt, 32 - given)
    for tokens in ours(causal, SchedulerPolicy(scheduler, block=BLOCK), canvas, 4):
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("given", [8, 11])
@pytest.mark.parametrize(
    "policy",
    [
        presets.llada2(block=BLOCK, threshold=0.4),
        presets.llada2(block=BLOCK, threshold=0.4, edit=0.2, after=0),
        presets.fast_dllm(block=BLOCK, threshold=None, factor=1.0),
        Unmask(Even(), Margin(), plan=Path(blocks=Blocks(BLOCK)), temperature=0.0),
    ],
)
def test_our_policy_in_the_pipeline_gives_the_tokens_of_our_loop(causal, policy, given: int) -> None:
    prompt = PROMPTS[:, :given]
    expected = theirs(causal, PolicyScheduler(policy, mask=MASK), prompt, 32 - given, BLOCK)
    for tokens in ours(causal, policy, question(causal, prompt, 32 - given), BLOCK):
        assert torch.equal(tokens, expected)


def test_padding_on_the_left_is_not_seen(causal) -> None:
    prompt = torch.cat([torch.zeros(2, BLOCK, dtype=torch.long), PROMPTS[:, :8]], dim=1)
    inside = (torch.arange(16) >= BLOCK).long().expand(2, 16)
    scheduler = BlockRefinementScheduler()
    shown = [
        theirs(causal, scheduler, prompt + add, 16, 4, attention_mask=inside) for add in (0, 3 * (1 - inside))
    ]
    assert torch.equal(*shown)
    assert not torch.equal(shown[0], theirs(causal, scheduler, prompt, 16, 4))


def test_a_text_that_has_ended_is_noticed_however_it_was_filled(causal) -> None:
    """diffusers' own scheduler looks only at steps that write an end, and may miss one (0.42)."""
    prompt, policy = PROMPTS[:1, :8], presets.llada2(block=BLOCK, threshold=0.4)
    free = theirs(causal, BlockRefinementScheduler(), prompt, 24, BLOCK, threshold=0.4)
    ends = free[0, :BLOCK].unique().tolist()
    assert len(ends) > 1
    for end in ends:
        told = theirs(causal, PolicyScheduler(policy, mask=MASK), prompt, 24, BLOCK, eos_token_id=end)
        assert torch.equal(told[:, :BLOCK], free[:, :BLOCK])
        assert (told[:, BLOCK:] == MASK).all()


class Masked(nn.Module):
    """A model that would rather leave the mask wherever it stands."""

    def __init__(self, causal: BlockCausalModel) -> None:
        super().__init__()
        self.causal, self.device = causal, causal.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> ModelOutput:
        logits = self.causal(input_ids, attention_mask, position_ids).logits
        logits[..., MASK] = 9.0
        return ModelOutput(logits)


def test_the_mask_is_never_drawn(causal) -> None:
    """diffusers' own scheduler draws it where a model allows it, and may leave it behind (0.42)."""
    prompt, policy = PROMPTS[:, :8], presets.llada2(block=BLOCK)
    tokens = theirs(Masked(causal), PolicyScheduler(policy, mask=MASK), prompt, 16, 4)
    assert torch.equal(tokens, theirs(causal, PolicyScheduler(policy, mask=MASK), prompt, 16, 4))


def test_chance_comes_from_the_generator_or_from_the_seed(causal) -> None:
    policy = Unmask(Even(), temperature=1.0)

    def tokens(chance: int | None, seed: int = 0) -> Tensor:
        generator = None if chance is None else torch.Generator().manual_seed(chance)
        scheduler = PolicyScheduler(policy, mask=MASK, seed=seed)
        return theirs(causal, scheduler, PROMPTS[:, :8], 16, 4, generator=generator)

    assert torch.equal(tokens(1), tokens(1, seed=4))
    assert not torch.equal(tokens(1), tokens(2))
    assert torch.equal(tokens(None), tokens(None))
    assert not torch.equal(tokens(None), tokens(None, seed=4))


class Pictures(nn.Module):
    """Our model of pictures as `AmusedPipeline` calls its own: codes count from 0, and 11 is the mask."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.config = model, SimpleNamespace(sample_size=4)
        self.device = torch.device("cpu")

    def canvas(self, codes: Tensor) -> Canvas:
        flat, place = codes.flatten(1), torch.arange(16)
        masked, zeros = flat == 11, torch.zeros_like(flat)
        return Canvas(
            torch.where(masked, MASK, flat + 16),
            torch.full_like(flat, IMAGE, dtype=torch.uint8),
            masked,
            masked,
            torch.stack([place // 4, place % 4], dim=1).expand(len(flat), 16, 2),
            zeros,
            span=zeros,
        )

    def forward(self, codes: Tensor, **told) -> Tensor:
        canvas = self.canvas(codes)
        (part,) = self.model(canvas, Rows.of(canvas.segment >= 0))
        return part.logits.reshape(len(codes), 4, 4, -1).permute(0, 3, 1, 2)


def test_our_policy_in_the_picture_pipeline_draws_what_our_loop_draws(model) -> None:
    pictures, policy = Pictures(model), presets.maskgit()
    pipe = AmusedPipeline(None, None, None, pictures, PolicyScheduler(policy, mask=11))
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": torch.zeros(3, 1), "encoder_hidden_states": torch.zeros(3, 1, 1)}
    given |= {"guidance_scale": 0.0, "output_type": "latent", "num_inference_steps": 5}
    codes = pipe(**given, generator=torch.Generator().manual_seed(3)).images
    seed = int(torch.randint(1 << 62, (1,), generator=torch.Generator().manual_seed(3)))
    canvas = pictures.canvas(torch.full((3, 4, 4), 11))
    ours = sample(model, canvas, policy=policy, steps=5, seeds=seed, mask=MASK).canvas.tokens
    assert torch.equal(codes.flatten(1), ours - 16)
    assert len({tuple(row) for row in ours.tolist()}) == 3


def test_a_step_tells_what_became_of_each_position() -> None:
    """The hole of a prompt stays, the surer of the two others is filled, a token is edited, one stands."""
    policy = Unmask(Fixed(1), Peak(), temperature=0.0, revision=Edited(0.9))
    scheduler = PolicyScheduler(policy, mask=4)
    scheduler.set_timesteps(3)
    logits = torch.tensor([[[0, 9, 0, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 9], [9, 0, 0, 0]]]).float()
    given = {"prompt_mask": torch.arange(5) < 1}
    out = scheduler.step(logits, 0, torch.tensor([[4, 4, 4, 4, 4]]), **given)
    assert out.prev_sample.tolist() == [[4, 4, 4, 4, 0]]
    out = scheduler.step(logits, 1, torch.tensor([[4, 4, 4, 2, 0]]), **given)
    assert out.prev_sample.tolist() == [[4, 2, 4, 3, 0]]
    assert out.transfer_index.tolist() == [[False, True, False, False, False]]
    assert out.editing_transfer_index.tolist() == [[False, False, False, True, False]]
    chance = logits.softmax(dim=2)[0]
    expected = torch.tensor([[0.0, chance[1, 2], 0.0, chance[3, 3], chance[4, 0]]])
    torch.testing.assert_close(out.sampled_probs, expected)
    assert out.pred_logits is logits
    edited = out.editing_transfer_index

    def goes_on(ended: bool) -> bool:
        return scheduler.check_block_should_continue(2, True, False, edited, 0, 0, torch.tensor([ended]))

    assert [goes_on(False), goes_on(True)] == [True, False]
    prev_sample, *_ = scheduler.step(logits, 2, out.prev_sample, **given, return_dict=False)
    assert prev_sample.tolist() == [[4, 2, 1, 3, 0]]
    assert not goes_on(False)


def test_what_cannot_be_done_is_refused(model) -> None:
    scheduler = PolicyScheduler(Unmask(), mask=MASK)
    with pytest.raises(ValueError, match="set_timesteps must come before"):
        scheduler.step(torch.zeros(1, 4, 16), 0, torch.full((1, 4), MASK))
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        scheduler.set_timesteps(0)
    scheduler = PolicyScheduler(UniformSchedulerPolicy(EntropyBoundScheduler(), (0, 16)), mask=MASK)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="holes hold the mask, not noise"):
        scheduler.step(torch.zeros(1, 4, 16), 0, torch.full((1, 4), MASK))
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        BlockCausalModel(model, block=0)
