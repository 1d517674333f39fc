"""The objective of masked diffusion: noise a canvas, ask, weigh. Knows no network and never divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.canvas import IMAGE, MODALITIES, PAD, TEXT, Canvas, Part, Rows
from mmdlm.diffusion.estimator import Estimator, ExactCount
from mmdlm.diffusion.process import Absorbing
from mmdlm.diffusion.times import WHOLE, Draw, Strata, Times


@dataclass(frozen=True)
class LossOutput:
    """Sums and counts by modality name, to be added up (`+`) over batches and ranks and then divided.

    `bounds` are the same sums under the weights of the bound, without a graph: equal to `sums` where the
    objective is a bound, the honest figure to report where it is not (MaskGIT's weights, an emphasis), empty
    where there is none.
    """

    sums: dict[str, Tensor]  # scalar, nats, with a graph
    counts: dict[str, Tensor]  # scalar long, corruptible positions (in a group; masked or not)
    bounds: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: LossOutput) -> LossOutput:
        pairs = [(self.sums, other.sums), (self.counts, other.counts), (self.bounds, other.bounds)]
        return LossOutput(*(_merge(mine, theirs) for mine, theirs in pairs))

    def per_token(self) -> dict[str, Tensor]:
        """Nats per corruptible position of each modality; 0 for a modality without any."""
        return {name: value / self.counts[name].clamp_min(1) for name, value in self.sums.items()}


class Objective(Protocol):
    """What a trainer minimises."""

    def __call__(self, module: nn.Module, batch: Canvas, rng: torch.Generator) -> LossOutput:
        """Loss of `module` on `batch`; randomness comes from `rng` alone."""
        ...


@dataclass(frozen=True)
class ByModality:
    """An emphasis: one factor for all text positions, one for all image positions."""

    text: float = 1.0
    image: float = 1.0

    def __call__(self, canvas: Canvas) -> Tensor:
        """(B, L) float32."""
        ones = torch.ones(canvas.shape, device=canvas.device)
        factor = ones.masked_fill(canvas.modality == TEXT, self.text)
        return factor.masked_fill(canvas.modality == IMAGE, self.image)


@dataclass(frozen=True)
class Masking:
    """The weighted cross-entropy of the masked positions.

    A bound under `ExactCount` and `Bernoulli`. `emphasis` gives factors (B, L) for the positions of the clean
    canvas; `favoured` (V,) gives each id the factor w(x) of the positions whose target it is. Sums are then
    no bound, `bounds` still are. Weights that depend on the target x alone would teach a law in proportion to
    q(x) w(x) instead of the data's q, with favoured ids too often. So their losses are those of logits +
    log w, which are least where softmax(logits) = q (after A. K. Menon et al., Long-tail learning via logit
    adjustment, arXiv:2007.07314, with w in place of their prior). `strata` says which part of an optimizer
    step the batches of this objective are.

    A batch on the CPU is noised there and then sent to the module's device, so that the host knows the number
    of masked positions without waiting; a batch on an accelerator asks for all its rows, most not valid.
    """

    process: Absorbing
    times: Times
    estimator: Estimator = ExactCount()
    emphasis: Callable[[Canvas], Tensor] | None = None
    favoured: Tensor | None = None
    strata: Strata = WHOLE

    def part(self, index: int, count: int, step: int) -> Masking:
        """The objective for micro-batch `index` of `count` of a step: the levels of the parts interlock."""
        return replace(self, strata=Strata(index, count, step))

    def counts(self, batch: Canvas, rng: torch.Generator) -> dict[str, Tensor]:
        """The counts of a call with an equal generator, without a forward pass."""
        live = self.times.draw(batch, rng, self.strata).group >= 0
        return {name: (live & (batch.modality == value)).sum() for name, value in MODALITIES.items()}

    def __call__(self, module: nn.Module, batch: Canvas, rng: torch.Generator) -> LossOutput:
        draw = self.times.draw(batch, rng, self.strata)
        chosen = self.estimator.mask(draw, rng)
        noised = corrupt(self.process, batch, draw, chosen.where)
        weight = chosen.weight if self.emphasis is None else chosen.weight * self.emphasis(batch)
        tilts = None
        if self.favoured is not None:
            weight = weight * self.favoured.to(batch.device)[batch.tokens]
            tilts = torch.stack([self.favoured.log(), torch.zeros_like(self.favoured)])
        weights = torch.stack([weight, chosen.bound], dim=-1)
        sums = weighted_sums(module, noised, batch.tokens, where=chosen.where, weights=weights, tilts=tilts)
        totals = {name: value.sum(dim=0) for name, value in sums.items()}  # (2,)
        live = draw.group >= 0
        counts = {name: (live & (batch.modality == value)).sum() for name, value in MODALITIES.items()}
        return LossOutput(
            sums={name: total[0] for name, total in totals.items()},
            counts={name: count.to(totals[name].device, non_blocking=True) for name, count in counts.items()},
            bounds={name: total[1].detach() for name, total in totals.items()},
        )


def corrupt(process: Absorbing, canvas: Canvas, draw: Draw, where: Tensor) -> Canvas:
    """`canvas` with `where` (B, L) bool and what `draw` hides masked, and the levels of `draw` written in."""
    hidden = (draw.group < 0) & (draw.level >= 1)
    return process.corrupt(canvas, where | hidden).replace(level=draw.level.float())


def weighted_sums(
    module: nn.Module,
    noised: Canvas,
    targets: Tensor,
    *,
    where: Tensor,
    weights: Tensor,
    tilts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted cross-entropies at the positions `where` (B, L) bool, added up by row and modality.

    `targets` is (B, L) long, `weights` (B, L, W), `tilts` (W, V) what each of them adds to the logits; the
    answers, by modality name, are (B, W), in float32 or better, on the module's device, and have a graph also
    when nothing is masked.
    """
    num_rows, length = noised.shape
    rows, device = _rows(noised, where), _device(module, noised.device)
    noised, targets, weights = noised.to(device), targets.to(device), weights.to(device)
    tilts = None if tilts is None else tilts.to(device)
    rows = Rows(rows.index.to(device), rows.valid.to(device))
    names = {value: name for name, value in MODALITIES.items()}
    num_bins = 1 + max(names)

    def add_up(part: Part) -> Tensor:
        weight = part.rows.gather(weights)  # (M, W)
        counted = part.rows.valid & (weight != 0).any(dim=1)
        local = torch.where(counted, part.local(part.rows.gather(targets)), 0)
        logits = part.logits.to(torch.promote_types(part.logits.dtype, torch.float32))
        each = [logits] if tilts is None else [logits + tilt for tilt in tilts[:, part.ids]]
        # no id may be ignored: a target outside the part must fail, and -100 is the default
        losses = [F.cross_entropy(x, local, reduction="none", ignore_index=_NOTHING) for x in each]
        losses = torch.where(counted[:, None], torch.stack(losses, dim=1), 0.0) * weight  # (M, W) nats
        bins = part.rows.index // length * num_bins + part.rows.gather(noised.modality).long()
        return losses.new_zeros(num_rows * num_bins, losses.shape[1]).index_add(0, bins, losses)

    totals = weights.new_zeros(num_rows * num_bins, weights.shape[2])
    for total in module(noised, rows, reduce=add_up):
        totals = totals + total
    totals = totals.reshape(num_rows, num_bins, -1)
    return {name: totals[:, value] for value, name in names.items()}


_NOTHING = torch.iinfo(torch.int64).min


def _rows(noised: Canvas, where: Tensor) -> Rows:
    rows = Rows.of(where)
    if rows.index.numel() > 0:
        return rows
    # one uncounted row keeps the parameters in the graph; it must be a position that the model answers for
    index = (noised.modality.reshape(-1) != PAD).long().argmax().reshape(1)
    return Rows(index, torch.ones_like(index, dtype=torch.bool))


def _device(module: nn.Module, default: torch.device) -> torch.device:
    first = next(module.parameters(), None)
    return default if first is None else first.device


def _merge(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(mine)
    for name, value in theirs.items():
        merged[name] = merged[name] + value if name in merged else value
    return merged
