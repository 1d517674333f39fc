"""Operations of the forward passes in training, counted as they are made, and the share of the peak."""

from __future__ import annotations

import json

import pytest
import torch

from mmdlm.training import Trainer, Validation


def test_every_forward_pass_of_training_counts_and_no_other(kit):
    calls = []

    def flops(module, batch):
        calls.append(batch.shape)
        return torch.tensor(7.0 * len(batch))

    held_out = Validation(every=1, batches=[kit.table()])
    run = kit.run(steps=4, accumulate=2, threads=2, flops=flops, peak_flops=1e3, validation=held_out)
    module = Trainer(run).fit()
    rows = calls[0][0]
    assert calls == [(rows, calls[0][1])] * 8
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if "flops_per_second" in line]
    lasted, done = 0.0, 0.0
    for line in found:
        done += line["flops_per_second"] * (line["seconds"] - lasted)
        lasted = line["seconds"]
        assert line["utilisation"] == pytest.approx(line["flops_per_second"] / 1e3)
    assert done == pytest.approx(7.0 * rows * 8)
    module.train()
    module(kit.table())
    assert len(calls) == 8, "the hook is still there"


def test_without_a_peak_there_is_no_share_and_without_a_count_neither(kit):
    for name, given, told in (("count", {"flops": lambda *_: torch.ones(())}, True), ("none", {}, False)):
        run = kit.run(name, steps=2, **given)
        Trainer(run).fit()
        text = (run.folder / "metrics.jsonl").read_text()
        assert ("flops_per_second" in text) == told
        assert "utilisation" not in text


@pytest.mark.parametrize("given", [{"peak_flops": 1e12}, {"peak_flops": 0.0, "flops": torch.sum}])
def test_a_peak_alone_or_of_nothing_is_refused(kit, given):
    with pytest.raises(ValueError, match=r"peak_flops=.*wanted a number above 0, and flops beside it"):
        kit.run(**given)
