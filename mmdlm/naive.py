"""Loops of published samplers and a training loss: what `infer/benchmark.py` compares ours with.

They are written from descriptions of the released programs, with what they spend and what they do not see:
every forward takes all positions, logits are over the whole vocabulary, numbers are float64 where theirs are,
and choices are made row by row in Python. Defects that would only change tokens are left out, so that both
sides can give the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.model import Memory, Predictor
from tokenizers_mm import prepare_torchvision

__all__ = [
    "FullLogits",
    "diffusers_llada2",
    "even",
    "fast_dllm",
    "fast_dllm_dual",
    "full_vocabulary_losses",
    "llada",
    "llada2",
    "maskgit",
    "mmada",
    "mmada_parallel",
    "noisy",
    "only",
    "write_sure",
    "write_words",
]


class FullLogits:
    """A model as released programs call it: ids (B, n) in, logits (B, n, V) of every position out.

    n is the length of the canvas that it is made for, or less: then its first columns. A hole is where the
    mask id stands, and the mask's own logits are -inf.
    """

    def __init__(self, model: Predictor, canvas: Canvas) -> None:
        self.model, self.canvas, self.mask = model, canvas, model.mask
        self.text, self.image = model.text, model.image

    def __call__(self, x: Tensor) -> Tensor:
        return self._logits(self.model.network.features(self._shown(x)))

    def remember(self, x: Tensor) -> Memory:
        """Room for the keys and values of all positions."""
        return self.model.network.remember(self._shown(x))

    def at(self, x: Tensor, index: Tensor, memory: Memory) -> Tensor:
        """(B, M, V) of the columns `index` (B, M), which alone are computed, their keys and values written
        over those in `memory`.
        """
        self.model.network.features_at(self._shown(x), index, memory)
        return self._logits(Memory.rows(memory.features, index))

    def holes(self, modality: int) -> Tensor:
        """(n,) long: the columns of the canvas that are to be filled."""
        canvas = self.canvas
        return (canvas.masked & canvas.fillable & (canvas.modality == modality))[0].nonzero().squeeze(1)

    def _shown(self, x: Tensor) -> Canvas:
        masked = x == self.mask
        columns = {"tokens": x, "masked": masked, "fillable": masked}
        for column in fields(Canvas):
            value = getattr(self.canvas, column.name)
            if column.name not in columns and value is not None:
                columns[column.name] = value[:1, : x.shape[1]].expand(*x.shape, *value.shape[2:])
        return Canvas(**columns)

    def _logits(self, features: Tensor) -> Tensor:
        size = self.model.config.vocab_size
        logits = self.model.network.logits(features.flatten(0, 1), slice(0, size)).unflatten(
            0, features.shape[:2]
        )
        logits[..., self.mask] = -torch.inf
        return logits


def full_vocabulary_losses(
    model: Predictor, batch: Canvas, *, everywhere: bool = False, restricted: bool = False
) -> Tensor:
    """The loss of a padded batch as LLaDA and MMaDA train: every logit of every position, in float32.

    `batch` holds the true ids in `tokens`, the noised places in `masked` and what each counts in `level`. The
    sum over the modalities of weighted cross-entropies by fillable position. LLaDA takes the softmax where
    the masks are; MMaDA `everywhere`, with the target of the others ignored. `restricted` forbids the ids of
    the other modality, which those programs do not: to compare with what does. arXiv:2502.09992,
    arXiv:2505.15809.
    """
    assert batch.level is not None
    features = model.network.features(batch)
    logits = model.network.logits(features.flatten(0, 1), slice(0, model.config.vocab_size))
    logits = logits.unflatten(0, batch.shape)
    if restricted:
        for modality, ids in ((TEXT, model.text), (IMAGE, model.image)):
            legal = torch.zeros(logits.shape[-1], dtype=torch.bool)
            legal[ids] = True
            there = (batch.modality == modality).unsqueeze(2)
            logits = logits.masked_fill(there & ~legal, -torch.inf)
    if everywhere:
        targets = batch.tokens.masked_fill(~batch.masked, -100)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        losses = losses.unflatten(0, batch.shape)[batch.masked]
    else:
        losses = F.cross_entropy(logits[batch.masked], batch.tokens[batch.masked], reduction="none")
    losses = losses * batch.level[batch.masked]
    total = torch.zeros(())
    for modality in (TEXT, IMAGE):
        count = (batch.fillable & (batch.modality == modality)).sum()
        total = total + losses[batch.modality[batch.masked] == modality].sum() / count
    return total


def llada(
    model: FullLogits,
    x: Tensor,
    *,
    block: int,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LLaDA's `generate`: `steps` in all, evenly over blocks, even numbers of the surest draws a step.

    Draws by Gumbel noise in float64 over the whole vocabulary; the probabilities that rank them are not
    tempered. x (B, L) holds the mask id at holes, of text, at its end. arXiv:2502.09992.
    """
    x, length = x.clone(), x.shape[1]
    first = int(model.holes(TEXT)[0])
    each = steps // ((length - first) // block)
    for end in range(first + block, length + 1, block):
        numbers = even((x[:, end - block : end] == model.mask).sum(dim=1), each)
        for step in range(each):
            logits = only(model(x), model.text)
            masked = x == model.mask
            tokens = torch.where(masked, noisy(logits, temperature, generator).argmax(dim=2), x)
            sure = logits.softmax(dim=2).gather(2, tokens.unsqueeze(2)).squeeze(2)
            sure[:, end:] = -torch.inf
            sure = torch.where(masked, sure, -torch.inf)
            for row in range(len(x)):
                chosen = sure[row].topk(int(numbers[row, step])).indices
                x[row, chosen] = tokens[row, chosen]
    return x


