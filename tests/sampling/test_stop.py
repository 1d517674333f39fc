"""A row that is settled ends with what the model says of all the rest; others go on."""

from __future__ import annotations

import pytest
import torch

from mmdlm.canvas import Canvas, Part, Rows
from mmdlm.sampling import (
    Blocks,
    Fixed,
    LeftToRight,
    NegativeEntropy,
    Path,
    Policy,
    Random,
    Settled,
    Uniform,
    Unmask,
    denoise,
    presets,
)


class Says:
    """At call n, at every position of row r, `modes[r][n - 1]` (from then on the last), so surely."""

    def __init__(self, *modes: list[int], sure: float = 50.0) -> None:
        self.modes, self.sure, self.calls = modes, sure, 0

    def begin(self, canvas: Canvas):
        return self

    def __call__(self, canvas, rows: Rows, *, reduce=None) -> list[Part]:
        mode = torch.tensor([row[min(self.calls, len(row) - 1)] for row in self.modes])
        self.calls += 1
        logits = torch.zeros(rows.index.shape[0], 6)
        logits.scatter_(1, mode[rows.index // canvas.shape[1]].unsqueeze(1), self.sure)
        return [Part(rows, slice(0, 6), logits)]


def walk(kit, policy: Policy, model: Says, length: int = 8, steps: int = 8) -> tuple[list[list[int]], int]:
    """The tokens, and the steps of the longest row."""
    rows = len(model.modes)
    last = kit.last(denoise(model, kit.holes(rows, length), policy=policy, steps=steps, mask=kit.mask))
    assert not bool(last.canvas.masked.any())
    return last.canvas.tokens.tolist(), int(last.step.max())


one_a_step = Unmask(Fixed(1), LeftToRight(), rule=None)
all_asked = Unmask(Fixed(1), NegativeEntropy())


@pytest.mark.parametrize(("steps", "calls"), [(1, 4), (2, 5)])
def test_the_rest_is_what_was_said_again(kit, steps: int, calls: int) -> None:
    found, taken = walk(kit, Settled(all_asked, steps=steps), Says([1, 2, 3]))
    assert sorted(found[0]) == [1, 2] + [3] * 6
    assert taken == calls


def test_what_is_said_with_doubt_ends_nothing(kit) -> None:
    model = Says([4], sure=2.0)
    policy = Settled(all_asked)
    doubtful, taken = walk(kit, policy, model)
    assert taken == 8
    assert doubtful == walk(kit, all_asked, Says([4], sure=2.0))[0]
    assert walk(kit, Settled(all_asked, nats=2.0), Says([4], sure=2.0))[1] == 2


def test_every_row_ends_by_itself(kit) -> None:
    found, taken = walk(kit, Settled(all_asked), Says([5], [1, 2, 1, 2, 1, 2, 1, 2]))
    assert found[0] == [5] * 8
    assert sorted(found[1]) == [1] * 4 + [2] * 4
    assert taken == 8


def test_holes_that_are_not_asked_are_not_settled(kit) -> None:
    """An order without a look asks where it writes, and a plan of blocks its block: the others may differ."""
    assert walk(kit, Settled(one_a_step), Says([5]))[1] == 8
    in_blocks = Unmask(Fixed(1), NegativeEntropy(), plan=Path(blocks=Blocks(4)))
    assert walk(kit, Settled(in_blocks), Says([5]))[1] > 4


@pytest.mark.parametrize("steps", [1, 3])
def test_uniform_noise_settles(kit, steps: int) -> None:
    found, taken = walk(kit, presets.diffusion_gemma((0, 6), nats=1e-30, steps=steps), Says([2, 4]), steps=48)
    assert found == [[4] * 8]
    assert taken == 2 + steps


def test_uniform_noise_that_never_settles_is_the_policy_inside(kit) -> None:
    inside = Unmask(Fixed(1), Random(), revision=Uniform(text=(0, 6)))
    restless = [1, 2] * 4
    assert walk(kit, Settled(inside), Says(restless)) == walk(kit, inside, Says(restless))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"nats": 0.0}], ids=str)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match="steps >= 1 and nats > 0"):
        Settled(all_asked, **wrong)
