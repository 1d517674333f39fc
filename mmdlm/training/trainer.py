"""The training loop: divides, steps, averages, writes down, saves, stops. Names no model, noise or data."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import FrameType
from typing import Generic

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdlm.diffusion.loss import LossOutput
from mmdlm.io.atomic import atomic_write_json
from mmdlm.io.config import describe
from mmdlm.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    module_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
)
from mmdlm.training.ema import Average
from mmdlm.training.metrics import Metrics, Value, Window
from mmdlm.training.run import BatchT, Divisible, Moment, Objective, Run, generator
from mmdlm.training.validate import validate

_log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """A signal ended the run, a checkpoint stands; exit status 128 + number of the signal (TERM: 143)."""


class Trainer(Generic[BatchT]):
    """Carries out a `Run`."""

    def __init__(self, run: Run[BatchT]) -> None:
        self.run = run
        self.step = 0  # updates done
        self.device = next(run.module.parameters()).device
        self.optimizer = run.optimizer.build(run.module)
        self.average = None if run.ema is None else Average(run.ema, run.module)
        self.metrics = Metrics(run.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.keep_checkpoints)
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self._pool = None if run.threads == 1 else _pool(run.threads, self.device)
        self._window = Window()
        self._norm = torch.zeros((), device=self.device)
        self._bad = torch.full((), -1, device=self.device)  # number of the first update that was not finite
        self._seconds = 0.0  # of all updates, also those of earlier processes
        self._recorded = 0.0  # of those, until the last record
        self._began = time.perf_counter()
        self._observed = True  # validation and hooks of the present step are done
        self._saved: int | None = None  # step of the last checkpoint

    def fit(self) -> nn.Module:
        """Trains to `run.steps`; returns the module, then with averaged weights and in evaluation mode.

        Takes up the newest whole checkpoint in the run's folder if there is one. On SIGTERM or SIGINT (main
        thread) it finishes the step, saves, and raises `Stopped`; a second signal kills at once. Raises
        FloatingPointError at a loss or gradient that is not finite, naming the step.
        """
        run = self.run
        run.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        atomic_write_json(run.folder / "run.json", describe(run))
        run.module.train()
        bar = tqdm(total=run.steps, initial=self.step, disable=not run.progress, dynamic_ncols=True)
        with bar, _signals() as caught:
            stream = self._stream()
            if not self._observed:  # a signal came before what was due; saved, lest the next resume repeat it
                self._observe()
                self.save()
            while self.step < run.steps and not caught:
                self._began = time.perf_counter()
                self._update([next(stream) for _ in range(run.accumulate)])
                bar.update()
                self._write_down(bar)
                self._tick()
                self._observed = False
                if not caught:  # else the resumed run does it
                    self._observe()
                if self.step == run.steps or (run.checkpoint_every and self.step % run.checkpoint_every == 0):
                    self.save()
            if caught and self._saved != self.step:
                self.save()
        if caught:
            _log.info("stopped by signal %d after step %d, saved", caught[0], self.step)
            raise Stopped(128 + caught[0])
        if self.average is not None:
            self.average.write()
        return run.module.eval()

    def save(self) -> None:
        """Writes the checkpoint of the present step; FloatingPointError if the weights have gone bad."""
        self._check_finite()
        tensors = {
            "module": module_tensors(self.run.module),
            "optimizer": optimizer_tensors(self.run.module, self.optimizer),
        }
        if self.average is not None:
            tensors["average"] = self.average.shadow
        state = {
            "step": self.step,
            "observed": self._observed,
            "seconds": self._seconds,
            "recorded": self._recorded,
            "window": self._window.state_dict(),
            "batches": self.run.batches.state_dict(),
        }
        self.checkpoints.save(self.step, Checkpoint(tensors, state))
        self._saved = self.step

    def _resume(self) -> None:
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            self.metrics.truncate(0)
            return
        tensors, state = checkpoint.tensors, checkpoint.state
        if ("average" in tensors) != (self.average is not None):
            place = self.checkpoints.folder
            raise CheckpointError(f"{place} and this run differ in whether weights are averaged")
        restore_tensors(module_tensors(self.run.module), tensors["module"], "module")
        restore_optimizer(self.run.module, self.optimizer, tensors["optimizer"])
        if self.average is not None:
            restore_tensors(self.average.shadow, tensors["average"], "average")
        self.step = self._saved = state["step"]
        self._observed = state["observed"]
        self._seconds, self._recorded = state["seconds"], state["recorded"]
        self._window.load_state_dict(state["window"], self.device)
        self.run.batches.load_state_dict(state["batches"])
        self.metrics.truncate(self.step)
        _log.info("resumed %s at step %d", self.run.folder, self.step)

    def _update(self, batches: list[BatchT]) -> None:
        run = self.run
        scale = run.learning_rate.scale(self.step, run.steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * scale
        loss = self._backward(batches)
        self._norm = nn.utils.clip_grad_norm_(self._parameters, math.inf if run.clip is None else run.clip)
        broken = ~(torch.isfinite(loss) & torch.isfinite(self._norm))
        self._bad = torch.where((self._bad < 0) & broken, self.step + 1, self._bad)
        if self.device.type == "cpu":  # elsewhere with the next record: a look would be a host sync each step
            self._check_finite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def _backward(self, batches: list[BatchT]) -> Tensor:
        """Adds the gradient of sum of weight * sum / count, counted over all of `batches`; gives the loss."""
        objectives = self._objectives(len(batches))
        totals = self._totals(objectives, batches)
        loss = torch.zeros((), device=self.device)

        def share(index: int) -> tuple[LossOutput, Tensor]:
            return self._share(objectives[index], batches[index], index, totals)

        def with_gradients(index: int) -> tuple[LossOutput, Tensor, tuple[Tensor | None, ...]]:
            losses, part = share(index)
            return losses, part.detach(), torch.autograd.grad(part, self._parameters, allow_unused=True)

        if self._pool is None:
            for index in range(len(batches)):
                losses, part = share(index)
                part.backward()
                loss = loss + part.detach()
                self._window.add(losses)
        else:
            for losses, part, gradients in self._pool.map(with_gradients, range(len(batches))):
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    _add_gradient(parameter, gradient)
                loss = loss + part
                self._window.add(losses)
        return loss

    def _share(
        self, objective: Objective[BatchT], batch: BatchT, index: int, totals: dict[str, Tensor] | None
    ) -> tuple[LossOutput, Tensor]:
        """What micro-batch number `index` adds to the loss, with a graph."""
        run = self.run
        with run.precision.context(self.device):
            losses = objective(run.module, batch, generator(run.seed, self.step, index))
        if unknown := run.weights.keys() - losses.sums.keys():
            raise ValueError(f"weights for {sorted(unknown)}, but the objective names {sorted(losses.sums)}")
        counts = losses.counts if totals is None else totals
        # a modality without a token has sum 0 and count 0: it adds 0
        shares = [run.weights.get(n, 1.0) * s / counts[n].clamp(min=1) for n, s in losses.sums.items()]
        return losses, torch.stack(shares).sum()

    def _objectives(self, count: int) -> list[Objective[BatchT]]:
        objective = self.run.objective
        if count == 1:
            return [objective]
        assert isinstance(objective, Divisible)
        return [objective.part(index, count, self.step) for index in range(count)]

    def _totals(self, objectives: list[Objective[BatchT]], batches: list[BatchT]) -> dict[str, Tensor] | None:
        """Counts over all micro-batches, known before the first forward; None where a step has only one."""
        if len(batches) == 1:
            return None
        totals: dict[str, Tensor] = {}
        for index, (objective, batch) in enumerate(zip(objectives, batches, strict=True)):
            assert isinstance(objective, Divisible)
            for name, count in objective.counts(batch, generator(self.run.seed, self.step, index)).items():
                totals[name] = totals[name] + count if name in totals else count
        return {name: total.to(self.device) for name, total in totals.items()}

    def _check_finite(self) -> None:
        bad = int(self._bad)
        if bad >= 0:
            before = "none" if self._saved is None else f"that of step {self._saved}"
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {bad} (means since the last record: "
                f"{self._window.losses()}); the last checkpoint is {before}"
            )

    def _write_down(self, bar: tqdm) -> None:
        run = self.run
        if not self._due(run.log_every):
            return
        self._check_finite()
        losses, bounds, count = self._window.losses(), self._window.bounds(), self._window.count()
        self._tick()
        loss = sum(run.weights.get(name, 1.0) * value for name, value in losses.items())
        record: dict[str, Value] = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
        record |= {f"bound/{name}": value for name, value in bounds.items()}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(self._norm)}
        pace = count / max(self._seconds - self._recorded, 1e-9)
        self._record({**record, "seconds": self._seconds, "tokens_per_second": pace})
        self._window.clear()
        self._recorded = self._seconds
        bar.set_postfix({"loss": f"{loss:.4g}", **{name: f"{value:.4g}" for name, value in losses.items()}})

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._began
        self._began = now

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.run.steps

    def _observe(self) -> None:
        """Validation and hooks that are due at the present step, on the averaged weights."""
        run = self.run
        plan = run.validation if run.validation is not None and self._due(run.validation.every) else None
        hooks = [call for every, call in run.hooks if self._due(every)]
        if plan is not None or hooks:
            self._check_finite()
            averaged = nullcontext() if self.average is None else self.average.swapped()
            with averaged, torch.no_grad():
                run.module.eval()
                if plan is not None:
                    objective = run.objective if plan.objective is None else plan.objective
                    batches = islice(plan.batches, plan.num_batches)
                    means = validate(run.module, objective, batches, precision=run.precision, seed=run.seed)
                    self._record({f"validation/{name}": value for name, value in means.items()})
                for call in hooks:
                    call(Moment(self.step, run.steps, run.module, run.folder, self._record))
                run.module.train()
        self._observed = True

    def _record(self, values: Mapping[str, Value]) -> None:
        self.metrics.append(self.step, values)

    def _stream(self) -> Iterator[BatchT]:
        barren = 0
        while barren < 2:  # a source that was resumed at its end gives nothing once
            barren += 1
            for batch in self.run.batches:
                barren = 0
                yield batch
        raise ValueError("the run's batches gave none in a whole iteration, wanted at least one")


def _pool(threads: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads that share the cores out."""
    if device.type != "cpu":
        raise ValueError(f"threads={threads} are for a CPU, the module lies on {device}")
    cores = max(1, torch.get_num_threads() // threads)
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores,))


def _add_gradient(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The caught SIGTERM or SIGINT, in the main thread only; after the first one the next kills at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    watched = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        for each in watched:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in watched}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
