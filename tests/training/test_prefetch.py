"""How many batches are made ahead changes nothing, also not where a run is stopped and taken up again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdlm.data import Batches
from mmdlm.data.sample import SampleError
from mmdlm.training import BatchError, Stopped, Trainer

STEPS = 12


@dataclass
class Row:
    """A sample with a name."""

    index: int

    @property
    def name(self) -> str:
        return f"row {self.index}"


def stream(kit, prefetch: int) -> Batches:
    table = kit.table()

    def collate(rows: list[Row], rng: np.random.Generator) -> torch.Tensor:
        noise = torch.from_numpy(rng.normal(size=(len(rows), table.shape[1]))).float()
        return table[[row.index for row in rows]] + 0.01 * noise

    return Batches(Row, 5, collate=collate, seed=4, size=len(table), prefetch=prefetch)


def train(kit, name: str, *depths: int) -> tuple[list[str], list[float], dict[str, torch.Tensor]]:
    """Samples, losses and last weights of a run; with three depths it is stopped after 4 and 7 steps."""
    seen: list[str] = []
    stops = dict(zip((4, 7), depths, strict=False)) if len(depths) > 1 else {}
    for depth in depths:
        batches = stream(kit, depth)

        def look(moment, batches=batches) -> None:
            seen.extend(batches.names())
            if moment.step in stops:
                del stops[moment.step]
                os.kill(os.getpid(), signal.SIGTERM)

        run = kit.run(name, batches=batches, steps=STEPS, accumulate=1, hooks=((1, look),))
        try:
            Trainer(run).fit()
        except Stopped:
            pass
        finally:
            batches.close()
    lines = [json.loads(line) for line in Path(run.folder, "metrics.jsonl").read_text().splitlines()]
    return seen, [line["loss"] for line in lines], dict(run.module.state_dict())


@pytest.mark.parametrize("depths", [(1,), (2,), (4,), (0, 0, 0), (1, 1, 1), (2, 2, 2), (4, 4, 4), (0, 4, 2)])
def test_samples_losses_and_weights_are_those_of_no_prefetch_and_no_stop(kit, depths):
    samples, losses, weights = train(kit, "plain", 0)
    assert len(samples) == STEPS * 5
    assert len(set(samples[:20])) == 20
    again, same, others = train(kit, "other", *depths)
    assert again == samples
    assert same == losses
    assert all(torch.equal(others[name], value) for name, value in weights.items())


def test_a_sample_that_cannot_be_had_ends_the_run_with_its_name_and_what_stands(kit):

    def item(index: int) -> Row:
        if index == 17:
            raise SampleError("shard-3.tar/17.png", "its checksum is not the one in the index")
        return Row(index)

    table = kit.table()
    for prefetch in (0, 2):
        batches = Batches(
            item, 5, collate=lambda rows, rng: table[[row.index for row in rows]], prefetch=prefetch
        )
        run = kit.run(f"ahead{prefetch}", batches=batches, checkpoint_every=2)
        told = r"no batch for step 4: shard-3.tar/17.png: its checksum .*the checkpoint of step 2 stands"
        with pytest.raises(BatchError, match=told):
            Trainer(run).fit()
        assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000002"]
