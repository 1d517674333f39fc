"""Listeners hear every record as it is written, and none of them is needed or ends the run."""

from __future__ import annotations

import json
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from mmdlm.training import TensorBoard, Trackio, Trainer, Validation, WandB


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_listeners_hear_what_is_written(kit):
    heard: list[dict] = []

    def listener(step, values):
        heard.append({"step": step, **values})
        values.clear()  # its own copy: the next one hears it all

    run = kit.run(
        steps=4,
        listeners=(listener, listener),
        validation=Validation(every=2, batches=[kit.table(8)]),
        hooks=((4, lambda moment: moment.log({"score": float("nan"), "word": "a"})),),
    )
    Trainer(run).fit()
    assert heard[::2] == heard[1::2] == written(run.folder)
    assert heard[-1] == {"step": 4, "score": None, "word": "a"}


def test_listeners_are_closed_also_when_the_run_fails(kit):
    class Closed:
        ends = 0

        def __call__(self, step, values):
            pass

        def close(self):
            self.ends += 1
            raise OSError("the service is gone")

    def broken(moment):
        raise RuntimeError("a bad hook")

    closed = Closed()
    with (
        pytest.raises(RuntimeError, match="a bad hook"),
        pytest.warns(UserWarning, match=r"Closed\) of the run failed at the end.*is gone"),
    ):
        Trainer(kit.run(steps=2, listeners=(closed,), hooks=((2, broken),))).fit()
    assert closed.ends == 1


def test_a_listener_that_fails_is_told_of_once_and_the_run_goes_on(kit):
    heard: list[int] = []

    def failing(step, values):
        heard.append(step)
        raise ConnectionError("no network")

    run = kit.run(steps=4, listeners=(failing, lambda step, values: heard.append(-step)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(run).fit()
    assert heard == [1, -1, 2, -2, 3, -3, 4, -4]
    (warning,) = [str(each.message) for each in caught if "no network" in str(each.message)]
    assert "failed at step 1" in warning


class Service(ModuleType):
    """What wandb and trackio have in common: `init` gives a run with `log` and `finish`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.ended: list[int] = []

    def init(self, *project, **options):
        self.started.append({"positional": project, **options})
        return SimpleNamespace(log=self.log, finish=lambda: self.ended.append(len(self.logged)))

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.mark.parametrize(("name", "tracker"), [("wandb", WandB), ("trackio", Trackio)])
def test_services_are_begun_once_with_the_configuration_and_get_numbers(kit, monkeypatch, name, tracker):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    say = (2, lambda moment: moment.log({"score": 0.5, "word": "a"}))
    run = kit.run(steps=2, hooks=(say,), listeners=(tracker("mine", kit.folder / "run"),))
    Trainer(run).fit()
    (started,) = service.started
    assert started["config"]["optimizer"]["class"] == "AdamW"
    assert started["name"] == "run"
    assert started["resume"] == "allow"
    assert [step for step, _ in service.logged] == [1, 2, 2]
    assert service.logged[-1] == (2, {"score": 0.5})
    assert service.logged[0][1]["loss"] == written(run.folder)[0]["loss"]
    assert service.ended == [3]
    Trainer(kit.run(steps=3, listeners=run.listeners)).fit()
    assert service.ended == [3, 4]
    assert service.started[1].get("id") == started.get("id")  # the same run goes on


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tensorboard", lambda folder: TensorBoard(folder)),
        ("wandb", lambda folder: WandB("mine", folder)),
        ("trackio", lambda folder: Trackio("mine", folder)),
    ],
)
def test_a_missing_package_is_named_before_the_run_begins(tmp_path, monkeypatch, name, make):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed: pip install 'mmdlm\[{name}\]'"):
        make(tmp_path)


def test_tensorboard_reads_what_was_written(kit):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = kit.run(steps=3, listeners=(TensorBoard(kit.folder / "events"),))
    Trainer(run).fit()
    events = EventAccumulator(str(kit.folder / "events"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/text")]
    expected = [(record["step"], pytest.approx(record["loss/text"])) for record in written(run.folder)]
    assert found == expected
