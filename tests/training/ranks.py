"""Starts processes that train together, as `torchrun` does, and the runs they share; knows no outcome."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.data import Batches, Listed, Shuffled
from mmdlm.diffusion import Absorbing, Edges, Masking
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.training import (
    DDP,
    AdamW,
    Ema,
    FullyShard,
    Muon,
    Run,
    Stopped,
    Trainer,
    Validation,
    load_tensors,
    saving,
)

_SPEC = importlib.util.spec_from_file_location("fakes", Path(__file__).with_name("conftest.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
fakes = sys.modules["fakes"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fakes)

_LOADED = [
    "mmdlm.data",
    "mmdlm.model",
    "mmdlm.training",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]
TABLE: Tensor = fakes.table(dtype=torch.float64)


class Blocks(nn.Module):
    """Residual layers in a `ModuleList`, and a head that is tied to nothing."""

    def __init__(self, *, unused: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            dim = fakes.DIM
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(dim, 7), nn.GELU(), nn.Linear(7, dim)) for _ in range(3)
            )
            self.norm = nn.LayerNorm(dim)
            self.unused = nn.Linear(2, 2) if unused else None
        self.to(torch.float64)

    def forward(self, x: Tensor) -> list[Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return [self.norm(x)]


class Listing(fakes.Columns):
    """The objective for a module that answers with a list."""

    def __call__(self, module: nn.Module, batch: Tensor, rng: torch.Generator) -> Any:
        return super().__call__(lambda x: module(x)[0], batch, rng)


def make(
    folder: Path, *, stop: tuple[int, int] | None = None, spoilt: int = -1, **changes: Any
) -> tuple[Run, list[tuple[int, list[int]]]]:
    """A run of float64 on rows by number, and the list of (batch, rows) that its process works on.

    `stop` is (rank, number of a batch): where that is made, the process sends itself SIGTERM. The batch
    number `spoilt` is not finite.
    """
    seen: list[tuple[int, list[int]]] = []
    rank = int(os.environ.get("RANK", "0"))

    def collate(items: list[int], rng: np.random.Generator) -> Tensor:
        number = batches.state_dict()["batch"]
        seen.append((number, items))
        if stop == (rank, number):
            os.kill(os.getpid(), signal.SIGTERM)
        return TABLE[items] + (torch.inf if number == spoilt else float(rng.random()))

    batches = Batches(Listed(int, len(TABLE), order=Shuffled(5)), 3, collate=collate, seed=4)
    settings: dict[str, Any] = {
        "module": Blocks(),
        "objective": Listing(above=-0.5),
        "batches": batches,
        "steps": 6,
        "accumulate": 4,
        "folder": folder,
        "optimizer": AdamW(lr=1e-2),
        "clip": 0.3,
        "ema": Ema(decay=0.5),
        "weights": {"image": 0.3},
        "validation": Validation(every=2, batches=[TABLE[:5], TABLE[5:6], TABLE[6:]]),
        "log_every": 2,
        "checkpoint_every": 3,
        "progress": False,
    }
    return Run(**(settings | changes)), seen


def train(folder: Path, **changes: Any) -> list[tuple[int, list[int]]]:
    """Carries a run out; what this process worked on. The weights it ends with go to FOLDER/end-RANK.pt."""
    run, seen = make(folder, **changes)
    module = Trainer(run).fit()
    assert module is run.module
    assert not module.training
    torch.save(module.state_dict(), folder / f"end-{os.environ.get('RANK', '0')}.pt")
    return seen


def stopped(folder: Path, **changes: Any) -> tuple[Any, list[tuple[int, list[int]]]]:
    """Carries a run out that a signal ends; with which status, and what this process worked on."""
    run, seen = make(folder, **changes)
    try:
        Trainer(run).fit()
    except Stopped as stop:
        return stop.code, seen
    return 0, seen


def masked(folder: Path, **changes: Any) -> None:
    """Carries out a run of a small transformer on captions of 3 tokens and images of 2 x 2 codes."""
    shape = TransformerConfig(
        vocab_size=16,
        text=(0, 5),
        image=(5, 14),
        mask=14,
        dim=16,
        depth=2,
        num_heads=2,
        hidden=8,
        digits=(3, 3),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Predictor(Transformer(shape)).double()
    modality = torch.tensor([[TEXT] * 3 + [IMAGE] * 4])
    grid = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [3, 4], [4, 3], [4, 4]])

    def collate(items: list[int], rng: np.random.Generator) -> Canvas:
        rows = len(items)
        tokens = torch.from_numpy(np.hstack([rng.integers(0, 5, (rows, 3)), rng.integers(5, 14, (rows, 4))]))
        return Canvas(
            tokens=tokens,
            modality=modality.expand(rows, -1).to(torch.uint8),
            fillable=torch.ones(rows, 7, dtype=torch.bool),
            masked=torch.zeros(rows, 7, dtype=torch.bool),
            position=grid.expand(rows, -1, -1),
            segment=torch.zeros(rows, 7, dtype=torch.long),
            span=(modality == IMAGE).long().expand(rows, -1),
        )

    # one row a batch and a law that makes some of them text only: not every rank sees every part of the head
    objective = Masking(Absorbing(14), Edges(text=1.0, image=1.0, hide=0.3))
    batches = Batches(Listed(int, 12, order=Shuffled(1)), 1, collate=collate)
    run, _ = make(folder, module=module, objective=objective, batches=batches, validation=None, **changes)
    Trainer(run).fit()


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What the newest checkpoint of a run holds, whole."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return {group: load_tensors(newest, group) for group in ("module", "optimizer", "average")}


def full(folder: Path) -> list[str]:
    """What all are told when one of them cannot write its part; nothing of that checkpoint is left."""

    def write(place: Path, *rest: Any) -> list[str]:
        names = written(place, *rest)
        if place.name.startswith(".step-00000006") and os.environ["RANK"] == "1":
            raise OSError("the disk of 1 is full")
        return names

    written, saving.write_pieces = saving.write_pieces, write
    told = []
    try:
        for name, background in (("now", False), ("behind", True)):
            try:
                train(folder / name, parallel=FullyShard(), save_in_background=background)
            except OSError as error:
                told.append(str(error))
    finally:
        saving.write_pieces = written
    return told


def refusals(folder: Path) -> list[str]:
    """What a group says to runs that it cannot share, or that go wrong at rank 0."""

    def fail(moment: Any) -> None:
        raise RuntimeError(f"the hook failed at step {moment.step}")

    ways = [
        {"accumulate": 3},
        {"accumulate": 2, "threads": 2, "parallel": FullyShard()},
        {"parallel": FullyShard(replicate=3)},
        {"optimizer": Muon(), "parallel": FullyShard()},
        {"hooks": ((2, fail),)},
    ]
    told = []
    for number, changes in enumerate(ways):
        try:
            Trainer(make(folder / str(number), **changes)[0]).fit()
        except (ValueError, RuntimeError) as error:
            told.append(str(error))
    return told


def two(folder: Path) -> tuple[Any, ...]:
    """What the group of two does: many things in one, as processes are slow to start."""
    hooked: list[float] = []

    def hook(moment: Any) -> None:  # rank 0 alone works with the whole module
        hooked.append(float(moment.module(TABLE)[0].sum()))

    samples = [
        train(folder / "ddp", parallel=DDP(), hooks=((3, hook),)),
        train(folder / "sharded", parallel=FullyShard(), hooks=((3, hook),)),
    ]
    masked(folder / "masked-ddp")
    masked(folder / "masked-sharded", parallel=FullyShard())
    Trainer(make(folder / "behind", parallel=FullyShard())[0]).save()  # before the first update
    train(folder / "behind", parallel=FullyShard(), save_in_background=True)
    train(folder / "copies", save_in_background=True)
    train(folder / "unused", module=Blocks(unused=True))
    train(folder / "spoilt", spoilt=5)
    return samples, hooked, refusals(folder / "refused"), full(folder / "full")


def hybrid(folder: Path) -> list[tuple[int, list[int]]]:
    """A run of two groups, each of which shards a copy; every rank has two micro-batches a step."""
    return train(folder, parallel=FullyShard(replicate=2), accumulate=8)


def go_on(folder: Path, stop: tuple[int, int] | None, shard: bool) -> tuple[Any, Any]:
    """A stretch of a run that other groups began."""
    way = FullyShard() if shard else None
    return stopped(folder, stop=stop, parallel=way, save_in_background=shard)


def launch(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns in each of `world` processes that form a group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)  # once for all of them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(queue, rank, world, port, function, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * world
    found = dict(queue.get() for _ in ranks)
    return [found[rank] for rank in range(world)]


def _rank(queue: Any, rank: int, world: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    queue.put((rank, function(*arguments)))


def records(folder: Path) -> list[dict[str, Any]]:
    """All that was written but clock times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
