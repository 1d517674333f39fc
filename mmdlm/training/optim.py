"""How weights move: optimizer, learning rate and precision as values. Knows no loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for the weights of `nn.Linear` layers, AdamW (`rest`) for everything else.

    Every matrix moves by its momentum (Nesterov's) made orthogonal by `iterations` of the Newton-Schulz
    polynomial, times 0.2 sqrt(its longer side): steps as large as AdamW's, so that rates compare
    (arXiv:2502.16982, section 2.2). Token tables, also tied to a head, belong to `rest`. Products
    with a matrix are in bfloat16 on accelerators and in float32 on a CPU, where `torch.optim.Muon` rounds to
    bfloat16 too and takes several times as long; those of its Gram matrix are in float32 everywhere.
    """

    lr: float = 5e-3
    momentum: float = 0.95
    weight_decay: float = 0.05
    iterations: int = 5
    rest: AdamW = AdamW(lr=2e-3)

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `module`. ValueError where no `nn.Linear` weight is trained, or one is sharded."""
        tables = _tables(module)
        layers = [child.weight for child in module.modules() if isinstance(child, nn.Linear)]
        matrices = list({id(w): w for w in layers if w.requires_grad and id(w) not in tables}.values())
        if not matrices:
            raise ValueError("the module has no trainable nn.Linear weight, Muon wants at least one")
        if any(type(weight.data) is not Tensor for weight in matrices):
            raise ValueError("Muon wants whole matrices, these are sharded: take DDP(), or another optimizer")
        mine = {id(weight) for weight in matrices}
        groups = []
        for group in self.rest.build(module).param_groups:
            left = [parameter for parameter in group["params"] if id(parameter) not in mine]
            if left:
                groups.append({**group, "params": left})
        orthogonal = {
            "params": matrices,
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "iterations": self.iterations,
        }
        return _Muon([orthogonal, *groups], lr=self.lr, fused=matrices[0].device.type in ("cpu", "cuda"))


class _Muon(torch.optim.AdamW):
    """AdamW, but for the groups that have a `momentum`. It heeds `found_inf`, as torch's fused ones do."""

    found_inf: Tensor | None = None  # () float, 1 where the gradient is not finite; set before a step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                alike: dict[torch.Size, list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        alike.setdefault(parameter.shape, []).append(parameter)
                for parameters in alike.values():
                    self._move(parameters, group)
        super().step()
        return loss

    def _move(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of parameters of equal shape, taken together."""
        averages, keep = [], 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)  # AdamW looks for it when it loads
                state["momentum"] = torch.zeros_like(parameter)
            state["step"] += keep
            gradient = parameter.grad
            if self.found_inf is not None:
                gradient = torch.where(self.found_inf > 0, 0.0, gradient)
            average = state["momentum"].lerp_(gradient, keep * (1 - group["momentum"]))
            averages.append(gradient.lerp(average, group["momentum"]))
            parameter.grad = None  # AdamW leaves alone what has no gradient
        size = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, move in zip(
            parameters, orthogonalise(torch.stack(averages), group["iterations"]), strict=True
        ):
            parameter.mul_(1 - keep * group["lr"] * group["weight_decay"])
            if self.found_inf is not None:
                move = move * keep
            parameter.sub_(move.to(parameter.dtype), alpha=group["lr"] * size)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(N, r, c) -> roughly the nearest semi-orthogonal matrices: singular values end between 0.7 and 1.2.

    The quintic Newton-Schulz iteration of Muon (https://kellerjordan.github.io/posts/muon/). Every step
    multiplies by a polynomial in the Gram matrix of the short side, so only these small matrices, in float32,
    are iterated and the product is applied once.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    gram = (x @ x.mT).float()
    total = None
    for number in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        total = factor if total is None else factor @ total
        if number + 1 < iterations:
            gram = factor @ gram @ factor
    x = x if total is None else total.to(x.dtype) @ x
    return x.mT if tall else x


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters as (decayed, not decayed), in the module's order.

    A parameter decays if it has two dimensions or more and no `nn.Embedding` owns it (a tied head: not).
    """
    tables = _tables(module)
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in tables else plain).append(parameter)
    return decayed, plain


def _tables(module: nn.Module) -> set[int]:
    return {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}


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
    """Linear warm-up, then the peak (stable), and over the last `decay` updates down to `floor`.

    Of the way down, x ** `power` is done after the share x of these updates: 1 is a straight line, 0.5 the
    "1-sqrt" of arXiv:2405.18392, which the same paper finds better.
    """

    warmup: int = 0
    decay: int = 0
    floor: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"the power of a decay must be above 0, got {self.power}")

    def scale(self, step: int, steps: int) -> float:
        """Factor on the peak at update `step` (0 is the first) of `steps`."""
        done = min(1.0, max(0.0, 1.0 - (steps - step) / self.decay)) if self.decay > 0 else 0.0
        return min(_warmup(step, self.warmup), self.floor + (1.0 - self.floor) * (1.0 - done**self.power))


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
