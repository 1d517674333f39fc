"""The processes of a run: how they meet, agree and hear of each other's errors. Knows no module.

`torchrun` starts the processes (ranks) and tells each by its environment which one it is.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # the others wait while rank 0 saves and calls hooks
_CPU = torch.device("cpu")


class Ranks:
    """The processes of a run, this one being number `rank` of `world`; alone, nothing is communicated.

    Every method is called by all ranks, in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        """`group` is that of these processes, None: all there are."""
        self.rank = rank
        self.world = world
        self.group = group

    def apart(self) -> Ranks:
        """The same ranks on lines of their own, on the CPU, so that a thread of each may talk meanwhile."""
        if self.world == 1:
            return self
        return Ranks(
            self.rank, self.world, cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        )

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes files, reports and calls hooks."""
        return self.rank == 0

    def largest(self, numbers: list[int]) -> list[int]:
        """The largest of all ranks' numbers, place by place."""
        if self.world == 1:
            return numbers
        found = torch.tensor(numbers, dtype=torch.long)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of one dtype and device, under the same names at all ranks, added up over the ranks."""
        if self.world == 1 or not values:
            return dict(values)
        names = sorted(values)
        total = torch.stack([values[name].detach() for name in names])
        dist.all_reduce(total, group=self.group)
        return dict(zip(names, total.unbind(), strict=True))

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns at rank 0, which alone calls it, at all ranks; what it raises likewise."""
        if self.world == 1:
            return action()
        box: list[tuple[T | None, Exception | None]] = [(None, None)]
        error: Exception | None = None
        if self.leads:
            try:
                box = [(action(), None)]
            except Exception as caught:
                error = caught
                box = [(None, portable(caught))]
        dist.broadcast_object_list(box, src=0, device=_CPU, group=self.group)
        value, told = box[0]
        if error is not None:
            raise error
        if told is not None:
            raise told
        return cast(T, value)

    def follow(self, step: Callable[[], T | None]) -> T | None:
        """What `step` returns here. Rank 0 takes it first, the others only where that did not give None."""
        own: list[T | None] = []

        def lead() -> bool:
            own.append(step())
            return own[0] is not None

        if not self.first(lead):
            return None
        return own[0] if self.leads else step()

    def every(self, value: T) -> list[T]:
        """The values of all ranks, in their order; plain values."""
        if self.world == 1:
            return [value]
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return cast(list[T], found)

    def spread(
        self, saved: Mapping[str, Tensor], place: Callable[[Tensor, str], Tensor]
    ) -> dict[str, Tensor]:
        """Tensors on the CPU that rank 0 has, at all ranks.

        `place` is called with each, and its name, by all ranks together (see `Parallel.place`).
        """
        if self.world == 1:
            return dict(saved)
        kinds = self.first(lambda: {name: (value.shape, value.dtype) for name, value in saved.items()})
        return {
            name: place(saved[name] if self.leads else torch.empty(shape, dtype=dtype), name)
            for name, (shape, dtype) in kinds.items()
        }


def join() -> Ranks:
    """The ranks that `torchrun` started, this process among them; one alone where it did not.

    The first call meets the others and takes the CUDA device LOCAL_RANK for this process, so that a module
    sent to "cuda" lies there; the process leaves the others when it ends. gloo carries what lies on the CPU,
    NCCL what lies on CUDA devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        backend, local = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def portable(error: Exception) -> Exception:
    """The error, or where it cannot be sent one that says the same."""
    try:
        return error if str(pickle.loads(pickle.dumps(error))) == str(error) else RuntimeError(str(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
