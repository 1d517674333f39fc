"""Our samplers against plain loops on the same weights, by turns: `python infer/benchmark.py --repeats 5`.

The loops are those of `mmdlm.contests`, written as published samplers are described, and diffusers' own
LLaDA2 pipeline. Printed are medians of runs by turns: seconds on the clock and their ratio, and the ratio of
CPU seconds, which other work on the machine changes less. Before them each side runs once without chance, and
agreement is the share of generated positions at which both hold the same token. The model is random, of 26
million parameters, half of them the table of 32 k text ids and 8 k codes.

  greedy, temperature       LLaDA: text in blocks, even numbers a step; at temperature 0 and 0.7
  threshold, dual           Fast-dLLM: all above a confidence, without a cache and with the dual one
  block, diffusers          LLaDA2, block-causal: our exact cache, against a loop and a pipeline without one
  image                     MMaDA: a guided picture in 18 steps
  joint, joint8             MMaDA-Parallel: text and picture, two branches of guidance; 1 and 8 pairs
  serving                   rows that join and leave a running batch, against one request after the other
  sampler, sampler-greedy   what is not the model's forward, of all the time; the bar is the most it may be

`training`, a group of its own, takes the same optimizer steps by both sides: pairs of captions of 8 to 64
tokens and pictures of 64 to 256 codes, packed and with logits where the loss is, against a padded batch and
all logits, as LLaDA and MMaDA train. Printed are how far losses and gradients are apart, tokens a second that
are no padding, the operations that such a step needs a second, and the most memory that a process takes
beyond its model (Linux).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from mmdlm.program import positive, prepare_process, run, seed

if TYPE_CHECKING:
    from mmdlm.contests import Contest, Share

# 32,000 text ids with `end` and 40,200 in all: products with odd numbers of columns are slower, on both sides
LARGE = {"num_text": 31_999, "num_codes": 8_192, "dim": 320, "depth": 10}
SMALL = {"num_text": 500, "num_codes": 64, "dim": 32, "depth": 2}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {"nargs": "?", "choices": ("sampling", "training"), "default": "sampling"}
    parser.add_argument("group", **groups, help="of rows (default: sampling)")
    parser.add_argument("--only", help="names of rows with commas between them (default: all)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each side (default: 5)")
    parser.add_argument("--threads", type=positive, default=2, help="of torch (default: 2)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, prompts and draws (default: 0)")
    parser.add_argument(
        "--depth", type=positive, help="layers; the head weighs more with fewer (default: 10)"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: what runs, not how fast")
    given = parser.parse_args(arguments)
    prepare_process()
    import torch

    from mmdlm.contests import ROWS, Kit, Share

    if given.group == "training" or given.only == "training":
        torch.set_num_threads(given.threads)
        return training(given)
    names = list(ROWS) if given.only is None else given.only.split(",")
    if not set(names) <= set(ROWS):
        raise ValueError(f"--only {given.only}: wanted some of {', '.join(ROWS)}, or training alone")
    torch.set_num_threads(given.threads)
    kit = Kit.make(**shape_of(given), seed=given.seed)
    size = kit.model.num_parameters() / 1e6
    depth, text, image = kit.model.config.depth, kit.model.text, kit.model.image
    print(
        f"{size:.1f} M parameters in {depth} layers, {text.stop - text.start} text ids, "
        f"{image.stop - image.start} codes; float32, {given.threads} threads, medians of {given.repeats}"
    )
    columns = {"ours s": 9, "naive s": 9, "ratio": 8, "of CPU": 8, "bar": 7, "aim": 7, "agreement": 11}
    print(f"{'row':<15}" + "".join(f"{title:>{width}}" for title, width in columns.items()))
    with torch.no_grad():
        for name in names:
            row = ROWS[name](kit)
            cells = share(row, given.repeats) if isinstance(row, Share) else race(row, given.repeats)
            print(f"{name:<15}" + "".join(cells), flush=True)


def shape_of(given: argparse.Namespace) -> dict[str, int]:
    """The model that is asked for."""
    shape = SMALL if given.small else LARGE
    return {**shape, "depth": given.depth or shape["depth"]}


def training(given: argparse.Namespace) -> None:
    """The tables of the training steps: all sides by turns."""
    from mmdlm.canvas import Canvas, efficiency, pack
    from mmdlm.contests_training import SIDES, Mix, TrainingContest, peak_memory

    mix = Mix(documents=4, row=512) if given.small else Mix()
    contest = TrainingContest(shape_of(given), mix, given.seed)
    documents = contest.draw()
    packed, padded = efficiency(pack(documents, mix.row)), efficiency(Canvas.concat(documents))
    print(
        f"{contest.model.num_parameters() / 1e6:.1f} M parameters; {mix.documents} documents a step, rows"
        f" without padding {packed:.1%} for us, {padded:.1%} for them; float32, {given.threads} threads,"
        f" medians of {given.repeats}"
    )
    loss, gradient = contest.difference(documents)
    print(f"difference of losses {loss:.1e}, of gradients {gradient:.1e}, with the same softmax")
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    for repeat in range(given.repeats + 1):
        documents = contest.draw()
        tokens = sum(document.shape[1] for document in documents)
        for side, measured in found.items():
            began = time.perf_counter(), time.process_time()
            contest.step(side, documents)
            seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            if repeat:  # the first one is slower
                measured.append((tokens / seconds, tokens / cpu, contest.flops(documents) / seconds / 1e9))
    middle = {side: [median(column) for column in zip(*found[side], strict=True)] for side in SIDES}
    build = partial(TrainingContest, shape_of(given), mix, given.seed)
    peaks = {side: peak_memory(build, side, given.threads) or 0 for side in SIDES}
    (bar, aim), (ours, our_cpu, our_flops) = contest.goal, middle["ours"]
    print(f"{'row':<15}{'ours':>9}{'theirs':>9}{'ratio':>8}{'of CPU':>9}{'bar':>7}{'aim':>7}")
    for side in SIDES[1:]:
        theirs, their_cpu, their_flops = middle[side]
        print(f"as {side} trains")
        ratios = f"{ours / theirs:>7.2f}x{our_cpu / their_cpu:>8.2f}x{bar:>6.1f}x{aim:>6.1f}x"
        print(f"{'tokens/s':<15}{ours:>9.0f}{theirs:>9.0f}{ratios}")
        print(f"{'needed GFLOP/s':<15}{our_flops:>9.1f}{their_flops:>9.1f}")
        if peaks[side]:
            mine, other = peaks["ours"] / 2**20, peaks[side] / 2**20
            part = f"{mine:>9.0f}{other:>9.0f}{mine / other:>8.1%}{'-':>9}{1 / bar:>7.0%}{1 / aim:>7.0%}"
            print(f"{'peak MiB':<15}{part}", flush=True)


def race(contest: Contest, repeats: int) -> Iterator[str]:
    """The row of a contest: both sides by turns."""
    heat = contest.temperature if contest.same_draws else 0.0
    same = (contest.ours(heat) == contest.theirs(heat))[contest.holes]
    sides: dict[Callable, list[tuple[float, float]]] = {contest.ours: [], contest.theirs: []}
    for _ in range(repeats):
        for side, found in sides.items():
            began = time.perf_counter(), time.process_time()
            side(contest.temperature)
            found.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    (ours, our_cpu), (theirs, their_cpu) = (map(median, zip(*found, strict=True)) for found in sides.values())
    theirs, cpu = theirs * contest.copies, their_cpu * contest.copies / our_cpu
    bar, aim = (f"{goal:.1f}x" for goal in contest.goal)
    yield f"{ours:>9.3f}{theirs:>9.3f}{theirs / ours:>7.2f}x{cpu:>7.2f}x{bar:>7}{aim:>7}"
    yield f"{same.double().mean():>11.4f}"


def share(row: Share, repeats: int) -> Iterator[str]:
    """The row of a share: the sampler's part of the time in the place of ours, all of it in theirs."""
    row.measure()
    measured = [row.measure() for _ in range(repeats)]
    part, whole = median(one for one, _ in measured), median(both for _, both in measured)
    found = median(one / both for one, both in measured)
    yield f"{part:>9.3f}{whole:>9.3f}{found:>8.1%}{'-':>8}{row.bar:>7.0%}{row.bar:>7.0%}{'-':>11}"


if __name__ == "__main__":
    run(main)
