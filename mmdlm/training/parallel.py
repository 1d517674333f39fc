"""Several processes train one module: how they meet, agree and share it out. Knows no loss, noise or data.

`torchrun` starts the processes (ranks) and tells each by its environment which one it is. A step of
`Run.accumulate` micro-batches is shared out: of W ranks, rank r works on micro-batches r, r + W, ..., so that
samples, noise levels and counts are those of one process, and the weights too up to the order of summation.
"""

from __future__ import annotations

import atexit
import copy
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # the others wait while rank 0 saves and calls hooks
_BUCKET = 32 * 2**20  # bytes of gradients that are summed at once
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


class Parallel(Protocol):
    """How several ranks hold a module; its methods are called by all of them together."""

    def wrap(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The module that is trained: `module` itself, or a copy of which this rank holds a part."""
        ...

    def begin(self, module: nn.Module, *, last: bool) -> None:
        """Called before each of this rank's micro-batches of a step, with whether it is the last."""
        ...

    def reduce(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        """Makes every gradient the sum over all ranks, after the last backward pass of a step."""
        ...

    def whole(self, value: Tensor) -> Tensor:
        """A tensor of the trained module, put together of all ranks' parts."""
        ...

    def release(self, module: nn.Module) -> None:
        """Lets go of what forward passes of the trained module left gathered: the weights will change."""
        ...

    def part(self, value: Tensor) -> Tensor:
        """What this rank holds of it."""
        ...

    def place(self, value: Tensor, home: Tensor | None) -> Tensor:
        """The tensor that rank 0 calls this with (the others: one of its size), divided as `home` is."""
        ...


@dataclass(frozen=True)
class DDP:
    """Every rank holds the whole module, the optimizer's state and the average; gradients are added up.

    One sum a step, after its last micro-batch, in buckets.
    """

    def wrap(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The module itself, with the weights of rank 0."""
        if ranks.world > 1:
            _equalise(module)
        return module

    def begin(self, module: nn.Module, *, last: bool) -> None:
        """Nothing."""

    def reduce(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        """A parameter that has a gradient at no rank gets none."""
        if ranks.world == 1:
            return
        given = list(parameters)
        touched = ranks.largest([int(value.grad is not None) for value in given])
        gradients: list[Tensor] = []
        for value, has in zip(given, touched, strict=True):
            if has:
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
                gradients.append(value.grad)
        sent: tuple[dist.Work, Tensor, list[Tensor]] | None = None
        for bucket in _buckets(gradients):  # one is packed while the one before is on its way
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            if sent is not None:
                _unpack(*sent)
            sent = (work, flat, bucket)
        if sent is not None:
            _unpack(*sent)

    def whole(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        return value

    def release(self, module: nn.Module) -> None:
        """Nothing."""

    def part(self, value: Tensor) -> Tensor:
        """The tensor itself."""
        return value

    def place(self, value: Tensor, home: Tensor | None) -> Tensor:
        """The whole tensor."""
        dist.broadcast(value, src=0)
        return value


@dataclass(frozen=True, kw_only=True)
class FullyShard:
    """Every rank holds a part of all weights, gradients and optimizer state (FSDP2, `fully_shard`).

    Checkpoints are written by every rank, so the run's folder must be one that all of them share. Weights are
    gathered one unit at a time: each member of the module's outermost `nn.ModuleList`s, and the
    rest. The module that the run names is emptied while its sharded copy is trained; hooks find the whole
    weights in it, and the end of the run, then at every rank. Its `forward` must answer with tensors in
    tuples, lists or dicts, and call the units, not their methods; a parameter that it does not use gets a
    gradient of 0. Compiled units are compiled again, with torch's default options. Needs torch 2.13.

    `replicate` groups of ranks hold a whole copy each (HSDP: weights are gathered inside a group, mostly a
    machine; between groups only gradients are added up, once a step). `param_dtype` is that of gathered
    weights and of the arithmetic, `torch.bfloat16` for instance; shards, sums of gradients and optimizer keep
    their own.
    """

    replicate: int = 1
    param_dtype: torch.dtype | None = None

    def wrap(self, module: nn.Module, ranks: Ranks) -> nn.Module:
        """The sharded copy. Raises ValueError where `replicate` does not divide the number of ranks."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if self.replicate < 1 or ranks.world % self.replicate:
            raise ValueError(f"replicate={self.replicate} does not divide {ranks.world} processes")
        first = next(module.parameters())
        shape, names = (ranks.world,), ("shard",)
        if self.replicate > 1:
            shape, names = (self.replicate, ranks.world // self.replicate), ("replicate", "shard")
        mesh = init_device_mesh(first.device.type, shape, mesh_dim_names=names)
        own = None if self.param_dtype is None else first.dtype
        policy = MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=own)
        _equalise(module)
        sharded = _alias(module)
        units = list(_units(sharded))
        for number, unit in enumerate(units, start=1):  # the last one is wanted again at once
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=number < len(units))
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        for each in sharded.modules():
            if isinstance(each, FSDPModule):
                each.set_gradient_divide_factor(1.0)  # the loss is divided by counts of all ranks already
                each.set_force_sum_reduction_for_comms(True)
                each.set_reduce_scatter_unused_params(True)  # one rank's texts may come without an image
        hide(module)
        return sharded

    def begin(self, module: nn.Module, *, last: bool) -> None:
        """Groups that hold copies add their gradients up with the last micro-batch only."""
        from torch.distributed.fsdp import FSDPModule

        if self.replicate > 1:
            assert isinstance(module, FSDPModule)
            module.set_requires_all_reduce(last)

    def reduce(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        """Nothing: the backward passes have done it."""

    def whole(self, value: Tensor) -> Tensor:
        """All shards together; what is not sharded as it is."""
        from torch.distributed.tensor import DTensor

        return value.full_tensor() if isinstance(value, DTensor) else value

    def release(self, module: nn.Module) -> None:
        """Shards every unit again, also those that stay whole after a forward pass."""
        from torch.distributed.fsdp import FSDPModule

        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()

    def part(self, value: Tensor) -> Tensor:
        """This rank's shard."""
        from torch.distributed.tensor import DTensor

        return value.to_local() if isinstance(value, DTensor) else value

    def place(self, value: Tensor, home: Tensor | None) -> Tensor:
        """A shard where `home` is one and of the same size, else the whole tensor."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(home, DTensor) and home.shape == value.shape:
            return distribute_tensor(value.to(home.device), home.device_mesh, home.placements)
        dist.broadcast(value, src=0)
        return value


def hide(module: nn.Module) -> None:
    """Empties the parameters of `module`, whose sharded copy is trained."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


@torch.no_grad()
def show(trained: nn.Module, module: nn.Module, parallel: Parallel, *, here: bool = True) -> None:
    """Puts the whole weights of `trained` into `module`, if that is not the same; at ranks that say `here`.

    Called by all ranks.
    """
    if trained is module:
        return
    shards = dict(trained.named_parameters())
    for name, parameter in module.named_parameters():
        whole = parallel.whole(shards[name].detach())
        if here:
            parameter.data = whole


@contextmanager
def shown(trained: nn.Module, module: nn.Module, parallel: Parallel, *, here: bool) -> Iterator[None]:
    """Inside, `module` has the whole weights of `trained`, itself or its sharded copy; see `show`."""
    show(trained, module, parallel, here=here)
    try:
        yield
    finally:
        if trained is not module:
            hide(module)


@torch.no_grad()
def _equalise(module: nn.Module) -> None:
    for value in (*module.parameters(), *module.buffers()):
        dist.broadcast(value.detach(), src=0)


def _alias(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own over the same memory, and the same buffers."""
    memo: dict[int, object] = {
        id(value): nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        for value in module.parameters()
    }
    alias = copy.deepcopy(module, memo | {id(value): value for value in module.buffers()})
    for mine, theirs in zip(alias.modules(), module.modules(), strict=True):
        if vars(theirs).get("_compiled_call_impl") is not None:  # `nn.Module.compile`, which no copy keeps
            mine.compile()
    return alias


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _units(child)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, about `_BUCKET` bytes each time."""
    held: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if held and (size >= _BUCKET or gradient.dtype != held[0].dtype):
            yield held
            held, size = [], 0
        held.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if held:
        yield held


def _unpack(work: dist.Work, flat: Tensor, gradients: list[Tensor]) -> None:
    work.wait()
    for gradient, piece in zip(gradients, flat.split([value.numel() for value in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))
