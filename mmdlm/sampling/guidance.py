"""Denoisers around denoisers: guidance, and a count of what is forwarded. Knows no policy and no schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

from mmdlm.canvas import IMAGE, TEXT, Canvas, Denoiser, Part, Predict, Rows

T = TypeVar("T")

_PARTNER = {TEXT: IMAGE, IMAGE: TEXT}


class Guided:
    """Classifier-free guidance (arXiv:2207.12598) of each modality by the other.

    Text is guided against itself with every image span hidden, images against themselves with every text span
    hidden, given or generated alike: (1 + w) c - w u on normalised log-probabilities, so w = 0 is no
    guidance. A branch is forwarded only when its w is not 0 and, on the CPU, when one of its rows is asked;
    it is asked only for those rows. `mask` is the mask id.
    """

    def __init__(self, denoiser: Denoiser, *, text: float = 0.0, image: float = 0.0, mask: int) -> None:
        self.denoiser = denoiser
        self.scales = {TEXT: float(text), IMAGE: float(image)}
        self.mask = mask

    def begin(self, canvas: Canvas) -> Predict:
        """One state for the main branch and one for each hidden one."""
        branches = {}
        for modality, scale in self.scales.items():
            # without a partner both branches are one; asking that is one host sync a generation
            if scale != 0.0 and bool(_spans(canvas, _PARTNER[modality]).any()):
                branches[modality] = self.denoiser.begin(hide(canvas, _PARTNER[modality], self.mask))
        return _GuidedPredict(self, self.denoiser.begin(canvas), branches)


class _GuidedPredict:
    def __init__(self, guided: Guided, main: Predict, branches: dict[int, Predict]) -> None:
        self._guided, self._main, self._branches = guided, main, branches

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        parts = self._main(canvas, rows)
        for modality, branch in self._branches.items():
            guided = rows.where(canvas.modality == modality)
            if guided.index.shape[0] == 0:
                continue
            hidden = hide(canvas, _PARTNER[modality], self._guided.mask)
            free = {(part.ids.start, part.ids.stop): part for part in branch(hidden, guided)}
            scale = self._guided.scales[modality]
            parts = [_guide(part, free.get((part.ids.start, part.ids.stop)), scale, canvas) for part in parts]
        return parts if reduce is None else [reduce(part) for part in parts]


def hide(canvas: Canvas, modality: int, mask: int) -> Canvas:
    """The canvas with every span of `modality` turned into holes; the frame around them stays."""
    return canvas.hide(_spans(canvas, modality), mask)


def _spans(canvas: Canvas, modality: int) -> Tensor:
    where = canvas.modality == modality
    return where if canvas.span is None else where & (canvas.span >= 0)


def _guide(part: Part, free: Part | None, scale: float, canvas: Canvas) -> Part:
    """The rows of `part` that are also in `free`, guided; the others as they were."""
    if free is None:
        return part
    place = torch.full(canvas.shape, -1, dtype=torch.long, device=canvas.device)
    place = free.rows.scatter(torch.arange(free.rows.index.shape[0], device=canvas.device), place)
    where = part.rows.gather(place)
    partner = _normalised(free.logits).to(part.logits.device)[where.clamp(min=0)]
    own = _normalised(part.logits)
    guided = (1.0 + scale) * own - scale * partner
    illegal = own.isneginf() | partner.isneginf()
    guided = torch.where(illegal, -torch.inf, guided)  # inf - inf is no number
    return Part(
        part.rows, part.ids, torch.where((where >= 0).unsqueeze(1), guided, part.logits.to(guided.dtype))
    )


def _normalised(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=1)


class Counted:
    """Counts what the denoiser inside is asked to do: wrap the innermost one, and guidance is counted too."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls = 0  # passes through the model
        self.forwards = 0  # rows of canvases, on the CPU those with something asked, summed over the passes
        self.positions = 0  # their positions, padding too, summed over the passes

    def begin(self, canvas: Canvas) -> Predict:
        return _CountedPredict(self, self.denoiser.begin(canvas))


class _CountedPredict:
    def __init__(self, counter: Counted, inner: Predict) -> None:
        self._counter, self._inner = counter, inner

    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: None = None) -> list[Part]: ...
    @overload
    def __call__(self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T]) -> list[T]: ...
    def __call__(
        self, canvas: Canvas, rows: Rows, *, reduce: Callable[[Part], T] | None = None
    ) -> list[Part] | list[T]:
        size, length = canvas.shape
        asked = rows.samples(length)
        size = size if asked is None else len(asked)
        self._counter.calls += 1
        self._counter.forwards += size
        self._counter.positions += size * length
        return self._inner(canvas, rows) if reduce is None else self._inner(canvas, rows, reduce=reduce)
