"""A run of a small transformer on packed pairs that keeps what it is shown; knows no outcome."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmdlm.canvas import Canvas, Fill, Frame, Packed
from mmdlm.canvas import Run as Span
from mmdlm.data import Batches, Listed, Shuffled
from mmdlm.diffusion import Absorbing, Diagonal, Edges, Masking, Mixture, Square
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.training import AdamW, Run, Trainer

MASK = 40
CONFIG = TransformerConfig(
    vocab_size=41,
    text=(0, 20),
    image=(20, 40),
    mask=MASK,
    dim=16,
    depth=2,
    num_heads=2,
    hidden=16,
    qk_norm=False,
)
LAWS = Mixture(((1.0, Square()), (1.0, Diagonal()), (2.0, Edges(text=0.4, image=0.6, hide=0.3))))


def network(dtype: torch.dtype = torch.float64) -> Predictor:
    """The same each time, with weights so large that every input matters."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        predictor = Predictor(Transformer(CONFIG))
        for weight in predictor.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return predictor.to(dtype)


def document(number: int) -> Canvas:
    """Number `number` of many: 1 to 9 text tokens and a picture of up to 4 x 4, the text open or given."""
    rng = torch.Generator().manual_seed(number)
    text, height, width = (int(torch.randint(1, most, (), generator=rng)) for most in (10, 5, 5))
    runs = (Span(length=text, before=(3,)), Span(grid=(height, width)))
    fills = []
    for span, first in zip(runs, (0, 20), strict=True):
        ids = first + torch.randint(20, (1, span.size), generator=rng)
        fills.append(Fill(ids, open=torch.full_like(ids, first == 20 or number % 3 != 0, dtype=torch.bool)))
    return Frame(runs).canvas(fills, mask=MASK)


@dataclass(frozen=True)
class Kept:
    """An objective, and the digest of every noised canvas that a forward pass was shown, by place."""

    inner: Masking
    seen: dict[tuple[int, int], str]

    def part(self, index: int, count: int, step: int) -> Kept:
        return Kept(self.inner.part(index, count, step), self.seen)

    def counts(self, batch: Canvas, rng: torch.Generator) -> dict[str, torch.Tensor]:
        return self.inner.counts(batch, rng)

    def __call__(self, module: nn.Module, batch: Canvas, rng: torch.Generator) -> Any:
        strata = self.inner.strata

        def keep(_: nn.Module, shown: tuple[Canvas, ...]) -> None:
            self.seen[strata.step, strata.index] = digest(shown[0])

        with module.register_forward_pre_hook(keep):
            return self.inner(module, batch, rng)


def digest(canvas: Canvas) -> str:
    """SHA-256 of all columns."""
    columns = [value for value in vars(canvas).values() if value is not None]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in columns)).hexdigest()


def batches(size: int) -> Batches[Canvas, Canvas]:
    """`size` documents at a time, always the same ones, packed."""

    def same(items: list[Canvas], rng: np.random.Generator) -> list[Canvas]:
        return items

    return Batches(Listed(document, 40, order=Shuffled(3)), size, collate=Packed(same, 64), seed=1)


def run(folder: Path, **changes: Any) -> tuple[Run, dict[tuple[int, int], str]]:
    """Two documents a micro-batch, packed; eight micro-batches a step."""
    seen: dict[tuple[int, int], str] = {}
    settings: dict[str, Any] = {
        "module": network(),
        "objective": Kept(Masking(Absorbing(MASK), LAWS), seen),
        "batches": batches(2),
        "steps": 3,
        "accumulate": 8,
        "folder": folder,
        "optimizer": AdamW(lr=1e-2),
        "log_every": 1,
        "weights": {"image": 0.3},
        "progress": False,
    }
    return Run(**(settings | changes)), seen


def train(folder: Path, **changes: Any) -> dict[tuple[int, int], str]:
    """Carries a run out; what this process was shown."""
    made, seen = run(folder, **changes)
    Trainer(made).fit()
    return seen
