"""How a run's checkpoints are written and taken up by all of its processes. Knows no loop and no loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdlm.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, Unfinished, sha256
from mmdlm.training.parallel import Parallel
from mmdlm.training.pieces import Groups, read_pieces, write_pieces
from mmdlm.training.ranks import Ranks, portable

Home = Callable[[str], Tensor | None]  # the tensor of that name that a saved one is for


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that is taken up: its plain values, and its tensors when they are asked for."""

    state: Mapping[str, Any]
    kinds: Groups  # on the meta device
    _whole: Checkpoint | None  # at rank 0, which has read it
    _parts: Checkpoint | None  # at all ranks, if it lies in parts
    _ranks: Ranks
    _parallel: Parallel

    def tensors(self, group: str, home: Home) -> dict[str, Tensor]:
        """Those of a group, divided as their homes are; called by all ranks."""
        if self._parts is None:
            saved = self._whole.tensors[group] if self._whole else {}
            return self._ranks.spread(saved, lambda value, name: self._parallel.place(value, home(name)))
        assert self._parts.folder is not None
        found = {name: _like(kind, home(name)) for name, kind in self.kinds.get(group, {}).items()}
        if found:  # before the first update an optimizer holds nothing
            try:
                read_pieces(self._parts.folder, group, found, self._ranks)
            except OSError as error:
                told = f"the checkpoint {self._parts.folder} cannot be read: {error}"
                raise CheckpointError(told) from error
        return found


class Saver:
    """Writes checkpoints of all ranks' tensors, and reads the newest; called by all ranks in one order.

    Whole tensors are written by rank 0, those that are held in parts (`sharded`) by every rank its own, into
    a folder that all of them share. In the background a copy is written, on the CPU, while the run goes on:
    one at a time, and what goes wrong is raised at all ranks by the next `write` or `wait`.
    """

    def __init__(
        self, checkpoints: Checkpoints, ranks: Ranks, parallel: Parallel, *, sharded: bool, background: bool
    ) -> None:
        self.checkpoints = checkpoints
        self.begun: int | None = None  # step of the last checkpoint that was asked for, or read
        self._stands: int | None = None
        self._ranks, self._parallel, self._sharded = ranks, parallel, sharded
        self._background = background
        self._apart = ranks.apart() if background and sharded else ranks
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def write(self, step: int, tensors: Groups, state: Mapping[str, Any]) -> None:
        """Saves, or begins to when it is done in the background; SaveError where that one or this fails."""
        try:
            self.wait()
        except Exception:  # it is not to cost the present step as well
            self._write(step, tensors, state, self._ranks)
            self.begun = self._stands = step
            raise
        self.begun = step
        if not self._background:
            self._write(step, tensors, state, self._ranks)
            self._stands = step
        elif self._sharded or self._ranks.leads:
            taken = {name: {key: _copy(value) for key, value in tensors[name].items()} for name in tensors}
            plain = copy.deepcopy(dict(state))
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    1, "checkpoint", initializer=_enter, initargs=(_place(tensors),)
                )
            if self._sharded:
                self._running = self._pool.submit(self._write_pieces, step, taken, plain, self._apart)
            else:
                self._running = self._pool.submit(self._write_whole, step, taken, plain)

    def wait(self) -> None:
        """Returns when the last checkpoint stands; raises at all ranks what went wrong at any."""
        if not self._background or self.begun is None:
            return
        running, self._running = self._running, None
        fault = None if running is None else running.exception()
        if fault is not None and not isinstance(fault, Exception):
            raise fault
        for each in self._ranks.every(None if fault is None else portable(fault)):
            if each is not None:
                raise each
        self._stands = self.begun

    def standing(self) -> int | None:
        """The step of the newest checkpoint that stands; waits for this process's part of the last one."""
        if self._running is not None and self._running.exception() is None:
            self._stands = self.begun
        return max(self.checkpoints.steps(), default=None) if self._stands is None else self._stands

    def close(self) -> None:
        """Waits for the last checkpoint; what goes wrong, and was not raised, is a warning."""
        running, self._running = self._running, None
        pool, self._pool = self._pool, None
        try:
            if running is not None and (error := running.exception()) is not None:
                warnings.warn(f"the last checkpoint failed: {error}", stacklevel=2)
        finally:  # also after a Ctrl-C: whoever holds the folder must not let go of it before
            if pool is not None:
                pool.shutdown()

    def newest(self, opened: Callable[[Checkpoint | None], None]) -> Loaded | None:
        """The newest checkpoint that is whole, as rank 0 finds it and hands it to `opened`; None without."""
        found: list[Checkpoint] = []

        def read() -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Any], Checkpoint | None] | None:
            newest = self.checkpoints.newest()
            opened(newest)
            if newest is None:
                return None
            found.append(newest)
            kinds = {
                group: {name: value.to("meta") for name, value in named.items()}
                for group, named in newest.tensors.items()
            }
            return kinds, newest.state, None if newest.folder is None else newest

        told = self._ranks.first(read)
        if told is None:
            return None
        kinds, state, parts = told
        self.begun = self._stands = state["step"]
        whole = found[0] if found and parts is None else None
        return Loaded(state, kinds, whole, parts, self._ranks, self._parallel)

    def _write(self, step: int, tensors: Groups, state: Mapping[str, Any], ranks: Ranks) -> None:
        if self._sharded:
            self._write_pieces(step, tensors, state, ranks)
        else:
            ranks.first(lambda: self._write_whole(step, tensors, state))

    def _write_whole(self, step: int, tensors: Groups, state: Mapping[str, Any]) -> None:
        self.checkpoints.save(step, Checkpoint(tensors, state))

    def _write_pieces(self, step: int, tensors: Groups, state: Mapping[str, Any], ranks: Ranks) -> None:
        with ExitStack() as held:
            opened: list[Unfinished] = []

            def begin() -> Unfinished:
                opened.append(held.enter_context(self.checkpoints.writing(step, state)))
                return opened[0]

            folder = ranks.first(begin).folder
            digests, fault = {}, None
            try:
                names = write_pieces(folder, tensors, ranks)
                digests = {name: sha256(folder / name) for name in names}  # each rank its own, at once
            except OSError as error:
                fault = str(error)
            every = ranks.every((digests, fault))

            def finish() -> None:
                with held.pop_all():
                    for known, failed in every:
                        if failed is not None:
                            raise OSError(failed)
                        opened[0].digests.update(known)

            ranks.first(finish)


def _place(tensors: Groups) -> torch.device:
    """Where the first of them lies."""
    return next(value.device for named in tensors.values() for value in named.values())


def _enter(device: torch.device) -> None:
    """A thread begins on CUDA device 0, be it another process's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _like(kind: Tensor, home: Tensor | None) -> Tensor:
    """An empty tensor of that kind, divided as its home is, if that has its size."""
    if home is not None and home.shape == kind.shape:
        return torch.empty_like(home.detach(), dtype=kind.dtype)
    return torch.empty(kind.shape, dtype=kind.dtype)


def _copy(value: Tensor) -> Tensor:
    """A copy on the CPU that the next update does not change; of a `DTensor` what this rank holds."""
    return value.detach().to("cpu", copy=True)
