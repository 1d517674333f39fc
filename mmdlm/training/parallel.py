"""How several processes hold and train one module. Knows no loss, noise or data.

A step of `Run.accumulate` micro-batches is shared out: of W ranks, rank r works on micro-batches r, r + W,
..., so that samples, noise levels and counts are those of one process, and the weights too up to the order of
summation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdlm.training.ranks import Ranks

_BUCKET = 32 * 2**20  # bytes of gradients that are summed at once


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
