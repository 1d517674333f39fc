"""The training loop: divides, steps, averages, writes down, saves, stops. Names no model, noise or data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Generic

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdlm.io.atomic import atomic_write_json, recover
from mmdlm.io.config import describe
from mmdlm.io.lock import locked
from mmdlm.training.best import TOTAL, Lowest, save_best
from mmdlm.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    SaveError,
    module_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
)
from mmdlm.training.division import Division
from mmdlm.training.ema import Average
from mmdlm.training.finite import Watch
from mmdlm.training.metrics import Metrics, Value, Window
from mmdlm.training.parallel import DDP, show, shown
from mmdlm.training.ranks import join
from mmdlm.training.run import Assignable, BatchT, Moment, Named, Run, Validation
from mmdlm.training.saving import Saver
from mmdlm.training.signals import Stopped, caught_signals
from mmdlm.training.track import Audience
from mmdlm.training.validate import validate

_log = logging.getLogger(__name__)


class BatchError(ValueError):
    """The data of a run gave no batch; says of which step, why, and which checkpoint stands."""


class Trainer(Generic[BatchT]):
    """Carries out a `Run`; under `torchrun` together with other processes, each with a `Trainer` of its own.

    Raises ValueError for a run that they cannot share.
    """

    def __init__(self, run: Run[BatchT]) -> None:
        self.run = run
        self.step: int = 0  # updates done
        self.device = next(run.module.parameters()).device
        self.ranks = join()
        self.parallel = DDP() if run.parallel is None or self.ranks.world == 1 else run.parallel
        if run.accumulate % self.ranks.world:
            told = f"accumulate={run.accumulate} for {self.ranks.world} processes, wanted a multiple of them"
            raise ValueError(f"{told}: each step's micro-batches are shared out")
        self.module = self.parallel.wrap(run.module, self.ranks)  # is trained: run.module or a copy of it
        if self.module is not run.module and run.threads > 1:
            raise ValueError(f"threads={run.threads} cannot share a module that is sharded, wanted 1")
        self.optimizer = run.optimizer.build(self.module)
        self.average = None if run.ema is None else Average(run.ema, self.module)
        self.metrics = Metrics(run.folder / "metrics.jsonl")
        stop, best = run.early_stop, run.keep_best
        self._patience = None if stop is None else Lowest(stop.key, stop.min_delta)
        self._best = None if best is None else Lowest(best)
        self._audience = Audience(run.listeners)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.keep_checkpoints)
        self._saver = Saver(
            self.checkpoints,
            self.ranks,
            self.parallel,
            sharded=self.module is not run.module,
            background=run.save_in_background,
        )
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self._division = Division(run, self.module, self._parameters, self.ranks, self.parallel)
        self._window = Window()
        self._norm = torch.zeros((), device=self.device)
        self._watch = Watch()
        self._masks = _can_mask(self.optimizer, self.device)
        self._seconds = 0.0  # of all updates, also those of earlier processes
        self._recorded = 0.0  # of those, until the last record
        self._began = time.perf_counter()
        self._observed = True  # validation and hooks of the present step are done

    def fit(self) -> nn.Module:
        """Trains to `run.steps` or an early stop; returns the module, averaged and in evaluation mode.

        Takes up the newest whole checkpoint in the run's folder if there is one. On SIGTERM or SIGINT (main
        thread) it finishes the step, saves, and raises `Stopped`; a second signal kills at once. One that any
        process got stops all of them after the same step; only rank 0 writes, reports and calls hooks.

        An update whose loss or gradient is not finite is left out: weights, optimizer and average stay, the
        step counts, the metrics name its samples; three in a row raise FloatingPointError. InUseError where
        another process trains in the folder, SaveError where the disk takes no more, BatchError where the
        data end the run: each says which checkpoint stands.
        """
        with ExitStack() as held:
            self.ranks.first(lambda: self._open(held))
            held.callback(self._audience.close)
            caught = held.enter_context(caught_signals())  # also while the last checkpoint is being written
            held.callback(self._saver.close)
            held.enter_context(self._division.metered())
            return self._fit(caught)

    def _open(self, held: ExitStack) -> None:
        """Takes the folder for this run alone, and clears away what a killed process left there."""
        self.run.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(self.run.folder))
        with self._writing():
            for place in (self.run.folder, self.checkpoints.folder, self.run.folder / "best"):
                if place.is_dir():
                    recover(place)

    def _fit(self, caught: list[int]) -> nn.Module:
        run = self.run
        self._resume()
        self.ranks.first(self._write_run)
        self.module.train()
        quiet = not (run.progress and self.ranks.leads)
        bar = tqdm(total=run.steps, initial=self.step, disable=quiet, dynamic_ncols=True)
        with bar:
            stream = self._stream()
            if not self._observed:  # a signal came before what was due; saved, lest the next resume repeat it
                self._look(bar)
                self.save()
            signalled = self._signalled(caught)
            while not self._ended() and not signalled:
                self._began = time.perf_counter()
                self._update(*self._take(stream))
                bar.update()
                self._write_down(bar)
                self._tick()
                self._observed = False
                signalled = self._signalled(caught)
                if signalled:  # the resumed run does what is due
                    break
                lasts = self._watches()
                self._look(bar)
                if self._ended() or (run.checkpoint_every and self.step % run.checkpoint_every == 0):
                    self.save()
                    lasts = True
                if lasts:
                    signalled = self._signalled(caught)
            if signalled and self._saver.begun != self.step:
                self.save()
            self._saver.wait()
            signalled = signalled or self._signalled(caught)
        if signalled:
            _log.info("stopped by signal %d after step %d, saved", signalled, self.step)
            raise Stopped(128 + signalled)
        if self.average is not None:
            self.average.write()
        show(self.module, run.module, self.parallel)
        return run.module.eval()

    def _signalled(self, caught: list[int]) -> int:
        """A signal that some process got, 0 for none: the same at all of them."""
        return self.ranks.largest(caught[:1] or [0])[0]

    def _write_run(self) -> None:
        with self._writing():
            atomic_write_json(self.run.folder / "run.json", describe(self.run))

    def save(self) -> None:
        """Writes the checkpoint of the present step; FloatingPointError if the weights have gone bad."""
        self._check_finite()
        bad = not all(bool(self.parallel.part(value).isfinite().all()) for value in self._parameters)
        if self.ranks.largest([int(bad)])[0]:
            raise FloatingPointError(f"the weights are not finite after step {self.step}; {self._standing()}")
        tensors = {
            "module": module_tensors(self.module),
            "optimizer": optimizer_tensors(self.module, self.optimizer),
        }
        if self.average is not None:
            tensors["average"] = self.average.shadow
        state = {
            "step": self.step,
            "observed": self._observed,
            "seconds": self._seconds,
            "recorded": self._recorded,
            "window": self._window.over(self.ranks.every).state_dict(),
            "lowest": {name: lowest.state_dict() for name, lowest in self._lowest().items()},
            "watch": self._watch.state_dict(),
            "batches": self.run.batches.state_dict(),
        }
        self._saver.write(self.step, tensors, state)

    def _resume(self) -> None:
        def opened(newest: Checkpoint | None) -> None:
            with self._writing():
                self.metrics.truncate(0 if newest is None else newest.state["step"])
            if newest is not None:
                with self._writing():
                    self.checkpoints.prune()  # a save that was killed after its checkpoint stood

        loaded = self._saver.newest(opened)
        if loaded is None:
            self._divide()
            return
        state = loaded.state
        if ("average" in loaded.kinds) != (self.average is not None):
            place = self.checkpoints.folder
            raise CheckpointError(f"{place} and this run differ in whether weights are averaged")
        live, parameters = module_tensors(self.module), dict(self.module.named_parameters())
        restore_tensors(live, loaded.tensors("module", live.get), "module")
        restored = loaded.tensors("optimizer", lambda name: parameters.get(name.rpartition("|")[0]))
        restore_optimizer(self.module, self.optimizer, restored)
        if self.average is not None:
            shadow = self.average.shadow
            restore_tensors(shadow, loaded.tensors("average", shadow.get), "average")
        self.step = state["step"]
        self._observed = state["observed"]
        self._seconds, self._recorded = state["seconds"], state["recorded"]
        if self.ranks.leads:  # the others add to it
            self._window.load_state_dict(state["window"], self.device)
        for name, lowest in self._lowest().items():
            if name in state.get("lowest", {}):  # what an earlier version or another choice did not watch
                lowest.load_state_dict(state["lowest"][name])
        if "watch" in state:  # what an earlier version did not write
            self._watch.load_state_dict(state["watch"])
        self.run.batches.load_state_dict(state["batches"])
        self._divide()
        _log.info("resumed %s at step %d", self.run.folder, self.step)

    def _divide(self) -> None:
        """Makes the batches skip what other processes work on."""
        if self.ranks.world > 1 and isinstance(self.run.batches, Assignable):
            self.run.batches.assign(self.ranks.rank, self.ranks.world)

    def _update(self, batches: list[BatchT | None], samples: list[str]) -> None:
        run = self.run
        scale = run.learning_rate.scale(self.step, run.steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * scale
        loss, window = self._division.backward(self.step, batches)
        self.parallel.reduce(self._parameters, self.ranks)
        loss = self.ranks.sum({"loss": loss})["loss"]
        norm = nn.utils.clip_grad_norm_(self._parameters, math.inf if run.clip is None else run.clip)
        self._norm = self.parallel.whole(norm)
        broken = ~(torch.isfinite(loss) & torch.isfinite(self._norm))
        self._watch.add(self.step + 1, broken, samples)
        if self._masks:  # left out on the device, seen with the next record: no host sync here
            vars(self.optimizer)["found_inf"] = broken.float()
            self._move(window, unless=broken)
        elif not broken:  # a host sync where the device is no CPU and the optimizer cannot mask
            self._move(window)
        else:
            self._check_finite()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _move(self, window: Window, *, unless: Tensor | None = None) -> None:
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.step + 1, unless=unless)
        self._window.join(window, unless=unless)

    def _check_finite(self) -> None:
        """Records the updates that were left out since the last look; FloatingPointError after too many."""
        found = self._watch.look(self.ranks.every)
        for number, (step, samples) in enumerate(found, start=self._watch.skipped - len(found) + 1):
            self._record({"skipped": number, "samples": ", ".join(samples)}, step)
        self._watch.check(self._standing)

    def _standing(self) -> str:
        saved = self._saver.standing()
        return "there is no checkpoint" if saved is None else f"the checkpoint of step {saved} stands"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, what cannot be written is a SaveError."""
        try:
            yield
        except OSError as error:
            raise SaveError(f"{self.run.folder} cannot be written to: {error}; {self._standing()}") from error

    def _write_down(self, bar: tqdm) -> None:
        run = self.run
        if not self._due(run.log_every):
            return
        self._check_finite()
        window = self._window.over(self.ranks.every)
        losses, bounds, count = window.losses(), window.bounds(), window.count()
        self._tick()
        loss = sum(run.weights.get(name, 1.0) * value for name, value in losses.items())
        loss = loss if losses else math.nan  # all updates were left out
        record: dict[str, Value] = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
        record |= {f"bound/{name}": value for name, value in bounds.items()}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(self._norm)}
        lasted = max(self._seconds - self._recorded, 1e-9)
        pace = count / lasted
        record |= {"seconds": self._seconds, "tokens_per_second": pace}
        used = self._used(window, lasted)
        self._record({**record, **used})
        self._window.clear()
        self._recorded = self._seconds
        told = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
        figures = {**{name: f"{value:.4g}" for name, value in told.items()}, "tok/s": f"{pace:,.0f}"}
        if "utilisation" in used:
            figures["mfu"] = f"{used['utilisation']:.1%}"
        bar.set_postfix(figures)

    def _used(self, window: Window, seconds: float) -> dict[str, float]:
        """Operations a second of all processes together, and the share of what their devices could do."""
        flops, peak = window.flops(), self.run.peak_flops
        if flops is None:
            return {}
        found = {"flops_per_second": flops / seconds}
        return found if peak is None else found | {"utilisation": flops / seconds / peak / self.ranks.world}

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._began
        self._began = now

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self._ended()

    def _ended(self) -> bool:
        stop = self.run.early_stop
        tired = stop is not None and self._patience is not None and self._patience.misses >= stop.patience
        return self.step >= self.run.steps or tired

    def _lowest(self) -> dict[str, Lowest]:
        watched = {"early_stop": self._patience, "best": self._best}
        return {name: lowest for name, lowest in watched.items() if lowest is not None}

    def _look(self, bar: tqdm) -> None:
        """What is due beside the update, and at an early stop the record of the steps since the last one."""
        self._observe()
        if self._ended() and self._window.over(self.ranks.every).count():
            self._write_down(bar)

    def _watches(self) -> bool:
        """Whether validation or a hook is due at the present step."""
        rhythms = [every for every, _ in self.run.hooks]
        rhythms += [] if self.run.validation is None else [self.run.validation.every]
        return any(self._due(every) for every in rhythms)

    def _observe(self) -> None:
        """Validation and hooks that are due at the present step, on the averaged weights."""
        run = self.run
        if self._watches():
            self._check_finite()
            averaged = nullcontext() if self.average is None else self.average.swapped()
            with averaged, torch.no_grad():
                if run.validation is not None and self._due(run.validation.every):
                    record = self._validate(run.validation)
                    self._record(record)
                    self._judge(record)
                if any(self._due(every) for every, _ in run.hooks):
                    with self._shown():
                        self.ranks.first(self._call_hooks)
        self._observed = True

    def _validate(self, plan: Validation[BatchT]) -> dict[str, float]:
        run = self.run
        means = validate(
            self.module,
            run.objective if plan.objective is None else plan.objective,
            islice(plan.batches, plan.num_batches),
            precision=run.precision,
            seed=run.seed,
            ranks=self.ranks,
        )
        self.parallel.release(self.module)
        total = sum(run.weights.get(name, 1.0) * value for name, value in means.items())
        return {TOTAL: total, **{f"{TOTAL}/{name}": value for name, value in means.items()}}

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Inside, the run's module is whole at rank 0, and in evaluation mode."""
        run = self.run
        with shown(self.module, run.module, self.parallel, here=self.ranks.leads):
            run.module.eval()
            yield
            run.module.train()

    def _call_hooks(self) -> None:
        for call in (call for every, call in self.run.hooks if self._due(every)):  # all, at an early stop
            call(Moment(self.step, self.run.steps, self.run.module, self.run.folder, self._record))

    def _judge(self, record: Mapping[str, Value]) -> None:
        """Keeps the weights, those that were validated, if they are the best so far; counts the others."""
        if self._best is not None and self._best.take(self.step, record):
            best = self._best
            with self._shown():
                self.ranks.first(lambda: save_best(self.run.folder, self.run.module, best))
        if self._patience is not None:
            self._patience.take(self.step, record)
            if self._ended() and self.step < self.run.steps:
                _log.info("early stop at step %d, best was step %d", self.step, self._patience.step)

    def _record(self, values: Mapping[str, Value], step: int | None = None) -> None:
        step = self.step if step is None else step
        if not self.ranks.leads:
            return
        with self._writing():
            written = self.metrics.append(step, values)
        self._audience.hear(step, written)

    def _take(self, stream: Iterator[BatchT]) -> tuple[list[BatchT | None], list[str]]:
        """The micro-batches of the next update (None: another process's), and what they are made of."""
        source, batches, samples = self.run.batches, [], []
        for _ in range(self.run.accumulate):
            try:
                batches.append(next(stream))
            except (OSError, ValueError) as error:
                told = f"no batch for step {self.step + 1}: {error}; {self._standing()}"
                raise BatchError(told) from error
            samples += source.names() if isinstance(source, Named) else [f"all before {source.state_dict()}"]
        return batches, samples

    def _stream(self) -> Iterator[BatchT]:
        barren = 0
        while barren < 2:  # a source that was resumed at its end gives nothing once
            barren += 1
            for batch in self.run.batches:
                barren = 0
                yield batch
        raise ValueError("the run's batches gave none in a whole iteration, wanted at least one")


def _can_mask(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer can leave an update out on the device: fused ones can, if tensors are whole."""
    groups = optimizer.param_groups
    whole = all(type(value.data) is Tensor for group in groups for value in group["params"])
    return device.type != "cpu" and whole and all("fused" in group and group["fused"] for group in groups)
