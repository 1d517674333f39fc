"""What filling many places at once costs: total variation against forwards, of every rule on known laws.

A program: `python tests/sampling/print_laws.py` prints the curves. No chance is in them but that of orders
drawn at random: the law of a policy's samples is pushed through its steps, over all half-filled rows. Only
the rule that remembers what the model said before is measured on samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from oracles import MASK, WORLDS, Exact, World, all_holes, counts_of, every, law_of, written
from torch import Tensor

from mmdlm.diffusion.schedule import Cosine
from mmdlm.sampling import (
    Ancestral,
    Bounded,
    EntropyBelow,
    Even,
    Factor,
    Fixed,
    Halton,
    NegativeEntropy,
    Order,
    Path,
    Peak,
    Policy,
    Quota,
    Random,
    Rule,
    Scheduled,
    Stable,
    State,
    Step,
    Threshold,
    Unmask,
    denoise,
)

ONE_RUN = Path(together=True)  # text and image share one quota


@dataclass(frozen=True)
class Point:
    """One setting of a curve."""

    setting: str
    policy: Policy
    steps: int


@dataclass(frozen=True)
class Found:
    """The law of the samples, in the order of the outcomes, and the forwards of a row on average."""

    law: Tensor
    forwards: float


def curves(world: World) -> dict[str, list[Point]]:
    """The rules that fill several places at a step, each from one place at a step to all at once."""
    n = len(world.modality)

    def ruled(rules: Sequence[Rule], order: Order) -> list[Point]:
        settings = [str(rule).partition("(")[2][:-1] for rule in rules]
        policies = [Unmask(Fixed(1), order, rule, plan=ONE_RUN) for rule in rules]
        return [Point(setting, policy, n) for setting, policy in zip(settings, policies, strict=True)]

    def by_clock(quota: Quota, order: Order) -> list[Point]:
        policy = Unmask(quota, order, plan=ONE_RUN)
        return [Point(f"steps={steps}", policy, steps) for steps in range(n, 0, -1)]

    return {
        "threshold": ruled([Threshold(p) for p in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 1e-9)], Peak()),
        "entropy below": ruled([EntropyBelow(h) for h in (0.0, 0.2, 0.4, 0.6, 0.8, 9.0)], Peak()),
        "factor": ruled([Factor(f) for f in (1e-9, 0.25, 0.5, 1.0, 1.5, 2.0, 9.0)], Peak()),
        "bounded": ruled([Bounded(h) for h in (0.0, 0.2, 0.4, 0.8, 1.6, 9.0)], NegativeEntropy()),
        "even, surest first": by_clock(Even(), Peak()),
        "even, at random": by_clock(Even(), Random()),
        "even, spread": by_clock(Even(), Halton(world.grid)),
        "cosine, surest first": by_clock(Scheduled(Cosine()), Peak()),
        "ancestral": [Point(f"steps={2**k}", Ancestral(), 2**k) for k in range(6, -1, -1)],
    }


def stable(world: World) -> list[Point]:
    """The rule that remembers; its law is that of samples."""
    n = len(world.modality)
    rules = [Stable(1.0, 0.0), Stable(0.9, 0.01), Stable(0.8, 0.1), Stable(0.5, 1.0, 1), Stable(0.0, 99.0, 1)]
    return [Point(str(rule)[7:-1], Unmask(Fixed(1), Peak(), rule, plan=ONE_RUN), n) for rule in rules]


def pushed(point: Point, world: World, *, draws: int = 1) -> Found:
    """The exact law of a policy's samples, where it looks at the canvas and the step alone.

    What it writes must not depend on what it drew; where it depends on chance, that is averaged over `draws`
    of it.
    """
    states = every(world.size + 1, len(world.modality))  # the last value is a hole
    mass, forwards = torch.zeros(len(states), dtype=torch.float64), 0.0
    mass[-1] = 1.0
    for step in range(point.steps):
        reached = mass.nonzero().squeeze(1)
        moved = torch.zeros(len(reached), len(states), dtype=torch.float64)
        for draw in range(draws):
            moved += _moved(point, world, states, reached, step=step, first=draw * len(states)) / draws
        stays = moved.gather(1, reached.unsqueeze(1)).squeeze(1)  # nothing asked: no forward
        forwards += float((mass[reached] * (1.0 - stays)).sum())
        mass = mass[reached] @ moved
    law = mass[(states < world.size).all(dim=1)]
    assert torch.isclose(law.sum(), torch.ones(()).double()), "something was left unfilled"
    return Found(law, forwards)


def _moved(point: Point, world: World, states: Tensor, reached: Tensor, *, step: int, first: int) -> Tensor:
    """(R, S): the chance that a step takes each of the `reached` states to each state."""
    values = states[reached].clamp(max=world.size - 1)
    holes = states[reached] == world.size
    samples = first + torch.arange(len(reached))
    run = {"policy": point.policy, "steps": point.steps, "samples": samples, "mask": MASK}
    state = replace(
        next(denoise(Exact(world), all_holes(world, len(reached)), **run)),
        canvas=written(world, values, holes),
        step=torch.full_like(samples, step),
        done=~holes.any(dim=1),
    )
    chance = _chance(point.policy, world, state).unsqueeze(2)
    stands = torch.nn.functional.one_hot(states[reached], world.size + 1).double()
    drawn = torch.nn.functional.pad(world.laws(values, holes), (0, 1))
    becomes = chance * drawn + (1.0 - chance) * stands  # (R, n, size + 1)
    moved = torch.ones(len(reached), len(states), dtype=torch.float64)
    for place, value in enumerate(states.T):
        moved *= becomes[:, place].index_select(1, value)
    return moved


def _chance(policy: Policy, world: World, state: State) -> Tensor:
    """(R, n) float64: that each place is written, independently of the others."""
    if isinstance(policy, Ancestral):
        return torch.where(state.open, policy.chances(state)[0], 0.0)
    proposal = policy.propose(state, Exact(world)(state.canvas, policy.ask(state)))
    move = policy.move(Step(state, proposal))
    return (move.write & proposal.valid & state.open).double()


def sampled(point: Point, world: World, *, rows: int) -> Found:
    """The same from samples. A row has a forward where it is filled: elsewhere nothing of it was asked."""
    canvas, forwards = all_holes(world, rows), 0
    for state in denoise(Exact(world), canvas, policy=point.policy, steps=point.steps, mask=MASK):
        forwards += int((canvas.masked & ~state.canvas.masked).any(dim=1).sum())
        canvas = state.canvas
    return Found(counts_of(world, canvas) / rows, forwards / rows)


def variation(first: Tensor, second: Tensor) -> float:
    """The total variation distance of two laws."""
    return float((first - second).abs().sum() / 2)


def noise(law: Tensor, rows: int) -> float:
    """About the total variation between a law and that many samples of it."""
    return float((law * (1 - law) / rows * 2 / torch.pi).sqrt().sum() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=100, help="of orders at random, averaged")
    parser.add_argument("--rows", type=int, default=50_000, help="samples of a rule that remembers")
    options = parser.parse_args()
    for name, world in WORLDS.items():
        law, n = law_of(world), len(world.modality)
        print(f"\n{name}: {n} places of {world.size} values\n{'rule':22}{'setting':36}forwards  variation")
        for rule, points in curves(world).items():
            draws = options.draws if rule == "even, at random" else 1
            for point in points:
                found = pushed(point, world, draws=draws)
                print(f"{rule:22}{point.setting:36}{found.forwards:8.2f}{variation(found.law, law):11.4f}")
        for point in stable(world):
            found = sampled(point, world, rows=options.rows)
            print(
                f"{'stable':22}{point.setting:36}{found.forwards:8.2f}{variation(found.law, law):11.4f}",
                end="",
            )
            print(f" (of which {noise(law, options.rows):.4f} is noise)")


if __name__ == "__main__":
    main()
