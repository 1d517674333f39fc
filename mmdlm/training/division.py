"""How one update is divided: over micro-batches, threads and processes, normalised as if it were one batch.

Knows no optimizer and no rhythm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Generic

import torch
from torch import Tensor, nn

from mmdlm.diffusion.loss import LossOutput
from mmdlm.training.cost import Meter
from mmdlm.training.metrics import Window
from mmdlm.training.parallel import Parallel
from mmdlm.training.ranks import Ranks
from mmdlm.training.run import BatchT, Divisible, Objective, Run, generator


class Division(Generic[BatchT]):
    """Forward and backward passes of a run's updates, as far as they are this process's."""

    def __init__(
        self,
        run: Run[BatchT],
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        parallel: Parallel,
    ) -> None:
        """`module` is what is trained, `run.module` or a copy; of it, `parameters` get gradients."""
        self.run, self.module, self.ranks, self.parallel = run, module, ranks, parallel
        self.device = next(run.module.parameters()).device
        self._parameters = list(parameters)
        self._mine = range(ranks.rank, run.accumulate, ranks.world)
        self._pool = None if run.threads == 1 else _pool(run.threads, self.device)
        self._meter = Meter(run.flops)

    def metered(self) -> AbstractContextManager[None]:
        """Inside, the operations of forward passes are counted, if the run says how."""
        return self._meter.reading(self.module)

    def backward(self, step: int, batches: Sequence[BatchT | None]) -> tuple[Tensor, Window]:
        """Adds the gradient of sum of weight * sum / count: sums of this process's batches, counts of all.

        `batches` are all of update `step` (0 is the first), None where another process works on it. Gives the
        part of the loss that is this process's, and the losses of its batches.
        """
        objectives = self._objectives(step, len(batches))
        mine = {index: batch for index in self._mine if (batch := batches[index]) is not None}
        totals = self._totals(step, objectives, mine)
        loss, window = torch.zeros((), device=self.device), Window()

        def share(index: int) -> tuple[LossOutput, Tensor]:
            return self._share(objectives[index], mine[index], (step, index), totals)

        def with_gradients(index: int) -> tuple[LossOutput, Tensor, tuple[Tensor | None, ...]]:
            losses, part = share(index)
            return losses, part.detach(), torch.autograd.grad(part, self._parameters, allow_unused=True)

        if self._pool is None:
            for index in mine:
                self.parallel.begin(self.module, last=index == max(mine))
                losses, part = share(index)
                part.backward()
                loss = loss + part.detach()
                window.add(losses)
        else:
            for losses, part, gradients in self._pool.map(with_gradients, mine):
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    _add_gradient(parameter, gradient)
                loss = loss + part
                window.add(losses)
        if (flops := self._meter.take()) is not None:
            window.add_flops(flops)
        return loss, window

    def _share(
        self,
        objective: Objective[BatchT],
        batch: BatchT,
        place: tuple[int, int],
        totals: dict[str, Tensor] | None,
    ) -> tuple[LossOutput, Tensor]:
        """What the micro-batch at `place` (step, its number) adds to the loss, with a graph."""
        run = self.run
        with run.precision.context(self.device):
            losses = objective(self.module, batch, generator(run.seed, *place))
        if unknown := run.weights.keys() - losses.sums.keys():
            raise ValueError(f"weights for {sorted(unknown)}, but the objective names {sorted(losses.sums)}")
        counts = losses.counts if totals is None else totals
        # a modality without a token has sum 0 and count 0: it adds 0
        shares = [run.weights.get(n, 1.0) * s / counts[n].clamp(min=1) for n, s in losses.sums.items()]
        return losses, torch.stack(shares).sum()

    def _objectives(self, step: int, count: int) -> list[Objective[BatchT]]:
        objective = self.run.objective
        if count == 1:
            return [objective]
        assert isinstance(objective, Divisible)
        return [objective.part(index, count, step) for index in range(count)]

    def _totals(
        self, step: int, objectives: list[Objective[BatchT]], batches: Mapping[int, BatchT]
    ) -> dict[str, Tensor] | None:
        """Counts over all micro-batches, known before the first forward; None where a step has only one.

        `batches` are this process's, by their number.
        """
        if len(objectives) == 1:
            return None
        totals: dict[str, Tensor] = {}
        for index, batch in batches.items():
            objective = objectives[index]
            assert isinstance(objective, Divisible)
            for name, count in objective.counts(batch, generator(self.run.seed, step, index)).items():
                totals[name] = totals[name] + count if name in totals else count
        return {name: total.to(self.device) for name, total in self.ranks.sum(totals).items()}


def _pool(threads: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads that share the cores out."""
    if device.type != "cpu":
        raise ValueError(f"threads={threads} are for a CPU, the module lies on {device}")
    cores = max(1, torch.get_num_threads() // threads)
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores,))


def _add_gradient(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:  # laid out like the parameter, as backward does: fused optimizers walk both side by side
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
