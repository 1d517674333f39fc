"""A run stops when its held-out figure no longer falls, keeps the best weights, and resumes both exactly."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmdlm.diffusion.loss import LossOutput
from mmdlm.training import CheckpointError, EarlyStop, Stopped, Trainer, Validation, load_best
from mmdlm.training.best import Lowest

COURSE = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.9, 10: 3.5, 12: 3.2, 14: 9.0}  # the held-out figure by step


class Told:
    """An objective for validations that gives the figures of a list, by the step of the trainer."""

    def __init__(self, step) -> None:
        self.step = step

    def __call__(self, module, batch, rng):
        value, one = torch.tensor(COURSE[self.step()]), torch.ones(())
        return LossOutput(sums={"text": value, "image": 2 * value}, counts={"text": one, "image": one})


def told_run(kit, name="run", **changes):
    trainers: list[Trainer] = []
    plan = Validation(every=2, batches=[kit.table(2)], objective=Told(lambda: trainers[0].step))
    run = kit.run(name, **{"steps": 14, "validation": plan, "weights": {"image": 0.5}, **changes})
    trainers.append(Trainer(run))
    return trainers[0]


def steps(folder, key: str) -> list[int]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if key in record]


def test_the_total_is_weighted_like_the_loss(kit):
    trainer = told_run(kit, steps=2)
    trainer.fit()
    last = json.loads((trainer.run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 2, "validation": 10.0, "validation/text": 5.0, "validation/image": 10.0}


@pytest.mark.parametrize(
    ("stop", "end"),
    [
        (EarlyStop(patience=1), 6),
        (EarlyStop(patience=2), 12),
        (EarlyStop(patience=2, min_delta=0.5), 8),
        (EarlyStop(patience=2, key="validation/text", min_delta=0.15), 8),
        (EarlyStop(patience=9), 14),
    ],
)
def test_it_ends_after_so_many_validations_without_progress(kit, stop, end):
    seen: list[int] = []
    trainer = told_run(kit, early_stop=stop, log_every=5, hooks=((7, lambda m: seen.append(m.step)),))
    module = trainer.fit()
    assert trainer.step == end
    assert not module.training
    assert steps(trainer.run.folder, "validation")[-1] == end
    assert steps(trainer.run.folder, "loss")[-1] == end, "the steps since the last record are written down"
    assert seen == [step for step in (7, 14) if step < end] + [end]
    assert (trainer.run.folder / f"checkpoints/step-{end:08d}").is_dir()
    again = told_run(kit, early_stop=stop, log_every=5)
    again.fit()  # it has ended: nothing more is done
    assert again.step == end
    assert again.checkpoints.steps() == trainer.checkpoints.steps()


def test_the_best_weights_are_those_that_were_validated_and_pruning_spares_them(kit):
    held: dict[int, dict] = {}

    def keep(moment):
        held[moment.step] = {name: value.clone() for name, value in moment.module.named_parameters()}

    trainer = told_run(kit, keep_best="validation", hooks=((2, keep),), checkpoint_every=1)
    trainer.fit()
    assert [path.name for path in (trainer.run.folder / "best").iterdir()] == ["step-00000008"]
    other = kit.network()
    assert load_best(trainer.run.folder, other) == 8
    assert all(torch.equal(value, held[8][name]) for name, value in other.named_parameters())
    assert not torch.equal(held[8]["0.weight"], held[14]["0.weight"])
    with pytest.raises(CheckpointError, match="does not fit"):
        load_best(trainer.run.folder, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="holds no best weights"):
        load_best(kit.folder, other)


@pytest.mark.parametrize("at", [3, 5, 9])
def test_a_stopped_run_goes_on_counting(kit, at):
    def stop(moment):
        if moment.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    choice = {"early_stop": EarlyStop(patience=2), "keep_best": "validation/text"}
    straight = told_run(kit, "straight", **choice)
    straight.fit()
    with pytest.raises(Stopped):
        told_run(kit, "halves", hooks=((1, stop),), **choice).fit()
    resumed = told_run(kit, "halves", **choice)
    resumed.fit()
    assert resumed.step == straight.step == 12
    for part in ("best/step-00000008/module", "checkpoints/step-00000012/optimizer"):
        one, other = (load_file(kit.folder / f"{name}/{part}.safetensors") for name in ("straight", "halves"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [
        json.loads((t.run.folder / "best/step-00000008/state.json").read_text()) for t in (straight, resumed)
    ]
    assert states[0] == states[1]


def test_what_cannot_be_watched_is_refused(kit):
    with pytest.raises(ValueError, match="need a validation"):
        kit.run(keep_best="validation")
    with pytest.raises(ValueError, match="need a validation"):
        kit.run(early_stop=EarlyStop(patience=1))
    with pytest.raises(ValueError, match="patience"):
        EarlyStop(patience=0)
    with pytest.raises(ValueError, match="min_delta"):
        EarlyStop(patience=1, min_delta=float("nan"))
    with pytest.raises(ValueError, match=r"no 'validation/sound' \(it has validation, validation/image"):
        told_run(kit, keep_best="validation/sound").fit()


def test_a_figure_that_is_not_finite_is_no_progress():
    lowest = Lowest("x")
    assert [lowest.take(n, {"x": v}) for n, v in enumerate((float("nan"), 2.0, float("inf"), 2.0, 1.0))] == [
        False, True, False, False, True,
    ]  # fmt: skip
    again = Lowest("x")
    again.load_state_dict(json.loads(json.dumps(lowest.state_dict())))
    assert vars(again) == vars(lowest)
