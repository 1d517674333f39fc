"""What pipelines of diffusers are made of: our policies as schedulers, our models as theirs. Imports none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, PAD, TEXT, Canvas, Part, Predict, Rows
from mmdlm.model import Predictor, TransformerConfig
from mmdlm.sampling import Policy, State, resume


@dataclass(frozen=True)
class SchedulerConfig:
    """What pipelines read of a scheduler's configuration."""

    block_length: int
    mask_token_id: int


@dataclass(frozen=True)
class SchedulerOutput:
    """What pipelines read of a step: the fields of diffusers' `BlockRefinementSchedulerOutput`."""

    prev_sample: Tensor  # (B, n) or (B, H, W) long   the canvas after the step
    transfer_index: Tensor  # (B, n) bool   holes that were filled
    editing_transfer_index: Tensor  # (B, n) bool   tokens that were exchanged, or became holes again
    sampled_tokens: Tensor  # (B, n) long   as `prev_sample`: what is drawn and not written is not told
    sampled_probs: Tensor  # (B, n) float32   what the model gives to them, 0 at holes
    pred_logits: Tensor  # (B, n, V)   as they came


class PolicyScheduler:
    """One of our policies where a pipeline of diffusers 0.42 takes a scheduler.

    In `LLaDA2Pipeline` for `BlockRefinementScheduler`: each block is a canvas of its own, and
    `num_inference_steps` are the steps of one. In `AmusedPipeline` for `AmusedScheduler`: samples are (B, H,
    W), one picture a row, and timesteps count down. The policy alone decides: what a pipeline says of
    temperatures, truncation and thresholds is not read. The mask is never drawn. Every block, or picture, has
    a stream of its own, seeded from the pipeline's generator, or else from `seed`.

    Not for uniform noise (`DiffusionGemmaPipeline`), and not saved with a pipeline.
    """

    order = 1

    def __init__(self, policy: Policy, *, mask: int, block: int = 32, seed: int = 0) -> None:
        """`mask` and `block`: the id at holes and the length of a block, unless the pipeline says others."""
        self.policy = policy
        self.config = SchedulerConfig(block, mask)
        self.timesteps = torch.zeros(0, dtype=torch.long)
        self._seed, self._chance = seed, torch.Generator().manual_seed(seed)
        self._state: State | None = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: object = None,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """A generation begins. Raises ValueError for less than 1 step."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._chance, self._state = torch.Generator().manual_seed(self._seed), None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        temperature: object = None,
        top_p: object = None,
        top_k: object = None,
        sampling_method: object = None,
        threshold: object = None,
        editing_threshold: object = None,
        minimal_topk: object = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step of our loop on logits (B, n, V) or (B, V, H, W) and a sample (B, n) or (B, H, W).

        A block, or picture, begins where no step is taken yet. `prompt_mask` (n,) bool says what stays.
        Raises ValueError before `set_timesteps` and for a policy of uniform noise.
        """
        number = len(self.timesteps)
        if not number:
            raise ValueError("set_timesteps must come before the first step")
        picture = sample.ndim == 3
        logits = model_output.flatten(2).transpose(1, 2) if picture else model_output
        taken = number - 1 - int(timestep) if picture else int(timestep)
        mask = self.config.mask_token_id if mask_token_id is None else mask_token_id
        canvas = _sample_canvas(sample, mask, prompt_mask)
        state = self._state
        if state is None or taken == 0:
            state = State.start(canvas, steps=number, seeds=self._draw_seed(generator))
            state = self.policy.begin(replace(state, step=torch.full_like(state.step, taken)))
            if not torch.equal(state.canvas.tokens, canvas.tokens):
                raise ValueError(f"wanted a policy whose holes hold the mask, not noise; got {self.policy}")
        state = replace(state, canvas=canvas)
        walk = resume(_Answered(logits), state, policy=self.policy, mask=mask)
        next(walk)  # the state itself
        self._state = next(walk, state)
        output = _output(canvas, self._state.canvas, logits, sample.shape)
        return output if return_dict else tuple(vars(output).values())

    def check_eos_finished(
        self,
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """(B,) bool: the rows whose answer has ended, with no hole before its end."""
        answer = cur_x[:, prompt_length:]
        whole = (answer == mask_token_id).cumsum(dim=1) == 0
        return finished | (whole & (answer == eos_token_id)).any(dim=1)

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: object,
        editing_enabled: bool,
        editing_transfer_index: Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,
    ) -> bool:
        """Whether the policy is not done with some row that has not ended."""
        return self._state is not None and not bool((self._state.done | finished).all())

    def _draw_seed(self, generator: torch.Generator | None) -> int:
        chance = self._chance if generator is None else generator
        return int(torch.randint(1 << 62, (1,), generator=chance, device=chance.device))


