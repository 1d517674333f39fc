"""The loop learns, repeats itself, divides globally, keeps its rhythms and stops at what is not finite."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmdlm.training import AdamW, BFloat16Autocast, Constant, Ema, Run, Trainer, Validation
from mmdlm.training.run import generator


def records(run: Run, key: str = "loss") -> list:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def test_it_learns_and_hands_back_the_averaged_weights(kit):
    run = kit.run(steps=300, optimizer=AdamW(lr=3e-2, weight_decay=0.0), log_every=50, ema=Ema(decay=0.9))
    module = Trainer(run).fit()
    assert module is run.module
    assert not module.training
    batch = kit.table()
    assert (module(batch) - batch).square().mean() < 0.05 * batch.square().mean()
    found = records(run)
    assert [record["step"] for record in found] == [50, 100, 150, 200, 250, 300]
    assert found[-1]["loss"] == pytest.approx(found[-1]["loss/text"] + found[-1]["loss/image"])
    assert found[-1]["loss"] < 0.1 * found[0]["loss"]
    assert found[-1]["tokens_per_second"] > 0
    assert found[0]["seconds"] < found[-1]["seconds"]
    trainer = Trainer(kit.run(module=module, steps=300, ema=Ema(decay=0.9), progress=True))
    trainer.fit()  # finished: it only takes up the last checkpoint
    for name, value in module.named_parameters():
        assert torch.equal(value, trainer.average.shadow[name])


def test_two_fresh_runs_have_the_same_first_twenty_losses_and_the_seed_changes_them(kit):
    first, again, other = (
        kit.run(name, steps=20, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    before = torch.random.get_rng_state()
    for run in (first, again, other):
        Trainer(run).fit()
    assert torch.equal(torch.random.get_rng_state(), before), "the trainer used the global generator"
    losses = [[record["loss"] for record in records(run)] for run in (first, again, other)]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]


def test_every_step_and_micro_batch_has_noise_of_its_own():
    draws = [
        torch.rand(4, generator=generator(0, *place)) for place in [(0, 0), (0, 1), (1, 0), (0,), (00, 10)]
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    assert torch.equal(torch.rand(4, generator=generator(0, 0, 1)), draws[1])


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_change_nothing(kit, size, accumulate):
    """T20: modalities of unequal and varying counts: a mean of means would differ."""
    ways = []
    for name, rows, parts in (("whole", 8, 1), ("parts", size, accumulate)):
        run = kit.run(
            name,
            module=kit.network(torch.float64),
            objective=kit.Columns(noise=0.0, above=0.5),
            batches=kit.Rows(kit.table(dtype=torch.float64), rows),
            steps=4,
            accumulate=parts,
            weights={"image": 0.3},
        )
        Trainer(run).fit()
        ways.append((run, [record["loss"] for record in records(run)]))
    (whole, losses), (parts, same) = ways
    assert same == pytest.approx(losses, rel=1e-12)
    for value, other in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 4])
def test_micro_batches_at_once_are_the_same_as_one_after_the_other(kit, threads):
    weights, losses = [], []
    before = torch.get_num_threads()
    for name, at_once in (("apart", 1), ("together", threads), ("again", threads)):
        run = kit.run(
            name,
            module=kit.network(torch.float64),
            objective=kit.Columns(noise=0.5, above=0.5),
            batches=kit.Rows(kit.table(dtype=torch.float64), 2),
            steps=4,
            accumulate=4,
            threads=at_once,
        )
        Trainer(run).fit()
        weights.append([weight.detach() for weight in run.module.parameters()])
        losses.append([record["loss"] for record in records(run)])
    assert torch.get_num_threads() == before
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] == losses[1]
    for apart, together, again in zip(*weights, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-12)
        assert torch.equal(together, again)


def test_an_error_of_one_thread_ends_the_run(kit):
    class Broken(kit.Columns):
        def __call__(self, module, batch, rng):
            raise RuntimeError("a bad batch")

    with pytest.raises(RuntimeError, match="a bad batch"):
        Trainer(kit.run(objective=Broken(), accumulate=2, threads=2)).fit()


def test_counts_are_asked_with_the_noise_of_the_forward_pass(kit):
    seen: list = []

    class Watched(kit.Columns):
        def part(self, index, count, step):
            seen.append(("part", index, count))
            return self

        def counts(self, batch, rng):
            found = super().counts(batch, rng)
            seen.append(("counts", found))
            return found

        def __call__(self, module, batch, rng):
            losses = super().__call__(module, batch, rng)
            seen.append(("call", losses.counts))
            return losses

    Trainer(kit.run(objective=Watched(noise=0.5), steps=2, accumulate=3)).fit()
    parts, counts, calls = (
        [entry[1:] for entry in seen if entry[0] == kind] for kind in ("part", "counts", "call")
    )
    assert counts == calls
    assert len({tuple(map(int, entry[0].values())) for entry in counts}) > 1
    assert parts == [(0, 3), (1, 3), (2, 3)] * 2


def test_threads_need_as_many_micro_batches(kit):
    with pytest.raises(ValueError, match="threads=2 for accumulate=1"):
        kit.run(threads=2)


def test_several_micro_batches_need_an_objective_that_can_be_divided(kit):
    with pytest.raises(ValueError, match="needs an objective with part and counts"):
        kit.run(objective=lambda module, batch, rng: None, accumulate=2)


def test_a_modality_without_a_token_adds_nothing(kit):
    """T29: a modality that no step has."""

    class TextOnly(kit.Columns):
        def live(self, batch, rng):
            return {name: where & (name == "text") for name, where in super().live(batch, rng).items()}

    run = kit.run(objective=TextOnly(), clip=None)
    Trainer(run).fit()
    assert all(value.isfinite().all() for value in run.module.parameters())
    assert all("loss/image" not in record and record["loss"] > 0 for record in records(run))


def test_weights_scale_a_modality_and_an_unknown_name_is_refused(kit):
    losses = {}
    for weight in (1.0, 0.25):
        run = kit.run(f"w{weight}", weights={"image": weight}, steps=1)
        Trainer(run).fit()
        losses[weight] = records(run)[0]
    assert losses[0.25]["loss"] == pytest.approx(losses[1.0]["loss/text"] + 0.25 * losses[1.0]["loss/image"])
    assert losses[0.25]["grad_norm"] != losses[1.0]["grad_norm"]
    with pytest.raises(ValueError, match="sound"):
        Trainer(kit.run("unknown", weights={"sound": 1.0})).fit()


def test_hooks_and_validation_keep_their_rhythm_and_see_the_averaged_weights(kit):
    seen = []

    def hook(moment):
        seen.append((moment.step, moment.module.training, torch.is_grad_enabled()))
        held = {name: value.clone() for name, value in moment.module.named_parameters()}
        assert all(torch.equal(held[name], value) for name, value in trainer.average.shadow.items())
        moment.log({"score": moment.step / moment.steps})

    held_out = [kit.table(8), kit.table(4)]
    plan = Validation(every=5, batches=held_out, num_batches=1)
    run = kit.run(steps=11, hooks=((4, hook), (11, lambda moment: seen.append("end"))), validation=plan)
    trainer = Trainer(run)
    trainer.fit()
    assert seen == [(4, False, False), (8, False, False), (11, False, False), "end"]
    assert [record["score"] for record in records(run, "score")] == [4 / 11, 8 / 11, 1.0]
    found = records(run, "validation/text")
    assert [record["step"] for record in found] == [5, 10, 11]
    with torch.no_grad():
        losses = run.objective(run.module, held_out[0], generator(run.seed, 0))
    assert found[-1]["validation/text"] == pytest.approx(float(losses.sums["text"] / losses.counts["text"]))


def test_hooks_do_not_disturb_the_training(kit):
    plain, hooked = kit.run("plain"), kit.run("hooked", hooks=((3, lambda moment: None),))
    for run in (plain, hooked):
        Trainer(run).fit()
    assert [record["loss"] for record in records(plain)] == [record["loss"] for record in records(hooked)]


def test_the_learning_rate_follows_its_course(kit):
    run = kit.run(optimizer=AdamW(lr=0.5), learning_rate=Constant(warmup=4), steps=6)
    Trainer(run).fit()
    assert [record["lr"] for record in records(run)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_the_gradient_is_clipped(kit):
    optimizer = AdamW(lr=1e-3, eps=1.0, weight_decay=0.0)
    runs = [kit.run(f"{clip}", clip=clip, optimizer=optimizer, steps=1, ema=None) for clip in (1e-3, None)]
    moved = []
    for run in runs:
        before = nn.utils.parameters_to_vector(run.module.parameters()).detach().clone()
        Trainer(run).fit()
        moved.append((nn.utils.parameters_to_vector(run.module.parameters()) - before).norm())
    assert records(runs[0])[0]["grad_norm"] == records(runs[1])[0]["grad_norm"] > 0.1
    assert moved[0] < 0.1 * moved[1]


def test_autocast_keeps_the_weights_in_float32(kit):
    kinds = set()

    class Seen(kit.Columns):
        def __call__(self, module, batch, rng):
            kinds.add(module(batch).dtype)
            return super().__call__(module, batch, rng)

    run = kit.run(objective=Seen(), precision=BFloat16Autocast(), steps=40, log_every=10)
    trainer = Trainer(run)
    trainer.fit()
    assert kinds == {torch.bfloat16}
    assert {value.dtype for value in run.module.parameters()} == {torch.float32}
    assert {v.dtype for state in trainer.optimizer.state.values() for v in state.values()} == {torch.float32}
    assert records(run)[-1]["loss"] < records(run)[0]["loss"]


def test_a_source_that_ends_is_iterated_anew_and_an_empty_one_is_refused(kit):
    run = kit.run(batches=kit.Epochs(kit.table(20), 8), steps=7)
    Trainer(run).fit()
    assert run.batches.place == 8
    with pytest.raises(ValueError, match="gave none"):
        Trainer(kit.run("empty", batches=kit.Epochs(kit.table(0), 8))).fit()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"threads": 0},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"clip": 0.0},
        {"hooks": ((0, print),)},
        {"validation": Validation(every=0, batches=[])},
    ],
)
def test_a_run_that_makes_no_sense_is_refused(kit, change):
    with pytest.raises(ValueError, match="must be"):
        kit.run(**change)


def test_the_run_is_written_beside_its_checkpoints(kit):
    run = kit.run()
    Trainer(run).fit()
    written = json.loads((run.folder / "run.json").read_text())
    assert written["optimizer"] == {
        "class": "AdamW",
        "lr": 0.01,
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "eps": 1e-8,
    }
    assert written["learning_rate"]["class"] == "WarmupCosine"
    assert written["folder"] == str(run.folder)
