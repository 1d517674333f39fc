"""The program that writes a run's page names what it wrote, or the folder that holds no run."""

from __future__ import annotations

import json


def test_it_writes_the_page_of_a_run_and_finds_the_model_beside_it(program, tmp_path):
    run, model = tmp_path / "transformer", tmp_path / "model"
    for folder in (run, model):
        folder.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "run.json").write_text(json.dumps({"class": "Run", "steps": 4}))
    done = program("train/report.py", run)
    assert done == (0, f"{run / 'report.html'}\n", "")
    assert "from_pretrained" not in (run / "report.html").read_text("utf-8")
    (model / "model_index.json").write_text("{}")
    assert program("train/report.py", run).status == 0
    assert "from_pretrained" in (run / "report.html").read_text("utf-8")
    done = program("train/report.py", model)
    assert (done.status, done.out) == (2, "")
    assert "no records of a training run" in done.err
