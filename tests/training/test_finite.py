"""An update that is not finite leaves nothing behind but its record; three in a row end the run by name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from mmdlm.data import Batches, Shuffled
from mmdlm.diffusion.loss import LossOutput
from mmdlm.training import AdamW, Muon, Stopped, Trainer


class Breaking:
    """An objective (of `kit.Columns`) that is NaN or has an infinite slope at some calls, 1 is the first."""

    def __init__(self, columns, calls, how: str = "loss") -> None:
        self.columns, self.calls, self.how, self.done = columns, set(calls), how, 0

    def __call__(self, module, batch, rng) -> LossOutput:
        losses = self.columns(module, batch, rng)
        self.done += 1
        if self.done in self.calls:
            bad = torch.tensor(float("nan"))
            if self.how == "gradient":  # sqrt at 0: the value is 0, its slope infinite
                weight = next(module.parameters())
                bad = ((weight - weight.detach()).sum()).sqrt() * 0 + (
                    (weight - weight.detach()) ** 0.5
                ).sum()
            return LossOutput({n: s + bad for n, s in losses.sums.items()}, losses.counts)
        return losses


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, optimizer and average, copied."""
    module, average = trainer.run.module, trainer.average
    found = {f"w.{name}": value for name, value in module.named_parameters()}
    for name, value in module.named_parameters():
        found |= {f"o.{name}.{slot}": each for slot, each in trainer.optimizer.state[value].items()}
    found |= {} if average is None else {f"a.{name}": value for name, value in average.shadow.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def steps_of(kit, optimizer, how: str, *, masks: bool) -> tuple[Trainer, list[dict[str, torch.Tensor]]]:
    """The state after each of five updates, of which the third is not finite."""
    run = kit.run(f"{how}{masks}", objective=Breaking(kit.Columns(), {3}, how), steps=5, optimizer=optimizer)
    run.folder.mkdir()
    trainer = Trainer(run)
    trainer._masks = masks
    stream, seen = trainer._stream(), []
    for _ in range(5):
        trainer._update(*trainer._take(stream))
        seen.append(state(trainer))
    return trainer, seen


@pytest.mark.parametrize("masks", [False, True], ids=["looked at", "masked"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2), Muon()])
def test_weights_optimizer_and_average_stay_exactly(kit, optimizer, how, masks):
    """`masked` is the way of accelerators, where nothing may look at the flag; it runs on a CPU as well."""
    trainer, seen = steps_of(kit, optimizer, how, masks=masks)
    before, after, later = seen[1], seen[2], seen[3]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after if name.startswith("w."))
    assert all(value.isfinite().all() for value in seen[-1].values())
    assert trainer.step == 5  # the step counts
    trainer._check_finite()
    assert [record["step"] for record in records(trainer.run.folder)] == [3]
    assert all(value == value for value in trainer._window.losses().values())  # its figures are left out too


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2), Muon()])
def test_masked_is_looked_at(kit, optimizer):
    looked, masked = (steps_of(kit, optimizer, "loss", masks=masks)[1] for masks in (False, True))
    for name, value in looked[-1].items():
        torch.testing.assert_close(masked[-1][name], value, rtol=1e-6, atol=1e-7)


def test_two_in_a_row_are_recorded_and_the_run_goes_on(kit):
    run = kit.run(objective=Breaking(kit.Columns(), {3, 4, 6, 7}))
    Trainer(run).fit()
    assert all(value.isfinite().all() for value in run.module.parameters())
    skipped = [(record["step"], record["skipped"]) for record in records(run.folder) if "skipped" in record]
    assert skipped == [(3, 1), (4, 2), (6, 3), (7, 4)]
    losses = {record["step"]: record["loss"] for record in records(run.folder) if "loss" in record}
    assert sorted(losses) == list(range(1, 11))
    assert losses[3] is None
    assert losses[5] > 0


class Pair:
    """A sample with a name."""

    def __init__(self, index: int) -> None:
        self.name, self.index = f"picture {index}.png", index


