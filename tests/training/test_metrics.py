"""Records survive as they were written, are cut back to a step, and a torn last line harms nothing."""

from __future__ import annotations

import json

import pytest
import torch

from mmdlm.diffusion.loss import LossOutput
from mmdlm.training.metrics import Metrics, Window


def test_records_are_appended_and_cut_back(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    for step in (1, 2, 2, 3):
        metrics.append(step, {"loss": step / 3})
    metrics.truncate(2)
    assert metrics.read() == [{"step": step, "loss": step / 3} for step in (1, 2, 2)]


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(1, {"loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in metrics.read()] == [1]
    metrics.truncate(5)
    metrics.append(2, {"loss": 0.5})
    assert [record["step"] for record in metrics.read()] == [1, 2]
    metrics.path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        metrics.read()


def test_a_number_that_is_not_finite_stays_json(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(1, {"loss": float("nan"), "name": "a"})
    assert json.loads(metrics.path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "name": "a",
    }


def losses(text: float, image: float, counts: tuple[int, int]) -> LossOutput:
    return LossOutput(
        sums={"text": torch.tensor(text), "image": torch.tensor(image)},
        counts={"text": torch.tensor(counts[0]), "image": torch.tensor(counts[1])},
        bounds={"text": torch.tensor(2 * text), "image": torch.tensor(2 * image)},
    )


def test_a_window_divides_sums_by_counts_and_leaves_out_what_did_not_occur():
    window = Window()
    window.add(losses(3.0, 0.0, (2, 0)))
    window.add(losses(5.0, 0.0, (6, 0)))
    assert window.losses() == {"text": 1.0}
    assert window.bounds() == {"text": 2.0}
    assert window.count() == 8


def test_a_window_goes_through_json_exactly():
    window, again = Window(), Window()
    window.add(losses(0.1, 1e-30, (3, 7)))
    again.load_state_dict(json.loads(json.dumps(window.state_dict())), torch.device("cpu"))
    for each in (window, again):
        each.add(losses(1 / 3, 2 / 7, (1, 1)))
    assert again.losses() == window.losses()
    assert again.state_dict() == window.state_dict()
