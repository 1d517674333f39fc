"""What an image tokenizer is worth: its fidelity and its codes' use, on one page. Knows no particular one."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.data import Scene, agree, read_images
from mmdlm.evaluate import KINDS, Rate, kind_of
from mmdlm.predictability import Predictability, Probe, predictability
from mmdlm.report import Page, sheet
from tokenizers_mm import ImageTokenizer, Report, RoundTrip, digit_counts, entropy, round_trip, to_uint8

__all__ = ["Digit", "TokenizerReport", "tokenizer_report"]

_AT_ONCE = 64  # pictures that are encoded together
_SHOWN, _WORST = 32, 8  # pictures on the page
_WIDE = 960  # pixels of the page's column
_FRAME = (150, 150, 160)  # around pictures: many have the page's white for their ground


@dataclass(frozen=True)
class Digit:
    """How one digit of a factorised code is used."""

    counts: tuple[int, ...]  # by level

    @property
    def used(self) -> int:
        return sum(count > 0 for count in self.counts)

    @property
    def bits(self) -> float:
        """Entropy of the levels' frequencies, at most log2 of their number."""
        return entropy(torch.tensor(self.counts))


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What was measured on held-out pictures."""

    figures: Report
    size: int  # codes that there are
    grid: tuple[int, int]
    unigram: float  # bits: entropy of the codes' frequencies in the held-out pictures themselves
    digits: tuple[Digit, ...]  # first digit fastest; () where codes have none
    read: dict[str, Rate]  # by kind of scene: read exactly after the round trip; {} where no scenes were told
    predictability: Predictability | None  # None: skipped

    @property
    def used(self) -> int:
        """Distinct codes seen."""
        return round(self.figures.usage * self.size)

    def basics(self) -> list[tuple[str, str]]:
        """Name and value, in words for people, of fidelity and of the use of the codes."""
        found, (height, width) = self.figures, self.grid
        rows = [
            ("pictures", f"{found.num_images:,}, each {height} x {width} codes"),
            ("PSNR", f"{found.psnr:.2f} dB"),
            ("SSIM", f"{found.ssim:.4f}"),
            ("codes used", f"{self.used:,} of {self.size:,} ({100 * found.usage:.1f} %)"),
            ("perplexity", f"{found.perplexity:.1f}"),
        ]
        return rows + [
            (f"digit {number}", f"{digit.used} of {levels} levels, {digit.bits:.2f} of {full:.2f} bits")
            for number, digit in enumerate(self.digits)
            for levels, full in [(len(digit.counts), math.log2(len(digit.counts)))]
        ]

    def guesses(self) -> list[tuple[str, float, float]]:
        """Guesses at a code: by what, bits per code, and their standard error (0: none is known)."""
        known = self.predictability
        plain = [
            ("all codes alike", math.log2(self.size), 0.0),
            ("frequencies in these very pictures (unigram entropy)", self.unigram, 0.0),
        ]
        if known is None:
            return plain
        return [
            *plain,
            ("frequencies in training pictures", known.frequency, 0.0),
            ("masked model (NELBO)", known.bits, known.error),
            ("masked model (NELBO) on training pictures", known.seen, 0.0),
        ]

    def __str__(self) -> str:
        read = [
            (f"read exactly, {kind}", f"{rate.right} of {rate.total}, {_share(rate)}")
            for kind, rate in self.read.items()
        ]
        bits = [(f"bits per code, {name}", _bits(*value)) for name, *value in self.guesses()]
        lines = [*self.basics(), *read, *bits, ("the masked model", self.small())]
        return "\n".join(f"{name}: {value}" for name, value in lines)

    def small(self) -> str:
        """Which masked model it was, and what it was trained on."""
        known = self.predictability
        if known is None:
            return "skipped: no steps were asked for"
        probe = known.probe
        shape = f"{known.parameters:,} parameters ({probe.depth} layers of width {probe.dim})"
        steps = f"{probe.steps:,} steps of {probe.batch} rows on {known.num_train:,} training pictures"
        return f"{shape}, {steps}, seed {probe.seed}; {probe.draws} noise levels a picture"


def tokenizer_report(
    tokenizer: ImageTokenizer,
    train_images: Tensor,
    held_out_images: Tensor,
    folder: Path,
    *,
    scenes: Sequence[Scene] = (),
    probe: Probe | None = Probe(),
) -> TokenizerReport:
    """Measure a tokenizer on held-out pictures, and leave a page with pictures in FOLDER/report.html.

    Pictures are (N, 3, H, W) float in [-1, 1], where the tokenizer is. `scenes` are what the held-out ones
    show, for the exact reader to be held against. The training pictures are for the probe alone; None skips
    it. Raises ValueError for no held-out pictures and for another number of scenes.
    """
    if len(scenes) not in (0, len(held_out_images)):
        raise ValueError(
            f"{len(scenes)} scenes for {len(held_out_images)} held-out pictures; wanted one each"
        )
    trip = round_trip(tokenizer, held_out_images)
    known, digits = None, tokenizer.digits
    if probe is not None:
        train = torch.cat([tokenizer.encode(part).cpu() for part in train_images.split(_AT_ONCE)])
        known = predictability(tokenizer, train, trip.codes, probe=probe, device=held_out_images.device)
    levels = [] if digits is None else digit_counts(trip.counts, digits)
    report = TokenizerReport(
        figures=trip.report(),
        size=tokenizer.size,
        grid=(trip.codes.shape[1], trip.codes.shape[2]),
        unigram=entropy(trip.counts),
        digits=tuple(Digit(tuple(counts.tolist())) for counts in levels),
        read=_read(scenes, trip.images) if scenes else {},
        predictability=known,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _page(report, held_out_images, trip).save(folder / "report.html")
    return report


def _read(scenes: Sequence[Scene], images: np.ndarray) -> dict[str, Rate]:
    marks: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for scene, seen in zip(scenes, read_images(images), strict=True):
        marks[kind_of(scene.description)].append(agree(scene.description, seen))
    return {kind: Rate(sum(some), len(some)) for kind, some in marks.items() if some}


def _page(report: TokenizerReport, images: Tensor, trip: RoundTrip) -> Page:
    page, count = Page("Image tokenizer"), report.grid[0] * report.grid[1]
    page.paragraph(
        "Measured on pictures held out from training. PSNR and SSIM are means over pictures; perplexity: so "
        "many equally frequent codes would be as hard to guess."
    )
    page.table(("figure", "value"), report.basics())
    if report.read:
        page.heading("Read after the round trip")
        page.paragraph(
            "Scenes whose objects, background and relations the exact reader finds in the output, by kind."
        )
        rows = [(kind, f"{rate.right} of {rate.total}", _share(rate)) for kind, rate in report.read.items()]
        page.table(("scenes", "read exactly", "share, 95 % interval"), rows)
    page.heading("Predictability")
    page.paragraph(
        "What a code costs under some guesses. The masked model's figure is an upper bound, its NELBO "
        "with the standard error. Of tokenizers that give pictures back equally well, the one whose pictures "
        "cost fewer bits leaves less for a larger model to learn."
    )
    guesses = [
        (name, _bits(bits, error), _bits(bits * count, error * count, digits=1))
        for name, bits, error in report.guesses()
    ]
    page.table(("a guess by", "bits per code", "bits per picture"), guesses)
    page.paragraph(f"The masked model: {report.small()}.")
    page.heading("Pictures")
    page.figure(
        _sheet(images, trip, range(min(_SHOWN, len(images))), columns=8), "originals, reconstructions below"
    )
    worst = trip.psnr.argsort()[:_WORST].tolist()
    told = ", ".join(f"{trip.psnr[number]:.1f}" for number in worst)
    page.figure(_sheet(images, trip, worst, columns=4), f"the worst by PSNR: {told} dB")
    page.heading("Use of the codes")
    page.drawing(_ranks(trip.counts))
    if report.digits:
        page.drawing(_levels(report.digits))
    return page


def _sheet(images: Tensor, trip: RoundTrip, numbers: Sequence[int], *, columns: int) -> Image.Image:
    """Originals, each above what its codes give."""
    originals = to_uint8(images[list(numbers)])
    height, width = originals.shape[1:3]
    factor = max(1, (_WIDE // columns - 8) // width)
    pairs = []
    for original, number in zip(originals, numbers, strict=True):
        pair = Image.new("RGB", (width * factor + 2, 2 * height * factor + 3), _FRAME)
        for row, array in enumerate((original, trip.images[number])):
            large = Image.fromarray(array).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            pair.paste(large, (1, 1 + row * (height * factor + 1)))
        pairs.append(pair)
    return sheet(pairs, columns=max(1, min(columns, _WIDE // (pairs[0].width + 6))), gap=6)


def _bits(bits: float, error: float, *, digits: int = 3) -> str:
    return f"{bits:,.{digits}f}" + (f" +- {error:,.{digits}f}" if error else "")


def _share(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


# drawings

_FILL, _INK, _GRID = "#0072b2", "#1e1e28", "#dcdce2"
_MIDDLE = 'text-anchor="middle"'
_LEFT, _TOP, _FIELD, _HIGH = 70, 40, 780, 220


def _ranks(counts: Tensor) -> str:
    """A histogram, both axes logarithmic: codes by rank, the commonest first, and how frequent they are."""
    share = (counts[counts > 0].double() / counts.sum()).sort(descending=True).values
    used, size = len(share), len(counts)
    floor = math.floor(math.log10(float(share[-1])))
    edges = np.unique(np.geomspace(1, used + 1, 120).round().astype(int)).tolist()

    def across(rank: float) -> float:
        return _LEFT + _FIELD * math.log(rank) / math.log(size + 1)

    def up(value: float) -> float:
        return _TOP + _HIGH * math.log10(value) / floor if floor else float(_TOP)

    parts = [
        _words(
            _LEFT,
            20,
            f"Codes by rank, and the share of each: {used:,} of {size:,} occur",
            'font-weight="600"',
        )
    ]
    for power in range(floor, 1):
        parts.append(_box(_LEFT, up(10.0**power), _FIELD, 1, _GRID))
        parts.append(_words(_LEFT - 8, up(10.0**power) + 4, f"{100 * 10.0**power:g} %", 'text-anchor="end"'))
    for first, end in pairwise(edges):
        value = float(share[first - 1 : end - 1].mean())
        name = f"{first:,}" if end == first + 1 else f"{first:,} to {end - 1:,}"
        told = f"rank {name}: {100 * value:.3g} % each"
        parts.append(
            _box(across(first), up(value), across(end) - across(first), _TOP + _HIGH - up(value), _FILL, told)
        )
    for rank in {
        1,
        size,
        *(10**power for power in range(1, int(math.log10(size)) + 1) if 3 * 10**power < size),
    }:
        parts.append(_words(across(rank), _TOP + _HIGH + 18, f"{rank:,}", _MIDDLE))
    return _svg(_TOP + _HIGH + 26, parts)


def _levels(digits: Sequence[Digit]) -> str:
    """A small histogram for each digit: its levels and how frequent they are, all on one scale."""
    wide, high, parts = 215, 165, []
    scale = 100 / max(max(digit.counts) / sum(digit.counts) for digit in digits)
    for number, digit in enumerate(digits):
        left, base = _LEFT // 2 + wide * (number % 4), high * (number // 4) + high - 20
        levels, step = len(digit.counts), (wide - 25) / len(digit.counts)
        title = f"digit {number}: {digit.used} of {levels}, {digit.bits:.2f} bits"
        parts.append(_words(left, base - 127, title, 'font-weight="600"'))
        for level, count in enumerate(digit.counts):
            share, place = count / sum(digit.counts), left + level * step
            told = f"level {level}: {100 * share:.3g} %"
            parts.append(_box(place, base - scale * share, step * 0.85, scale * share, _FILL, told))
            if levels <= 16:
                parts.append(_words(place + 0.42 * step, base + 14, str(level), _MIDDLE))
            if level == digit.counts.index(max(digit.counts)):
                parts.append(
                    _words(place + 0.42 * step, base - scale * share - 5, f"{100 * share:.0f} %", _MIDDLE)
                )
        parts.append(_box(left, base, wide - 25, 1, _INK))
    return _svg(high * -(-len(digits) // 4), parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {_LEFT + _FIELD + 30} {height}" font-size="13" fill="{_INK}"'
    return f'<svg role="img" {box} font-family="system-ui,sans-serif">{"".join(parts)}</svg>'


def _box(x: float, y: float, width: float, height: float, colour: str, told: str = "") -> str:
    inside = f"<title>{told}</title>" if told else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}">{inside}</rect>'


def _words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>'
