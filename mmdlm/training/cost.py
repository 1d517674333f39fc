"""Counts the operations of a module's forward passes in training, as they are made. Knows no module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class Meter:
    """Adds up `flops(module, *what the module is called with)`, without a host sync; threads may share it."""

    def __init__(self, flops: Callable[..., Tensor] | None) -> None:
        self._flops = flops
        self._found: list[Tensor] = []

    @contextmanager
    def reading(self, module: nn.Module) -> Iterator[None]:
        """Inside, every call of the module in training mode counts."""
        if self._flops is None:
            yield
            return
        # never compiled: a module would be compiled anew for every length of the list
        count = cast(Callable[..., None], torch.compiler.disable(self._count))
        handle = module.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> Tensor | None:
        """What was counted since the last time; None where nothing was."""
        found, self._found = self._found, []
        return torch.stack(found).sum() if found else None

    def _count(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert self._flops is not None
        if module.training:
            with torch.no_grad():
                self._found.append(self._flops(module, *given, **named))
