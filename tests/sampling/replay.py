"""Recorded runs of published samplers: the stub they ran on, their random numbers, and how to replay them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Denoiser, Part, Rows
from mmdlm.sampling import Policy, Proposal, State, denoise

HERE = Path(__file__).parent.parent / "golden"


def golden() -> Path:
    """The folder of recorded runs: ours, or the one that MMDLM_GOLDEN names."""
    return Path(os.environ.get("MMDLM_GOLDEN", HERE))


@dataclass(frozen=True)
class Case:
    """One recorded run: its settings, the random numbers in the order they were used, what came out."""

    family: str
    name: str
    params: dict[str, Any]
    expected: dict[str, Any]
    noise: list[Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.name


def cases(family: str) -> list[Case]:
    """All runs in a family's folder."""
    folder = golden() / "samplers" / family
    noise = load_file(folder / "noise.safetensors")
    return [
        Case(
            family,
            entry["name"],
            entry["params"],
            entry["expected"],
            [noise[key] for key in sorted(noise) if key.startswith(f"{entry['name']}/")],
        )
        for entry in json.loads((folder / "cases.json").read_text())
    ]


class Stub:
    """logits[i] = scale * (sum over j of W[|i - j|, x_j] + B[i]), float64, for every row, all ids at once."""

    def __init__(
        self,
        name: str = "stub",
        *,
        mask: int,
        scale: float = 1.0,
        text: slice | None = None,
        image: slice | None = None,
    ) -> None:
        """`text`, `image`: the ids that may stand in them; without them all ids may."""
        tensors = load_file(golden() / "samplers" / f"{name}.safetensors")
        self.pairs, self.bias = tensors["W"].double(), tensors["B"].double()
        self.mask, self.scale, self.text, self.image = mask, scale, text, image
        self.calls: list[list[list[int]]] = []  # what it was shown

    def begin(self, canvas: Canvas) -> Stub:
        return self

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, L, V)."""
        place = torch.arange(tokens.shape[1])
        far = (place[:, None] - place[None]).abs()
        seen = self.pairs[far.unsqueeze(0), tokens.unsqueeze(1)]  # (B, L, L, V)
        return self.scale * (seen.sum(dim=2) + self.bias[: tokens.shape[1]])

    def shown(self, canvas: Canvas) -> Tensor:
        """(B, L): the ids that the network is shown."""
        return torch.where(canvas.masked, self.mask, canvas.tokens)

    def __call__(self, canvas: Canvas, rows: Rows, *, reduce=None):
        seen = self.shown(canvas)
        self.calls.append(seen.tolist())
        logits = self.logits(seen)
        pictures, all_ids = canvas.modality == IMAGE, slice(0, logits.shape[2])
        ranges = [(~pictures, self.text or all_ids), (pictures, self.image or all_ids)]
        asked = [(rows.where(where), ids) for where, ids in ranges]
        parts = [Part(r, ids, r.gather(logits)[:, ids]) for r, ids in asked if r.index.shape[0]]
        return parts if reduce is None else [reduce(part) for part in parts]


def text_canvas(
    tokens: Tensor, prompt: int, mask: int, *, given: bool = True, end: int | None = None
) -> Canvas:
    """Text: a prompt of `prompt` positions, then holes, up to `end`.

    Masks in the prompt are `given`, or they are holes of the same span.
    """
    batch, length = tokens.shape
    place = torch.arange(length)
    inside = (place >= prompt) & (place < (length if end is None else end))
    behind = inside.expand(batch, length) if given else tokens == mask
    return Canvas(
        tokens=tokens,
        modality=torch.full((batch, length), TEXT, dtype=torch.uint8),
        fillable=behind,
        masked=behind & (tokens == mask),
        position=place[None, :, None].expand(batch, length, 2),
        segment=torch.zeros(batch, length, dtype=torch.long),
        span=((place >= prompt) & given & (place < (length if end is None else end)))
        .long()
        .expand(batch, length),
    )


def plain(tokens: Tensor) -> Canvas:
    """Given text."""
    return text_canvas(tokens, tokens.shape[1], -1)


def canvas_with_image(
    tokens: Tensor, start: int, slots: int, mask: int, *, holes: slice | None = None, skip: int | None = None
) -> Canvas:
    """Rows with an image of `slots` places from column `start` on; its masks are holes.

    `holes`: text columns whose masks are holes too. `skip`: an id inside of the image that is structure.
    """
    batch, length = tokens.shape
    place = torch.arange(length)
    image = ((place >= start) & (place < start + slots)).expand(batch, length)
    if skip is not None:
        image = image & (tokens != skip)
    text = torch.zeros_like(image)
    if holes is not None:
        text[:, holes] = True
    span = torch.where(image, 1, torch.where(text, 0, -1))
    return Canvas(
        tokens=tokens,
        modality=torch.where(image, IMAGE, TEXT).to(torch.uint8),
        fillable=image | text,
        masked=(image | text) & (tokens == mask),
        position=place[None, :, None].expand(batch, length, 2),
        segment=torch.zeros(batch, length, dtype=torch.long),
        span=span,
    )


class Tape:
    """Recorded random numbers, handed out in their order."""

    def __init__(self, noise: list[Tensor]) -> None:
        self.left = list(noise)

    def next(self) -> Tensor:
        return self.left.pop(0)


def walk(denoiser: Denoiser, canvas: Canvas, policy: Policy, steps: int) -> Iterator[State]:
    """The states of a run. No id is forbidden: these samplers allow the mask."""
    return denoise(denoiser, canvas, policy=policy, steps=steps, mask=-1)


def shown(states: list[State], mask: int) -> list[list[list[int]]]:
    """The canvases of states, holes as masks; one that comes again is left out."""
    canvases = [torch.where(s.canvas.masked, mask, s.canvas.tokens).tolist() for s in states]
    return without_repeats(canvases)


def without_repeats(canvases: list) -> list:
    """A step that changes nothing is a forward for nothing, and ours does not make it."""
    return [each for number, each in enumerate(canvases) if number == 0 or each != canvases[number - 1]]


def proposal_of(state: State, part: Part, chosen: Tensor, logp: Tensor) -> Proposal:
    """A proposal of recorded choices (M,), with these log-probabilities (M,)."""
    canvas = state.canvas
    column = torch.zeros(canvas.shape, dtype=torch.float64)
    peak = part.logits.log_softmax(dim=1).amax(dim=1)
    return Proposal(
        tokens=part.rows.scatter(chosen + part.ids.start, canvas.tokens),
        logp=part.rows.scatter(logp, column),
        peak=part.rows.scatter(peak, column),
        valid=part.rows.scatter(part.rows.valid, torch.zeros(canvas.shape, dtype=torch.bool)),
    )
