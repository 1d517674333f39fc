"""Continuous batching: requests of all tasks join and leave a running batch, and get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Denoiser
from mmdlm.model import Predictor
from mmdlm.sampling import (
    Ancestral,
    Blocks,
    Bounded,
    Cached,
    Committed,
    Doubtful,
    Edited,
    Ended,
    Even,
    Fixed,
    Guided,
    LeftToRight,
    NegativeEntropy,
    Path,
    Peak,
    Planned,
    Policy,
    Random,
    Scale,
    Settled,
    Stable,
    State,
    Threshold,
    Unchanged,
    Uniform,
    Unmask,
    denoise,
    partners,
    resume,
)
from mmdlm.sampling.scale import During, Ramp

BLOCKS = Path(blocks=Blocks(3))
POLICIES: dict[str, Policy] = {
    "confidence": Unmask(choice_temperature=2.0),
    "threshold": Unmask(Fixed(1), Peak(), Threshold(0.5)),
    "threshold, in blocks": Unmask(Even(), Peak(), Threshold(0.3), plan=BLOCKS, temperature=0.0),
    "bounded": Unmask(Fixed(1), NegativeEntropy(), Bounded(2.0)),
    "stable": Unmask(Fixed(1), Peak(), Stable(0.1, 0.5, 2)),
    "text first": Unmask(order=Random(), plan=Path(text=(0.0, 0.5), image=(0.5, 1.0))),
    "edited": Unmask(Even(), rule=Threshold(0.3), plan=BLOCKS, temperature=0.0, revision=Edited(0.2, 2)),
    "planned": Unmask(revision=Planned(2.0)),
    "uniform": Unmask(Fixed(1), NegativeEntropy(), Bounded(1.0), revision=Uniform((0, 6), (8, 19))),
    "ended": Ended(Unmask(Fixed(1), LeftToRight()), 5),
    "settled": Settled(Unmask(Fixed(1), NegativeEntropy()), nats=1.2),
    "ancestral": Ancestral(),
    "ancestral, noised again": Ancestral(remask=Doubtful(0.8)),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@dataclass(frozen=True)
class Request:
    """A row, its steps and its seed, and the tick of the server's clock at which it comes."""

    canvas: Canvas
    steps: int
    seed: int
    tick: int


def requests(kit) -> list[Request]:
    """Texts, pictures, captions and pairs, of many sizes; the first tick brings three at once."""
    return [
        Request(kit.pair(5, 6, seed=1), 7, 3, 0),  # a pair
        Request(kit.pair(4, 8, given=(1, 2, 3, 4), seed=2), 5, 3, 1),  # a picture of a text
        Request(kit.pair(9, 0, seed=3), 9, 4, 1),  # a text alone
        Request(kit.pair(6, 4, given=(8, 9, 10, 11), seed=4), 6, 5, 1),  # a caption
        Request(kit.pair(2, 12, given=(5, 9), seed=5), 8, 3, 2),  # a pair with known codes
        Request(kit.pair(0, 3, seed=6), 2, 6, 5),  # a small picture, when nearly all others have left
        Request(kit.pair(8, 2, given=(2,), seed=7), 8, 3, 30),  # a text with a known word, after a pause
    ]


def walk(denoiser: Denoiser, request: Request, number: int, policy: Policy, mask: int) -> Iterator[State]:
    """The request alone."""
    one = {"steps": request.steps, "seeds": request.seed, "samples": number}
    return denoise(denoiser, request.canvas, policy=policy, mask=mask, **one)


def serve(denoiser: Denoiser, asked: list[Request], policy: Policy, mask: int) -> dict[int, Tensor]:
    """One step at each tick: who has come joins, in front or behind, and who is done leaves.

    The tokens of every request, by its number, which is its sample's.
    """
    running: State | None = None
    finished: dict[int, Tensor] = {}
    most = 0
    for tick in range(60):
        for number, request in enumerate(asked):
            if request.tick == tick:
                new = next(walk(denoiser, request, number, policy, mask))
                if running is None:
                    running = new
                else:
                    running = State.join(running, new) if number % 2 else State.join(new, running)
        if running is None:
            continue
        states = resume(denoiser, running, policy=policy, mask=mask)
        next(states)
        running = next(states)
        most = max(most, len(running.done))
        for row in running.done.nonzero()[:, 0].tolist():
            number = int(running.sample[row])
            finished[number] = running.canvas.tokens[row, : asked[number].canvas.shape[1]]
        running = None if bool(running.done.all()) else running.select(~running.done)
    assert running is None
    assert most > 2  # or nothing was shown
    return finished


def check(
    denoiser: Denoiser, asked: list[Request], policy: Policy, mask: int, *, plain: Denoiser | None = None
) -> None:
    """What is served by the denoiser is what it, or the `plain` one, gives every request alone."""
    finished = serve(denoiser, asked, policy, mask)
    for number, request in enumerate(asked):
        *_, alone = walk(plain or denoiser, request, number, policy, mask)
        assert not bool((alone.canvas.masked & alone.initial).any())
        assert torch.equal(finished[number], alone.canvas.tokens[0]), f"request {number}"


@pytest.fixture(scope="module")
def model(kit) -> Predictor:
    return kit.lively(seed=2)


@every_policy
def test_requests_of_all_tasks_get_what_they_get_alone(kit, model, policy: Policy) -> None:
    check(model, requests(kit), policy, kit.mask)


@pytest.mark.parametrize("name", ["confidence", "stable", "text first", "edited", "ancestral"])
def test_and_so_they_do_under_guidance(kit, name: str) -> None:
    guided = Guided(kit.Fake(), partners(text=0.5, image=1.5), mask=kit.mask)
    check(guided, requests(kit), POLICIES[name], kit.mask)


@pytest.mark.parametrize("scale", [Ramp(0.0, 4.0), During(3.0, 0.0, 0.5)], ids=str)
def test_guidance_that_changes_on_the_way_goes_on_where_it_was(kit, scale: Scale) -> None:
    guided = Guided(kit.Fake(), partners(text=scale, image=scale), mask=kit.mask)
    check(guided, requests(kit), Unmask(Fixed(1), Peak()), kit.mask)


@pytest.mark.parametrize("cache", [Unchanged(), Committed()], ids=str)
@pytest.mark.parametrize("name", ["threshold, in blocks", "ancestral"])
def test_exact_caches_are_exact_in_a_running_batch(kit, model, cache, name: str) -> None:
    """Served with a cache, block-causal, against lone runs without one."""
    asked = [
        Request(each.canvas.replace(block=torch.arange(each.canvas.shape[1])[None] // 4), *rest)
        for each in requests(kit)
        for rest in [(each.steps, each.seed, each.tick)]
    ]
    check(Cached(model, cache), asked, POLICIES[name], kit.mask, plain=model)
