"""Averaged weights: an exponential moving average, and its exact swap in and out. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Decay min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., so that a short run is averaged too."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"the decay of an average lies in [0, 1), got {self.decay}")

    def at(self, update: int) -> float:
        """The decay of update number `update` (1 is the first)."""
        return min(self.decay, (1 + update) / (10 + update))


class Average:
    """The running average of a module's trainable parameters, in float32 or wider."""

    def __init__(self, ema: Ema, module: nn.Module) -> None:
        """Starts at the present weights."""
        self.ema = ema
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.shadow: dict[str, Tensor] = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in self._live.items()
        }

    @torch.no_grad()
    def update(self, number: int, *, unless: Tensor | None = None) -> None:
        """Moves the average towards the present weights; `number` is 1 after the first optimizer step.

        It stays where it is where `unless`, () bool on the device, is true.
        """
        if unless is not None:
            weight = torch.where(unless, 0.0, 1.0 - self.ema.at(number))
            for value, mean in zip(self._live.values(), self.shadow.values(), strict=True):
                mean.lerp_(value.to(mean.dtype), weight.to(mean.dtype))
            return
        shadow = list(self.shadow.values())
        live = [value.to(mean.dtype) for value, mean in zip(self._live.values(), shadow, strict=True)]
        get_ema_multi_avg_fn(self.ema.at(number))(shadow, live, number)

    @torch.no_grad()
    def write(self) -> None:
        """Puts the average into the module for good."""
        for name, value in self._live.items():
            value.copy_(self.shadow[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module holds the average; after, exactly its own weights, also when an error passes."""
        own = {name: value.detach().clone() for name, value in self._live.items()}
        self.write()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._live.items():
                    value.copy_(own[name])
