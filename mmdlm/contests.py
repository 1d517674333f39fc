"""Who meets whom in `infer/benchmark.py`: our samplers, and plain loops on the same weights (`naive`)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Denoiser, Fill, Frame, Part, Predict, Rows, Run
from mmdlm.diffusion import Cosine
from mmdlm.model import Predictor, Transformer, TransformerConfig, initialise
from mmdlm.naive import (
    FullLogits,
    diffusers_llada2,
    fast_dllm,
    fast_dllm_dual,
    llada,
    llada2,
    mmada,
    mmada_parallel,
)
from mmdlm.sampling import (
    Approximate,
    Cached,
    Committed,
    Guided,
    Instead,
    Policy,
    Scheduled,
    State,
    Term,
    Unmask,
    Window,
    hide,
    partners,
    presets,
    resume,
    sample,
)
from tokenizers_mm import Vocab

__all__ = ["ROWS", "Contest", "Kit", "Share"]

_BLOCK, _THRESHOLD, _SCALE = 32, 0.9, 1.0  # positions; a confidence; of guidance
_PLAIN, _SHARP = 2.0, 9.0  # standard deviation of logits: flat enough to draw from, and sure of some


@dataclass(frozen=True)
class Contest:
    """The same generation by both sides; each maps a temperature to the tokens (B, L) that it came to."""

    goal: tuple[float, float]  # how many times as fast ours must be, and ought to be
    holes: Tensor  # (B, L) bool   where tokens are compared
    ours: Callable[[float], Tensor]
    theirs: Callable[[float], Tensor]
    temperature: float = 0.0  # at which both are timed; 0 draws nothing
    copies: int = 1  # timed runs of theirs for as many rows as one of ours
    same_draws: bool = False  # whether tokens are equal at that temperature, too


@dataclass(frozen=True)
class Kit:
    """A random model and what its runs share."""

    model: Predictor
    seed: int

    @staticmethod
    def make(*, num_text: int, num_codes: int, dim: int, depth: int, seed: int) -> Kit:
        """Weights from `seed`, with such queries that positions differ."""
        vocab = Vocab.build(num_text=num_text, num_codes=num_codes)
        config = TransformerConfig(
            vocab_size=vocab.size,
            text=(vocab.text.start, vocab.text.stop),
            image=(vocab.image.start, vocab.image.stop),
            mask=vocab.mask,
            dim=dim,
            depth=depth,
            num_heads=dim // 32,
            tied=True,
        )
        with torch.random.fork_rng(), torch.no_grad():
            network = Transformer(config)
            initialise(network, torch.Generator().manual_seed(seed))
            for name, weight in network.named_parameters():
                if name.endswith("q_norm.weight"):
                    weight.fill_(16.0)
        return Kit(Predictor(network).eval(), seed).spread(_PLAIN)

    def spread(self, deviation: float) -> Kit:
        """The same with logits of this standard deviation, by the weights of the last norm.

        Under a threshold a flat model, never sure, fills one hole a step, and a trained one more.
        """
        model = copy.deepcopy(self.model)
        weight = model.network.norm.weight
        with torch.no_grad():
            weight.fill_(deviation / (0.02 * len(weight) ** 0.5))  # rows of the table have 0.02
        return replace(self, model=model)

    def rng(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def canvas(self, *runs: tuple[int | tuple[int, int], int], batch: int = 1) -> Canvas:
        """Rows of runs: the length or the grid of each, and how many of its positions are given."""
        shapes = [Run(length=shape) if isinstance(shape, int) else Run(grid=shape) for shape, _ in runs]
        fills, rng = [], self.rng()
        for run, (_, given) in zip(shapes, runs, strict=True):
            legal = self.model.text if run.grid is None else self.model.image
            ids = torch.randint(legal.start, legal.stop - 1, (batch, run.size), generator=rng)
            fills.append(Fill(ids, (torch.arange(run.size) >= given).expand(batch, run.size)))
        return Frame(tuple(shapes)).canvas(fills, mask=self.model.mask)

    def fill(self, policy: Policy, canvas: Canvas, steps: int, denoiser: Denoiser | None = None) -> Tensor:
        """The tokens that our sampler comes to."""
        run = {"policy": policy, "steps": steps, "seeds": self.seed, "mask": self.model.mask}
        return sample(denoiser or self.model, canvas, **run).canvas.tokens


def greedy(kit: Kit, temperature: float = 0.0) -> Contest:
    """Against LLaDA."""
    canvas = kit.canvas((64 + 128, 64))
    full, steps = FullLogits(kit.model, canvas), 16

    def theirs(heat: float) -> Tensor:
        return llada(full, canvas.tokens, block=_BLOCK, steps=steps, temperature=heat, generator=kit.rng())

    def ours(heat: float) -> Tensor:
        return kit.fill(presets.llada(block=_BLOCK, temperature=heat), canvas, steps)

    goal = (2.5, 5.0) if temperature else (1.3, 2.0)
    return Contest(goal, canvas.masked, ours, theirs, temperature)


def threshold(kit: Kit, *, dual: bool = False) -> Contest:
    """Against Fast-dLLM, without a cache or with its dual one."""
    kit = kit.spread(_SHARP)
    canvas = kit.canvas((64 + 128, 64))
    full, policy = FullLogits(kit.model, canvas), presets.fast_dllm(block=_BLOCK, threshold=_THRESHOLD)
    model = Cached(kit.model, Approximate(Window(_BLOCK))) if dual else kit.model
    loop = fast_dllm_dual if dual else fast_dllm
    return Contest(
        (1.5, 2.0),
        canvas.masked,
        lambda _: kit.fill(policy, canvas, 128, model),
        lambda _: loop(full, canvas.tokens, block=_BLOCK, threshold=_THRESHOLD),
    )


def block(kit: Kit, loop: Callable[..., Tensor]) -> Contest:
    """The exact cache of committed blocks, against `llada2` or `diffusers_llada2`, which have none."""
    canvas, steps = kit.canvas((128 + 256, 128)), 8
    canvas = canvas.replace(block=(torch.arange(128 + 256) // _BLOCK).expand(1, -1))
    full, policy = FullLogits(kit.model, canvas), presets.llada2(block=_BLOCK)
    cached = Cached(kit.model, Committed())
    return Contest(
        (5.0, 8.0),
        canvas.masked,
        lambda _: kit.fill(policy, canvas, 256 // _BLOCK * steps, cached),
        lambda _: loop(full, canvas.tokens, block=_BLOCK, steps=steps, threshold=0.95),
    )


def image(kit: Kit) -> Contest:
    """A guided picture, against MMaDA."""
    canvas, steps = kit.canvas((64, 64), ((16, 16), 0)), 18
    full, free = FullLogits(kit.model, canvas), hide(canvas, TEXT, kit.model.mask).tokens
    guided = Guided(kit.model, partners(image=_SCALE), mask=kit.model.mask)

    def ours(heat: float) -> Tensor:
        return kit.fill(presets.maskgit(temperature=heat, choice_temperature=heat), canvas, steps, guided)

    def theirs(heat: float) -> Tensor:
        rng = kit.rng() if heat else None
        return mmada(full, canvas.tokens, free, steps=steps, scale=_SCALE, generator=rng)

    return Contest((1.3, 2.0), canvas.masked, ours, theirs, temperature=1.0)


def joint(kit: Kit, *, batch: int = 1) -> Contest:
    """Text and picture at once, two branches of guidance, against MMaDA-Parallel, which takes one row."""
    runs = (32, 32), ((8, 8), 64), (32, 0), ((8, 8), 0)  # an instruction and a picture are given
    canvas, mask = kit.canvas(*runs, batch=batch), kit.model.mask
    full, steps, image_steps = FullLogits(kit.model, canvas), 16, 8
    no_text = canvas.tokens[:, :96].clone()
    no_text[:, :32] = mask
    no_image = canvas.tokens[:, :96].clone()
    no_image[:, 32:] = mask
    terms = [Term(Instead(prefix), _SCALE, IMAGE) for prefix in (no_text, no_image)]
    guided = Guided(kit.model, terms, mask=mask, batched=batch == 1)

    def ours(heat: float) -> Tensor:
        policy = presets.mmada_parallel(image_steps=image_steps, image_temperature=heat)
        return kit.fill(replace(policy, temperature=heat), canvas, steps, guided)

    def theirs(heat: float) -> Tensor:
        rows = []
        for row in range(1 if heat else batch):
            prefixes = [(prefix[row : row + 1], _SCALE) for prefix in (no_text, no_image)]
            x, rng = canvas.tokens[row : row + 1], kit.rng() if heat else None
            rows.append(
                mmada_parallel(full, x, prefixes, steps=steps, image_steps=image_steps, generator=rng)
            )
        return torch.cat(rows)

    goal = (2.0, 4.0) if batch == 1 else (4.0, 8.0)
    return Contest(goal, canvas.masked, ours, theirs, temperature=1.0, copies=batch)


def serving(kit: Kit, *, num: int = 12, room: int = 8) -> Contest:
    """Texts, pictures and pairs that join and leave a running batch, against one request after the other."""
    shape, mask, policy = ((8, 8), 0), kit.model.mask, Unmask(Scheduled(Cosine()))
    text = kit.canvas((24, 8), shape)
    text = text.replace(fillable=text.fillable & (text.modality == TEXT))
    tasks = text, kit.canvas((24, 24), shape), kit.canvas((24, 0), shape)
    requests = [
        policy.begin(
            State.start(tasks[number % 3], steps=8 + 5 * number % 13, seeds=kit.seed, samples=number)
        )
        for number in range(num)
    ]

    def ours(_: float) -> Tensor:
        found = serve(kit.model, requests, policy=policy, mask=mask, room=room)
        return torch.stack([found[number] for number in range(num)])

    def alone(_: float) -> Tensor:
        last = [list(resume(kit.model, each, policy=policy, mask=mask))[-1] for each in requests]
        return torch.cat([state.canvas.tokens for state in last])

    holes = torch.cat([each.initial for each in requests])
    return Contest((1.5, 1.5), holes, ours, alone, temperature=1.0, same_draws=True)


def serve(
    model: Denoiser, requests: Sequence[State], *, policy: Policy, mask: int, room: int
) -> dict[int, Tensor]:
    """Tokens by sample: a row joins as soon as fewer than `room` are in the batch, and leaves when done."""
    waiting, running, found = list(requests), None, {}
    while waiting or running is not None:
        while waiting and (running is None or len(running.step) < room):
            running = waiting.pop(0) if running is None else State.join(running, waiting.pop(0))
        assert running is not None
        walk = resume(model, running, policy=policy, mask=mask)
        running = next(state for state in walk if bool(state.done.any()))
        done = running.done
        found |= zip(running.sample[done].tolist(), running.canvas.tokens[done], strict=True)
        running = None if bool(done.all()) else running.select(~done)
    return found


@dataclass(frozen=True)
class Share:
    """What the sampler takes beside the model."""

    bar: float  # the largest share of the time
    measure: Callable[[], tuple[float, float]]  # seconds outside of the model's forwards, seconds in all


class Timed:
    """A denoiser whose answers are timed."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.seconds = denoiser, 0.0

    def begin(self, canvas: Canvas) -> Predict:
        predict = self.denoiser.begin(canvas)

        def timed(canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]:
            began = time.perf_counter()
            parts = predict(canvas, rows)
            self.seconds += time.perf_counter() - began
            return parts

        return cast(Predict, timed)


def sampler(kit: Kit, temperature: float) -> Share:
    """Of LLaDA's sampler as ours."""
    canvas = kit.canvas((64 + 128, 64))
    policy = presets.llada(block=_BLOCK, temperature=temperature)

    def measure() -> tuple[float, float]:
        began, timed = time.perf_counter(), Timed(kit.model)
        kit.fill(policy, canvas, 16, timed)
        whole = time.perf_counter() - began
        return whole - timed.seconds, whole

    return Share(0.1, measure)


ROWS: dict[str, Callable[[Kit], Contest | Share]] = {
    "greedy": greedy,
    "temperature": lambda kit: greedy(kit, temperature=0.7),
    "threshold": threshold,
    "dual": lambda kit: threshold(kit, dual=True),
    "block": lambda kit: block(kit, llada2),
    "diffusers": lambda kit: block(kit, diffusers_llada2),
    "image": image,
    "joint": joint,
    "joint8": lambda kit: joint(kit, batch=8),
    "serving": serving,
    "sampler": lambda kit: sampler(kit, 0.7),
    "sampler-greedy": lambda kit: sampler(kit, 0.0),
}
