"""A training step of ours against one as released programs take it, for `infer/benchmark.py training`."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Fill, Frame, Rows, Run, pack
from mmdlm.contests import Kit
from mmdlm.diffusion import Absorbing, Draw, ExactCount, Masking, Selection, Square
from mmdlm.model import Predictor, Sdpa, initialise, training_flops
from mmdlm.naive import full_vocabulary_losses

__all__ = ["SIDES", "Given", "Mix", "TrainingContest", "peak_memory"]

SIDES = ("ours", "llada", "mmada")  # the last two as their released programs train
BOOLEANS = Sdpa(packed=False)


@dataclass(frozen=True)
class Mix:
    """Pairs of lengths as they come: captions, and pictures of all shapes, each length as likely."""

    documents: int = 16  # of a step
    caption: tuple[int, int] = (8, 64)  # tokens
    side: tuple[int, int] = (8, 16)  # codes of a picture's height and width
    row: int = 2048  # positions of a packed row at most

    def draw(self, model: Predictor, rng: torch.Generator) -> list[Canvas]:
        """One step's documents, each with noise of its own: `masked`, and in `level` the weights of the loss.

        Levels are those of `Square` and `ExactCount`. The ids under masked positions are kept in `tokens`.
        """
        made = [self._pair(model, rng) for _ in range(self.documents)]
        padded = Canvas.concat(made)
        chosen = ExactCount().mask(Square().draw(padded, rng), rng)
        return [
            each.replace(masked=chosen.where[row : row + 1, : each.shape[1]])
            .replace(level=chosen.weight[row : row + 1, : each.shape[1]])
            for row, each in enumerate(made)
        ]  # fmt: skip

    def _pair(self, model: Predictor, rng: torch.Generator) -> Canvas:
        def any_of(bounds: tuple[int, int]) -> int:
            return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=rng))

        begin = model.text.stop - 1
        runs = (
            Run(length=any_of(self.caption), before=(begin,)),
            Run(grid=(any_of(self.side), any_of(self.side)), before=(begin,), after=(begin,)),
        )
        fills = []
        for run, legal in zip(runs, (model.text, model.image), strict=True):
            ids = torch.randint(legal.start, legal.stop, (1, run.size), generator=rng)
            fills.append(Fill(ids, open=torch.ones_like(ids, dtype=torch.bool)))
        return Frame(runs).canvas(fills, mask=model.mask)


@dataclass(frozen=True)
class Given:
    """An estimator that masks what it is told."""

    where: Tensor  # (B, L) bool
    weight: Tensor  # (B, L) float32

    def mask(self, draw: Draw, rng: torch.Generator) -> Selection:
        where = self.where & (draw.group >= 0)
        return Selection(where, self.weight * where, self.weight * where)


class TrainingContest:
    """The same steps by all `SIDES`, from the same weights: documents in, updated weights out.

    Ours packs, attends inside documents, and takes logits where the loss is, over the ids that may stand
    there; the others are `naive.full_vocabulary_losses` on a padded batch, with a mask of booleans, "mmada"
    with the softmax everywhere. A loss is the sum over the modalities of nats per token.
    """

    goal = (2.0, 3.0)  # times the tokens a second, and a part of the memory: what must be, what ought to be

    def __init__(self, shape: Mapping[str, int], mix: Mix, seed: int = 0) -> None:
        """`shape` is that of `Kit.make`; weights and documents come from `seed`."""
        kit = Kit.make(**shape, seed=seed)
        self.model, self.mix, self.rng = kit.model.train(), mix, kit.rng()
        initialise(self.model.network, kit.rng())  # the kit's sharp attention magnifies rounding
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def draw(self) -> list[Canvas]:
        """The documents of the next step."""
        return self.mix.draw(self.model, self.rng)

    def loss(self, side: str, documents: Sequence[Canvas], *, restricted: bool = False) -> Tensor:
        """The loss of a side, with a graph; see `naive.full_vocabulary_losses`."""
        network = self.model.network
        if side == "ours":
            batch = pack(documents, self.mix.row)
            assert batch.level is not None
            clean = batch.replace(masked=torch.zeros_like(batch.masked))
            objective = Masking(Absorbing(self.model.mask), Square(), Given(batch.masked, batch.level))
            return torch.stack(list(objective(self.model, clean, self.rng).per_token().values())).sum()
        batch = Canvas.concat(documents)
        dense, network.kernel = network.kernel, BOOLEANS
        try:
            return full_vocabulary_losses(
                self.model, batch, everywhere=side == "mmada", restricted=restricted
            )
        finally:
            network.kernel = dense

    def step(self, side: str, documents: Sequence[Canvas]) -> None:
        """One update of the weights by `side`."""
        self.loss(side, documents).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def difference(self, documents: Sequence[Canvas]) -> tuple[float, float]:
        """How far losses and gradients are from ours at most, in parts of theirs, the same softmax given."""
        losses, gradients = [], []
        for side in SIDES:
            loss = self.loss(side, documents, restricted=True)
            found = torch.autograd.grad(loss, list(self.model.parameters()))
            losses.append(loss.item())
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        ours, *others = gradients
        apart = max(float((ours - theirs).norm() / theirs.norm()) for theirs in others)
        return max(abs(losses[0] / loss - 1) for loss in losses[1:]), apart

    def flops(self, documents: Sequence[Canvas]) -> float:
        """Operations that a step needs, see `training_flops`."""
        batch = Canvas.concat(documents)
        return float(training_flops(self.model, batch, Rows.of(batch.masked)))


def peak_memory(build: Callable[[], TrainingContest], side: str, threads: int) -> int | None:
    """Bytes that a process holds at most in two steps of `side`, beyond those with the model built.

    So gradients and the optimizer's state count. Measured in a process of its own, as the kernel says
    (`VmHWM`); None where it does not say. `build` must be picklable.
    """
    if not _STATUS.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, build, side, threads).result()


_STATUS = Path("/proc/self/status")


def _measure(build: Callable[[], TrainingContest], side: str, threads: int) -> int:
    torch.set_num_threads(threads)
    contest = build()
    before = _held("VmRSS")
    for _ in range(2):
        contest.step(side, contest.draw())
    return _held("VmHWM") - before


def _held(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