def fast_dllm(model: FullLogits, x: Tensor, *, block: int, threshold: float) -> Tensor:
    """Fast-dLLM's `generate`: the surest token of the block and all above a threshold (arXiv:2505.22618)."""
    x, length = x.clone(), x.shape[1]
    for end in range(int(model.holes(TEXT)[0]) + block, length + 1, block):
        while bool((x[:, :end] == model.mask).any()):
            logits = only(model(x), model.text)
            open_ = (x == model.mask) & (torch.arange(length) < end)
            write_sure(logits, x, open_, threshold)
    return x


def fast_dllm_dual(model: FullLogits, x: Tensor, *, block: int, threshold: float) -> Tensor:
    """The same with the dual cache: a forward of everything a block, then of the block's positions alone.

    A block that the first forward fills costs one more, as released.
    """
    x, length = x.clone(), x.shape[1]
    columns = torch.arange(length).expand(x.shape)
    for end in range(int(model.holes(TEXT)[0]) + block, length + 1, block):
        memory, inside = model.remember(x), columns[:, end - block : end]
        logits = only(model.at(x, columns, memory), model.text)
        write_sure(logits, x, (x == model.mask) & (columns < end), threshold)
        part = x[:, end - block : end]
        while True:
            logits = only(model.at(x, inside, memory), model.text)
            write_sure(logits, part, part == model.mask, threshold)
            if not bool((part == model.mask).any()):
                break
    return x


def llada2(model: FullLogits, x: Tensor, *, block: int, steps: int, threshold: float) -> Tensor:
    """LLaDA2 as diffusers' pipeline has it: every step forwards all up to the end of the block.

    `steps` a block. All above the threshold, or at least the step's even number; greedy; no edits, no early
    stop. arXiv:2512.15745.
    """
    x, numbers = x.clone(), even(torch.tensor([block]), steps)[0]
    for end in range(int(model.holes(TEXT)[0]) + block, x.shape[1] + 1, block):
        part = x[:, end - block : end]
        for step in range(steps):
            open_ = part == model.mask
            if not bool(open_.any()):
                break
            logits = only(model(x[:, :end]), model.text)[:, -block:]
            sure, tokens = logits.softmax(dim=2).max(dim=2)
            sure = torch.where(open_, sure, -torch.inf)
            for row in range(len(x)):
                chosen = sure[row] > threshold
                if int(chosen.sum()) < int(numbers[step]):
                    least = min(int(numbers[step]), int(open_[row].sum()))
                    chosen[sure[row].topk(least).indices] = True
                part[row, chosen] = tokens[row, chosen]
    return x


def diffusers_llada2(model: FullLogits, x: Tensor, *, block: int, steps: int, threshold: float) -> Tensor:
    """The same by diffusers' own pipeline and scheduler."""
    prepare_torchvision()
    from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline
    from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler

    def answer(x: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=only(model(x), model.text))

    pipeline = LLaDA2Pipeline(answer, BlockRefinementScheduler(block_length=block))
    pipeline.set_progress_bar_config(disable=True)
    first = int(model.holes(TEXT)[0])
    tokens, _ = pipeline(
        input_ids=cast(torch.LongTensor, x[:, :first]),
        gen_length=x.shape[1] - first,
        block_length=block,
        num_inference_steps=steps,
        temperature=0.0,
        threshold=threshold,
        editing_threshold=None,
        eos_early_stop=False,
        mask_token_id=model.mask,
        output_type="seq",
        return_dict=False,
    )
    return torch.cat([x[:, :first], tokens], dim=1)


