"""Low-rank updates of frozen linear layers, and freezing by name. Knows no network, loss or optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmdlm.io.atomic import atomic_write

TARGETS = ("qkv", "out", "gate_up", "down")  # the linear layers of a block


class LoraLinear(nn.Linear):
    """W x + b + alpha / rank * B (A x), with W and b frozen. arXiv:2106.09685, section 4.1."""

    lora_a: nn.Parameter  # (rank, in)
    lora_b: nn.Parameter  # (out, rank)

    def __init__(
        self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> None:
        """Takes over the parameters of `linear`. B is 0, so that the layer starts as `linear` itself.

        A is N(0, 1 / in): A x is as large as the entries of x.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.alpha = rank, alpha
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        drawn = torch.randn(rank, self.in_features, generator=generator)  # the same on every device
        self.lora_a = nn.Parameter((drawn * self.in_features**-0.5).to(**like))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight, self.bias) + self.alpha / self.rank * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of the same function, on the same parameters; summed in float32 or wider."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_b.to(wide) @ self.lora_a.to(wide)
        self.weight.copy_(self.weight.to(wide) + self.alpha / self.rank * update)
        return plain


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = TARGETS,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freezes the module and gives its linear layers trainable low-rank updates; the names of those layers.

    `targets` are layers' own names, or dotted ends of them, with wildcards: `qkv`, `blocks.0.*.down`. `alpha`
    None is the rank: a scale of 1. The module computes what it did before. Where more is to be trained,
    `unfreeze` it after. Raises ValueError for a rank below 1, a target without a layer, a layer whose weight
    is also another's, and a module that has low-rank updates already.
    """
    if rank < 1:
        raise ValueError(f"the rank of an update must be at least 1, got {rank}")
    if there := list(lora_layers(module)):
        raise ValueError(f"the module has low-rank updates already ({there[0]}, ...); merge_lora first")
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name}
    chosen = []
    for target in targets:
        found = [name for name in layers if fnmatchcase(f".{name}", f"*.{target}")]
        if not found:
            raise ValueError(f"no linear layer is called {target!r}; they are {', '.join(layers) or 'none'}")
        chosen += found
    wanted = [name for name in layers if name in chosen]
    owners = Counter(id(value) for _, value in module.named_parameters(remove_duplicate=False))
    for name in wanted:
        if owners[id(layers[name].weight)] > 1:
            raise ValueError(f"the weight of {name!r} is also another's (tied): merging would change both")
    module.requires_grad_(False)
    for name in wanted:
        scale = float(rank) if alpha is None else alpha
        module.set_submodule(name, LoraLinear(layers[name], rank=rank, alpha=scale, generator=generator))
    return wanted


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """The layers with low-rank updates, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}


def merge_lora(module: nn.Module) -> list[str]:
    """Adds the updates to the weights they belong to and makes the layers plain again; their names.

    What was frozen stays so (`unfreeze`). Raises ValueError where there is nothing to merge.
    """
    layers = lora_layers(module)
    if not layers:
        raise ValueError("the module has no low-rank updates to merge")
    for name, layer in layers.items():
        module.set_submodule(name, layer.merged())
    return list(layers)


def save_lora(module: nn.Module, path: Path | str) -> None:
    """Writes the updates alone, a safetensors file, whole or not at all. ValueError where there are none."""
    layers = lora_layers(module)
    if not layers:
        raise ValueError("the module has no low-rank updates to save")
    tensors = {f"{name}.{part}": value for name, layer in layers.items() for part, value in _parts(layer)}
    tensors |= {f"{name}.alpha": torch.tensor(layer.alpha).double() for name, layer in layers.items()}
    atomic_write(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def load_lora(module: nn.Module, path: Path | str) -> list[str]:
    """Adds the updates that `save_lora` wrote to a module without any; the names of the layers.

    Raises ValueError where the file cannot be read or is of another network; the module is as before then.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no low-rank updates that can be read: {error}") from error
    names = sorted({name.rpartition(".")[0] for name in tensors})
    layers = dict(module.named_modules())
    for name in names:
        _check(path, name, layers.get(name), tensors)
    module.requires_grad_(False)
    for name in names:
        a, layer = tensors[f"{name}.lora_a"], layers[name]
        assert isinstance(layer, nn.Linear)
        made = LoraLinear(layer, rank=len(a), alpha=float(tensors[f"{name}.alpha"]))
        with torch.no_grad():
            for part, value in _parts(made):
                value.copy_(tensors[f"{name}.{part}"])
        module.set_submodule(name, made)
    return names


def freeze(module: nn.Module, *patterns: str) -> list[str]:
    """Ends the training of the parameters whose dotted names fit a pattern (`*norm*`), of all without any.

    Returns their names. Raises ValueError for a pattern that fits none.
    """
    return _require_grad(module, patterns, False)


def unfreeze(module: nn.Module, *patterns: str) -> list[str]:
    """The inverse of `freeze`."""
    return _require_grad(module, patterns, True)


def _require_grad(module: nn.Module, patterns: Sequence[str], required: bool) -> list[str]:
    named = dict(module.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        found = {name for name in named if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"no parameter is called {pattern!r}; they are {', '.join(named) or 'none'}")
        chosen |= found
    for name in chosen:
        named[name].requires_grad_(required)
    return [name for name in named if name in chosen]


def _parts(layer: LoraLinear) -> list[tuple[str, nn.Parameter]]:
    return [("lora_a", layer.lora_a), ("lora_b", layer.lora_b)]


def _check(path: Path | str, name: str, layer: nn.Module | None, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(layer, nn.Linear) or isinstance(layer, LoraLinear):
        raise ValueError(f"{path} updates {name!r}, which is no plain linear layer of this module")
    missing = [part for part in ("lora_a", "lora_b", "alpha") if f"{name}.{part}" not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} of {name!r}")
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    rank, wanted = len(a), (layer.out_features, layer.in_features)
    if a.ndim != 2 or b.shape != (wanted[0], rank) or a.shape[1] != wanted[1]:
        raise ValueError(
            f"{path}: {name!r} is updated by {tuple(b.shape)} x {tuple(a.shape)}, wanted {wanted}"
        )