@pytest.mark.parametrize("masks", [False, True], ids=["looked at", "masked"])
@pytest.mark.parametrize("log_every", [1, 5])
def test_three_in_a_row_stop_the_run_with_steps_and_samples(kit, masks, log_every):
    table = kit.table()
    batches = Batches(Pair, 2, collate=lambda pairs, rng: table[[pair.index for pair in pairs]], size=24)
    run = kit.run(
        batches=batches,
        objective=Breaking(kit.Columns(), {4, 5, 6}),
        checkpoint_every=2,
        log_every=log_every,
    )
    trainer = Trainer(run)
    trainer._masks = masks
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()
    order = [f"picture {index}.png" for index in Shuffled()(24, 0)]
    told = [f"step {step}: {order[2 * step - 2]}, {order[2 * step - 1]}" for step in (4, 5, 6)]
    assert all(each in str(caught.value) for each in told), str(caught.value)
    # masked, the third is seen with the save of step 6 at the latest
    assert "the checkpoint of step 4 stands" in str(caught.value)
    found = {record["step"]: record["samples"] for record in records(run.folder) if "skipped" in record}
    assert found == {step: f"{order[2 * step - 2]}, {order[2 * step - 1]}" for step in (4, 5, 6)}
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())][-1] == "step-00000004"


def test_samples_without_a_name_are_told_by_their_place(kit):
    with pytest.raises(FloatingPointError, match=r"step 1: all before \{'place': 8\}"):
        Trainer(kit.run(objective=Breaking(kit.Columns(), {1, 2, 3}))).fit()
    batches = Batches(int, 2, collate=lambda indices, rng: kit.table()[indices])
    run = kit.run("numbers", batches=batches, objective=Breaking(kit.Columns(), {2, 3, 4}))
    with pytest.raises(FloatingPointError, match="step 3: item 4 of the stream, item 5 of the stream"):
        Trainer(run).fit()


def test_a_resumed_run_goes_on_counting_and_stays_exact(kit):
    class Marked:
        """Not finite for some batches of the table, so that a resumed run meets them again."""

        def __call__(self, module, batch, rng):
            losses = kit.Columns()(module, batch, rng)
            bad = float("nan") if batch[0, 0] == marked else 0.0
            return LossOutput({n: s + bad for n, s in losses.sums.items()}, losses.counts)

    def stopping(at: int):
        def stop(moment) -> None:
            if moment.step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        return (1, stop)

    marked = kit.table()[8, 0]  # the second batch of each three
    straight = Trainer(kit.run("straight", objective=Marked()))
    straight.fit()
    for at in (2, 5):  # right behind an update that was left out
        with pytest.raises(Stopped):
            Trainer(kit.run("halves", objective=Marked(), hooks=(stopping(at),))).fit()
    halves = Trainer(kit.run("halves", objective=Marked()))
    halves.fit()
    assert halves._watch.skipped == straight._watch.skipped == 3
    mine, theirs = state(straight), state(halves)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    timeless = [
        [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in found]
        for found in (records(straight.run.folder), records(halves.run.folder))
    ]
    assert timeless[0] == timeless[1]


def test_three_in_a_row_are_counted_across_a_restart(kit):
    run = kit.run(objective=Breaking(kit.Columns(), {5, 6}), steps=6)
    Trainer(run).fit()
    with pytest.raises(FloatingPointError, match=r"step 5: .*step 6: .*step 7: .*checkpoint of step 6"):
        Trainer(kit.run(objective=Breaking(kit.Columns(), {1}))).fit()


def test_weights_that_went_bad_without_a_bad_gradient_are_not_saved(kit):
    def spoil(moment) -> None:
        if moment.step == 4:
            moment.module[0].weight.data[0, 0] = float("inf")

    trainer = Trainer(kit.run(hooks=((1, spoil),), ema=None, checkpoint_every=2))
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 4; .*step 2 stands"):
        trainer.fit()
    assert [path.name for path in (trainer.run.folder / "checkpoints").iterdir()] == ["step-00000002"]