def mmada(
    model: FullLogits,
    x: Tensor,
    free: Tensor,
    *,
    steps: int,
    scale: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """MMaDA's pictures: MaskGIT with a cosine schedule, guided by `free`, in one batch with x (1, L).

    (1 + scale) c - scale u on all logits, only then the codes. Without a generator the most probable codes
    are taken, and no noise is on the choice.
    """
    x, free, image = x.clone(), free.clone(), model.holes(IMAGE)
    for step in range(1, steps + 1):
        given, without = model(torch.cat([x, free])).chunk(2)
        logits = (1 + scale) * given - scale * without
        logits = logits[:, image, model.image]
        x[:, image] = maskgit(logits, x[:, image], step / steps, model, generator)
        free[:, image] = x[:, image]
    return x


def mmada_parallel(
    model: FullLogits,
    x: Tensor,
    prefixes: Sequence[tuple[Tensor, float]],
    *,
    steps: int,
    image_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """MMaDA-Parallel: text at every step, the image at some of the last three quarters; one row at a time.

    At these two more full forwards, each with another prefix (1, n) and a scale: c + sum of s (c - u).
    arXiv:2511.09611. The image goes by its own clock, and no code is left to chance; both as ours.
    """
    text, image = model.holes(TEXT), model.holes(IMAGE)
    numbers = even(torch.tensor([len(text)]), steps)[0]
    ticks = [-(-steps * (image_steps + 3 * n) // (4 * image_steps)) for n in range(1, image_steps + 1)]
    x = x.clone()
    for step in range(1, steps + 1):
        logits = model(x)
        words, guided = logits[:, text, :], None
        if step in ticks:
            guided = logits[:, image]
            for prefix, scale in prefixes:
                other = torch.cat([prefix, x[:, prefix.shape[1] :]], dim=1)
                guided = guided + scale * (logits[:, image] - model(other)[:, image])
        write_words(model, x, only(words, model.text), int(numbers[step - 1]), generator)
        if guided is not None:
            clock = (ticks.index(step) + 1) / image_steps
            codes = maskgit(guided[..., model.image], x[:, image], clock, model, generator)
            for place, code in zip(image.tolist(), codes[0], strict=True):
                x[0, place] = code.item()
    return x


def even(holes: Tensor, steps: int) -> Tensor:
    """(B, steps) long: `holes` (B,) shared out evenly, the remainder among the first."""
    return holes.unsqueeze(1) // steps + (torch.arange(steps) < holes.unsqueeze(1) % steps)


def only(logits: Tensor, ids: slice) -> Tensor:
    """`logits` with -inf outside of `ids`, in place."""
    logits[..., : ids.start] = -torch.inf
    logits[..., ids.stop :] = -torch.inf
    return logits


def noisy(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """exp(l) / (-log u)^T in float64: its largest is a draw from softmax(l / T)."""
    if temperature == 0.0:
        return logits
    u = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
    return logits.double().exp() / (-u.log()) ** temperature


def write_sure(logits: Tensor, x: Tensor, open_: Tensor, threshold: float) -> None:
    """Into x (B, n), where `open_`: the surest token of a row, and those that reach the threshold."""
    tokens = logits.argmax(dim=2)
    sure = logits.double().softmax(dim=2).gather(2, tokens.unsqueeze(2)).squeeze(2)
    sure = torch.where(open_, sure, -torch.inf)
    for row in range(len(x)):
        order = sure[row].topk(int(open_[row].sum())).indices
        for place in range(len(order)):
            if place and sure[row, order[place]] < threshold:
                break
            x[row, order[place]] = tokens[row, order[place]]


def write_words(
    model: FullLogits, x: Tensor, logits: Tensor, number: int, generator: torch.Generator | None
) -> None:
    """Into x (1, L): the `number` surest of the draws at the columns of text, whose logits these are."""
    tokens = noisy(logits, 0.0 if generator is None else 1.0, generator).argmax(dim=2)[0]
    law, found = logits.double().softmax(dim=2)[0], []
    for place, column in enumerate(model.holes(TEXT).tolist()):
        if x[0, column].item() == model.mask:
            token = int(tokens[place].item())
            found.append((law[place, token].item(), column, token))
    for _, column, token in sorted(found, reverse=True)[:number]:
        x[0, column] = token


def maskgit(
    logits: Tensor, now: Tensor, clock: float, model: FullLogits, generator: torch.Generator | None
) -> Tensor:
    """(1, n) ids: codes drawn where `now` (1, n) has holes, and the least sure of them holes again.

    So many stay holes as cos(pi clock / 2) says; Gumbel noise (1 - clock) is on the choice.
    """
    law = logits.softmax(dim=2)[0]
    drawn = law.argmax(dim=1) if generator is None else law.multinomial(1, generator=generator)[:, 0]
    sure = law.gather(1, drawn.unsqueeze(1))[:, 0].log()
    if generator is not None:
        u = torch.rand(sure.shape, generator=generator)
        sure = sure - (1.0 - clock) * (-u.log()).log()
    unknown = now[0] == model.mask
    sure = torch.where(unknown, sure, torch.inf)
    left = int(unknown.sum())
    keep = max(0, min(math.floor(len(sure) * math.cos(math.pi / 2 * clock) + 1e-9), left - 1))
    filled = torch.where(unknown, drawn + model.image.start, now[0])
    filled[sure.argsort()[:keep]] = model.mask
    return filled.unsqueeze(0)