class _Answered:
    """A denoiser that has answered already: logits (B, n, V) of all positions."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def begin(self, canvas: Canvas) -> Predict:
        return self

    def __call__(self, canvas: Canvas, rows: Rows, *, reduce=None) -> list:
        part = Part(rows, slice(0, self._logits.shape[2]), rows.gather(self._logits))
        return [part if reduce is None else reduce(part)]


def _sample_canvas(sample: Tensor, mask: int, prompt_mask: Tensor | None) -> Canvas:
    """A sample (B, n) of text, or (B, H, W) of a picture, as a canvas of one span; its masks are holes."""
    tokens, picture = sample.flatten(1), sample.ndim == 3
    zeros, masked = torch.zeros_like(tokens), tokens == mask
    place = torch.arange(tokens.shape[1], device=tokens.device)
    row, column = (place // sample.shape[2], place % sample.shape[2]) if picture else (place, place)
    fixed = torch.zeros_like(masked) if prompt_mask is None else prompt_mask.expand_as(masked)
    return Canvas(
        tokens=tokens,
        modality=torch.full_like(tokens, IMAGE if picture else TEXT, dtype=torch.uint8),
        fillable=~fixed,
        masked=masked,
        position=torch.stack([row, column], dim=1).expand(*tokens.shape, 2),
        segment=zeros,
        span=zeros,
    )


def _output(before: Canvas, after: Canvas, logits: Tensor, shape: torch.Size) -> SchedulerOutput:
    changed = (after.tokens != before.tokens) | (after.masked != before.masked)
    column = after.tokens.clamp(max=logits.shape[2] - 1).unsqueeze(2)  # the mask may have none
    chance = logits.float().softmax(dim=2).gather(2, column).squeeze(2)
    return SchedulerOutput(
        prev_sample=after.tokens.reshape(shape),
        transfer_index=changed & before.masked,
        editing_transfer_index=changed & ~before.masked,
        sampled_tokens=after.tokens,
        sampled_probs=chance.masked_fill(after.masked, 0.0),
        pred_logits=logits,
    )


@dataclass(frozen=True)
class ModelOutput:
    """What `LLaDA2Pipeline` reads of a model's answer."""

    logits: Tensor  # (B, L, V) float


class BlockCausalModel(nn.Module):
    """A predictor as `LLaDA2Pipeline` calls its model: block-causal in blocks from the start of the row.

    Like that pipeline it has no cache: every step computes all positions up to the end of the block. Our own
    loop does not need to: `canvas` is what it takes, with `Cached(predictor, Committed())`.
    """

    def __init__(self, predictor: Predictor, *, block: int = 32) -> None:
        """Raises ValueError for a block without positions."""
        super().__init__()
        if block < 1:
            raise ValueError(f"a block has at least 1 position, got {block}")
        self.predictor, self.block = predictor, block

    @property
    def config(self) -> TransformerConfig:
        return self.predictor.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def canvas(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Canvas:
        """Rows of text (B, L) long, in which masks are holes; `attention_mask` (B, L) is 0 at padding."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        inside = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        masked, outside = (input_ids == self.predictor.mask) & (inside > 0), torch.where(inside > 0, 0, -1)
        position = place if position_ids is None else position_ids
        return Canvas(
            tokens=input_ids,
            modality=torch.where(inside > 0, TEXT, PAD).to(torch.uint8),
            fillable=masked,
            masked=masked,
            position=position.unsqueeze(2).expand(*input_ids.shape, 2),
            segment=outside,
            span=outside,
            block=place // self.block,
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> ModelOutput:
        """Logits over the whole vocabulary: -inf at ids that may not stand in a text, 0 at padding."""
        canvas = self.canvas(input_ids, attention_mask, position_ids)
        logits = torch.zeros(*canvas.shape, self.config.vocab_size, device=canvas.device)
        for part in self.predictor(canvas, Rows.of(canvas.segment >= 0)):
            wide = part.logits.new_full((len(part.logits), logits.shape[2]), -torch.inf)
            wide[:, part.ids] = part.logits
            logits = part.rows.scatter(wide, logits)
        return ModelOutput(logits)
