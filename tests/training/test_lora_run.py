"""Low-rank updates and frozen weights train in the same loop: what is frozen stays, a stop changes no bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmdlm.model import add_lora, freeze, merge_lora, unfreeze
from mmdlm.training import AdamW, CheckpointError, Muon, Stopped, Trainer


def updated(kit) -> nn.Module:
    module = kit.network()
    add_lora(module, rank=2, targets=("0", "3"), generator=torch.Generator().manual_seed(3))
    unfreeze(module, "1.*")  # the norm beside
    return module


def stop_at_five(moment) -> None:
    if moment.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_of_low_rank_updates_resumes_exactly_and_merges(kit):
    straight = Trainer(kit.run("straight", module=updated(kit)))
    straight.fit()
    with pytest.raises(Stopped):
        Trainer(kit.run("halves", module=updated(kit), hooks=((1, stop_at_five),))).fit()
    resumed = Trainer(kit.run("halves", module=updated(kit)))
    module = resumed.fit()
    groups = {}
    for group in ("module", "optimizer", "average"):
        one, groups[group] = (
            load_file(kit.folder / f"{name}/checkpoints/step-00000010/{group}.safetensors")
            for name in ("straight", "halves")
        )
        assert one.keys() == groups[group].keys()
        assert all(torch.equal(one[name], value) for name, value in groups[group].items()), group
    trained = {f"{layer}.{part}" for layer in (0, 3) for part in ("lora_a", "lora_b")}
    trained |= {"1.weight", "1.bias"}
    assert {name.partition("|")[0] for name in groups["optimizer"]} == set(groups["average"]) == trained
    start = kit.network().state_dict()
    assert torch.equal(module.get_parameter("0.weight"), start["0.weight"])
    batch = kit.table()
    expected = module(batch)
    assert (expected - kit.network()(batch)).abs().max() > 0.01
    merge_lora(module)
    torch.testing.assert_close(module(batch), expected, rtol=1e-6, atol=1e-6)
    kit.network().load_state_dict(module.state_dict())  # a plain network takes it


def test_a_checkpoint_without_the_updates_is_refused(kit):
    Trainer(kit.run(steps=2)).fit()
    with pytest.raises(CheckpointError, match="does not fit this run: 4 missing"):
        Trainer(kit.run(steps=2, module=updated(kit))).fit()


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2), Muon(lr=1e-2)])
def test_what_is_frozen_does_not_move(kit, optimizer):
    module = kit.network()
    freeze(module, "0.*")
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = Trainer(kit.run(module=module, optimizer=optimizer, accumulate=2, threads=2))
    trainer.fit()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"1.weight", "1.bias", "3.weight", "3.bias"}
    again = Trainer(kit.run(module=module, optimizer=optimizer, accumulate=2, threads=2, steps=12))
    again.fit()
    assert torch.equal(module.get_parameter("0.weight"), start["0.weight"])
