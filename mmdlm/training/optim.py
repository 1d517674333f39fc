"""How weights move: optimizer, learning rate and precision as values. Knows no loss."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class OptimizerSpec(Protocol):
    """Builds the optimizer of a module; its groups carry peak learning rates, which a schedule scales."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv:1711.05101). Matrices decay; norms, biases and `nn.Embedding` tables do not."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    eps: float = 1e-8

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of `module`, fused where the device can."""
        decayed, plain = split_parameters(module)
        if not decayed and not plain:
            raise ValueError("the module has no trainable parameter, wanted at least one")
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in (*decayed, *plain))
        present = [group for group in groups if group["params"]]
        return torch.optim.AdamW(present, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (decayed, not decayed), in the module's order.

    A parameter decays if it has two dimensions or more and no `nn.Embedding` owns it (a tied head: not).
    """
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in tables else plain).append(parameter)
    return decayed, plain


class LearningRate(Protocol):
    """The learning rate's course."""

    def scale(self, step: int, steps: int) -> float:
        """Factor on the peak at update number `step` (0 is the first) of `steps`."""
        ...


def _warmup(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up over `warmup` updates, then the peak."""

    warmup: int = 0

    def scale(self, step: int, steps: int) -> float:
        """Factor on the peak at update `step` (0 is the first)."""
        return _warmup(step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up over `warmup` updates, then half a cosine down to `floor` (a fraction of the peak)."""

    warmup: int = 0
    floor: float = 0.0

    def scale(self, step: int, steps: int) -> float:
        """Factor on the peak at update `step` (0 is the first) of `steps`."""
        if step < self.warmup:
            return _warmup(step, self.warmup)
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Linear warm-up, then the peak (stable), and over the last `decay` updates linearly down to `floor`."""

    warmup: int = 0
    decay: int = 0
    floor: float = 0.0

    def scale(self, step: int, steps: int) -> float:
        """Factor on the peak at update `step` (0 is the first) of `steps`."""
        left = min(1.0, (steps - step) / self.decay) if self.decay > 0 else 1.0
        return min(_warmup(step, self.warmup), self.floor + (1.0 - self.floor) * max(0.0, left))


class Precision(Protocol):
    """The arithmetic of the forward pass; weights, gradients and state keep the parameters' dtype."""

    def context(self, device: torch.device) -> AbstractContextManager[object]: ...


@dataclass(frozen=True)
class Float32:
    """The dtype of the parameters throughout."""

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Nothing to enter."""
        return nullcontext()


@dataclass(frozen=True)
class BFloat16Autocast:
    """Matrix products in bfloat16 by autocast; the weights stay float32."""

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast region of `device`."""
        return torch.autocast(device.type, dtype=torch.bfloat16)
