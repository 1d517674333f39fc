"""Small stand-ins for what a trainer is given: a source that knows its place, an objective, a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdlm.diffusion.loss import LossOutput
from mmdlm.training import AdamW, Run, WarmupCosine

DIM = 6


class Rows:
    """Batches of consecutive rows of a table, epoch after epoch, across their ends."""

    def __init__(self, table: Tensor, size: int) -> None:
        self.table, self.size, self.place = table, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            rows = torch.arange(self.place, self.place + self.size) % len(self.table)
            self.place += self.size
            yield self.table[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Epochs(Rows):
    """The same, but exhausted at the end of the table, as a plain data set is."""

    def __iter__(self) -> Iterator[Tensor]:
        while self.place < len(self.table):
            batch = self.table[self.place : self.place + self.size]
            self.place += len(batch)
            yield batch
        self.place = 0


@dataclass(frozen=True)
class Columns:
    """Two modalities, the columns left and right of the middle; values above `above` count, all get noise."""

    noise: float = 0.1
    above: float = -9.0

    def live(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        dropped = torch.rand(batch.shape, generator=rng) < self.noise
        kept, half = (batch > self.above) & ~dropped, batch.shape[1] // 2
        left = torch.arange(batch.shape[1]) < half
        return {"text": kept & left, "image": kept & ~left}

    def __call__(self, module: nn.Module, batch: Tensor, rng: torch.Generator) -> LossOutput:
        live = self.live(batch, rng)
        seen = batch + self.noise * torch.randn(batch.shape, generator=rng, dtype=batch.dtype)
        error = (module(seen).to(batch.dtype) - batch).square()
        sums = {name: (error * where).sum() for name, where in live.items()}
        return LossOutput(sums=sums, counts={name: where.sum() for name, where in live.items()})

    def part(self, index: int, count: int, step: int) -> Columns:
        return self

    def counts(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        return {name: where.sum() for name, where in self.live(batch, rng).items()}


def table(rows: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(DIM, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, DIM)).to(dtype)


class Kit:
    """The fakes by name, and a run made of them."""

    Rows, Epochs, Columns = Rows, Epochs, Columns
    table, network = staticmethod(table), staticmethod(network)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str = "run", **changes: Any) -> Run[Any]:
        settings: dict[str, Any] = {
            "module": network(),
            "objective": Columns(),
            "batches": Rows(table(), 8),
            "steps": 10,
            "folder": self.folder / name,
            "optimizer": AdamW(lr=1e-2),
            "learning_rate": WarmupCosine(warmup=3, floor=0.1),
            "log_every": 1,
            "progress": False,
        }
        return Run(**(settings | changes))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)
