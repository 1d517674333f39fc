"""Presets: each fills what it is given, with nothing left; texts end; a generation says what it cost."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import TEXT, Canvas
from mmdlm.sampling import Even, Fixed, LeftToRight, Unmask, denoise, presets, sample
from mmdlm.sampling.stop import Ended

TEXTS = {
    "llada": presets.llada(block=4),
    "llada at random": presets.llada(block=4, random=True, temperature=0.5),
    "fast_dllm": presets.fast_dllm(block=4),
    "fast_dllm by factor": presets.fast_dllm(block=4, threshold=None, factor=1.0),
    **{f"dream {name}": presets.dream(name) for name in ("origin", "maskgit_plus", "topk_margin", "entropy")},
    "dream with heat": presets.dream("entropy", temperature=0.5, top_p=0.9, choice_temperature=0.2),
    "klass": presets.klass(block=4),
    "entropy_bounded": presets.entropy_bounded(nats=0.5),
    "llada2": presets.llada2(block=4, edit=0.9),
    "remdm": presets.remdm(),
    "p2": presets.p2(),
    "wino": presets.wino(block=4),
    "diffusion_gemma": presets.diffusion_gemma((0, 6), nats=0.5),
}
IMAGES = {
    "maskgit": presets.maskgit(),
    "halton": presets.halton((3, 4)),
    "lumina": presets.lumina(),
    "mmada": presets.mmada(),
}
PAIRS = {
    "mmada_parallel": presets.mmada_parallel(image_steps=4),
    "unidisc": presets.unidisc(),
}


@pytest.mark.parametrize("policy", TEXTS.values(), ids=TEXTS.keys())
def test_texts_are_filled(kit, policy) -> None:
    canvas = kit.pair(12, 0, given=(1, 5))
    result = sample(kit.Fake(), canvas, policy=policy, steps=12, mask=kit.mask)
    check(kit, canvas, result.canvas)
    assert result.tokens == 10
    assert 1 <= result.forwards <= 12


@pytest.mark.parametrize("policy", IMAGES.values(), ids=IMAGES.keys())
def test_images_are_filled(kit, policy) -> None:
    canvas = kit.pair(0, 12, given=(3, 9))
    check(kit, canvas, sample(kit.Fake(), canvas, policy=policy, steps=6, mask=kit.mask).canvas)


@pytest.mark.parametrize("policy", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_are_filled(kit, policy) -> None:
    canvas = kit.pair(6, 12, given=(2, 11))
    check(kit, canvas, sample(kit.Fake(), canvas, policy=policy, steps=12, mask=kit.mask).canvas)


def check(kit, canvas: Canvas, filled: Canvas) -> None:
    given = ~canvas.masked
    assert not filled.masked.any()
    assert torch.equal(filled.tokens[given], canvas.tokens[given])
    assert not (filled.tokens[canvas.masked] == kit.mask).any()


def test_mmada_parallels_image_moves_at_its_own_steps(kit) -> None:
    policy = presets.mmada_parallel(image_steps=3)
    states = list(denoise(kit.Fake(), kit.pair(8, 9), policy=policy, steps=8, mask=kit.mask))
    text = states[0].canvas.modality == TEXT
    images = [int((state.canvas.masked & ~text).sum()) for state in states]
    assert images[2] == 9  # nothing in the first quarter
    assert len(set(images)) == 4
    assert [int((state.canvas.masked & text).sum()) for state in states] == list(range(8, -1, -1))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: presets.fast_dllm(block=4, threshold=0.9, factor=1.0), "a threshold or a factor"),
        (lambda: presets.fast_dllm_cache("triple", block=4), "there are prefix, dual"),
        (lambda: presets.dream("magic"), "there are origin, maskgit_plus"),
    ],
)
def test_what_there_is_not_is_named(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


class Ending:
    """Says word 1 until place `at` of each row's text, and the end there; what is behind, anything."""

    END = 5

    def __init__(self, kit, at: list[int]) -> None:
        self.kit, self.at = kit, torch.tensor(at)
        self.asked = 0

    def begin(self, canvas):
        return self

    def __call__(self, canvas, rows, *, reduce=None):
        parts = self.kit.Fake()(canvas, rows)
        for part in parts:
            row, place = part.rows.index // canvas.shape[1], part.rows.index % canvas.shape[1] - 1
            self.asked += len(place)
            part.logits[:] = -9.0
            part.logits[place < self.at[row], 1] = 9.0
            part.logits[place == self.at[row], self.END] = 9.0
        return parts


@pytest.mark.parametrize("order", [LeftToRight()], ids=str)
def test_nothing_stands_behind_the_end_of_a_text(kit, order) -> None:
    canvas = Canvas.concat([kit.pair(10, 0), kit.pair(10, 0), kit.pair(6, 0)])
    model = Ending(kit, [3, 9, 2])
    policy = Ended(Unmask(Fixed(1), order, temperature=0.0), Ending.END)
    states = list(denoise(model, canvas, policy=policy, steps=10, mask=kit.mask))
    tokens = states[-1].canvas.tokens
    assert tokens[0, 1:11].tolist() == [1] * 3 + [Ending.END] * 7
    assert tokens[1, 1:11].tolist() == [1] * 9 + [Ending.END]
    assert tokens[2, 1:7].tolist() == [1] * 2 + [Ending.END] * 4
    assert model.asked == 4 + 10 + 3
    assert [int(step) for step in states[-1].step] == [4, 10, 3]


def test_an_end_with_holes_before_it_ends_nothing(kit) -> None:
    canvas = kit.pair(4, 0, given=(3,))
    canvas = canvas.replace(tokens=torch.where(torch.arange(6) == 3, Ending.END, canvas.tokens))
    policy = Ended(Unmask(Even(), temperature=0.0), Ending.END)
    states = list(denoise(Ending(kit, [9]), canvas, policy=policy, steps=3, mask=kit.mask))
    assert states[1].canvas.masked.sum() == 2
    final = states[-1].canvas.tokens[0, 1:5].tolist()
    assert final[:3] == [1, 1, Ending.END]


def test_a_result_says_what_it_cost(kit) -> None:
    canvas = Canvas.concat([kit.pair(6, 0), kit.pair(3, 0)])
    policy = Unmask(Fixed(1), LeftToRight())
    result = sample(kit.Fake(), canvas, policy=policy, steps=6, mask=kit.mask, trajectory=True)
    assert (result.forwards, result.tokens, result.syncs) == (6, 9, 0)
    assert result.positions == (6 + 3) * canvas.shape[1]
    assert result.tokens_per_forward == pytest.approx(9 / 6 / 2)
    assert len(result.trajectory) == 7
    assert result.seconds > 0
    assert sample(kit.Fake(), canvas, policy=policy, steps=6, mask=kit.mask).trajectory == ()
