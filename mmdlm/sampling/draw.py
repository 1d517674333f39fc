"""Chance: counter-based uniforms and categorical draws. Knows no canvas and no policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

# What a uniform is drawn for; each kind is a stream of its own.
TOKEN, CHOICE, REVEAL, ORDER, NOISE = range(5)

# Constants of the 64-bit finaliser "Mix13" behind SplitMix64 (Steele, Lea and Flood 2014,
# doi:10.1145/2660193.2660195; Stafford 2011), as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

_CHUNK = 1 << 23  # logits that are worked on at a time; on a CPU, whose caches are small:
_CPU_CHUNK = 1 << 20
_BLOCK = 64  # columns whose probabilities are summed in the logits' own precision, or float32


def uniform(seed: Tensor, sample: Tensor, step: Tensor, position: Tensor, kind: int) -> Tensor:
    """One number in (0, 1), float64, for each counter, a pure function of its arguments.

    The arguments are long and broadcast. Each is absorbed in turn, h <- mix(h + golden + value), with the
    finaliser of SplitMix64, a bijection of the 64-bit integers; the upper 52 bits of the last h, plus one
    half, are the number, so 0 and 1 never come.
    """
    state = _mix(seed + _GOLDEN)
    state = _mix(state + _GOLDEN + sample)
    state = _mix(state + _GOLDEN + step)
    state = _mix(state + _GOLDEN + kind)
    state = _mix(state + _GOLDEN + position)
    return (_shift(state, 12).double() + 0.5) * 2.0**-52


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms in (0, 1)."""
    return -torch.log(-torch.log(u))


@dataclass(frozen=True)
class Draws:
    """Categorical draws, as columns of the logits they came from."""

    tokens: Tensor  # (M,) long
    logp: Tensor  # (M,) float32   log-probability of the drawn column, before temperature and truncation
    peak: Tensor  # (M,) float32   log-probability of the most probable column
    # (M,) float32 each, those that were asked for, of the law before temperature and truncation: "margin", by
    # how much the most probable column's probability exceeds the next one's, and "entropy" in nats
    columns: Mapping[str, Tensor] = field(default_factory=dict)


def draw(
    logits: Tensor,
    u: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> Draws:
    """One column for each row of `logits` (M, V): the inverse distribution function at `u` (M,) float64.

    The law is softmax(logits / temperature), cut to the `top_k` most probable columns and then to the
    smallest set of the most probable ones that holds `top_p` of what is left; among equals the lower column
    comes first. Temperature 0 is the most probable column. Each setting is one number or (M,) of them.
    Probabilities are float32 or better, blocks of them summed in float64; a column of -inf is never drawn.
    `needs` names the further columns of `Draws` that are wanted.
    """
    chunk = _CPU_CHUNK if logits.device.type == "cpu" else _CHUNK
    size = max(1, chunk // max(1, logits.shape[1]))
    pieces = []
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        settings = _of(temperature, rows), _of(top_k, rows), _of(top_p, rows)
        pieces.append(_draw_chunk(logits[rows], u[rows], *settings, needs))
    if not pieces:
        nothing = u.new_zeros(0, dtype=torch.float32)
        return Draws(nothing.long(), nothing, nothing, dict.fromkeys(needs, nothing))
    if len(pieces) == 1:
        return pieces[0]
    return Draws(
        torch.cat([piece.tokens for piece in pieces]),
        torch.cat([piece.logp for piece in pieces]),
        torch.cat([piece.peak for piece in pieces]),
        {name: torch.cat([piece.columns[name] for piece in pieces]) for name in needs},
    )


def _of(setting: T | Tensor, rows: slice) -> T | Tensor:
    return setting[rows] if isinstance(setting, Tensor) else setting


def _draw_chunk(
    logits: Tensor,
    u: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    needs: frozenset[str],
) -> Draws:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not isinstance(temperature, Tensor) and temperature > 0:
        shifted = logits - logits.amax(dim=1, keepdim=True)
        tokens = _invert(shifted if temperature == 1 else shifted / temperature, u, top_k, top_p)
    else:
        tokens = logits.argmax(dim=1)  # of equal maxima the first
        shifted = logits - logits.gather(1, tokens.unsqueeze(1))
        if isinstance(temperature, Tensor):
            warm = temperature > 0
            scale = torch.where(warm, temperature, 1.0).unsqueeze(1).to(shifted.dtype)
            tokens = torch.where(warm, _invert(shifted / scale, u, top_k, top_p), tokens)
    mass = shifted.exp()
    total = mass.sum(dim=1)
    norm = total.log()
    logp = shifted.gather(1, tokens.unsqueeze(1)).squeeze(1) - norm
    columns = {name: _STATISTICS[name](shifted, mass, total).float() for name in needs}
    return Draws(tokens, logp.float(), (-norm).float(), columns)


def _entropy(shifted: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """Of softmax(shifted), whose probabilities are `mass` / `total`."""
    scaled = torch.where(mass > 0, shifted, 0.0)  # 0 * -inf is no number
    return total.log() - torch.linalg.vecdot(mass, scaled) / total


def _margin(shifted: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    if mass.shape[1] == 1:
        return torch.ones_like(total)
    first, second = mass.topk(2, dim=1).values.unbind(dim=1)
    return (first - second) / total


_STATISTICS = {"entropy": _entropy, "margin": _margin}


def _invert(scaled: Tensor, u: Tensor, top_k: int | Tensor | None, top_p: float | Tensor | None) -> Tensor:
    """(M,) long: the first column at which the distribution function exceeds u.

    First the block of columns, then the column in it, so that float64 sums run over few numbers.
    """
    mass = scaled.exp()
    if top_k is not None or top_p is not None:
        mass = _truncate(scaled, mass, top_k, top_p)
    spare = -mass.shape[1] % _BLOCK
    blocks = (F.pad(mass, (0, spare)) if spare else mass).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=2).double()
    block, rest = _find(sums, u.double().unsqueeze(1) * sums.sum(dim=1, keepdim=True))
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, _BLOCK)).squeeze(1).double()
    column, _ = _find(inside, rest)
    return (block * _BLOCK + column).squeeze(1)


def _find(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column at which the sum of `mass` (M, n) exceeds `target` (M, 1), and what is left of it.

    Rounding may put the target outside the sums; a column without mass is never found.
    """
    summed = mass.cumsum(dim=1)
    total = summed[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total))).clamp(min=0)
    column = torch.searchsorted(summed, target, right=True)
    return column, target - (summed.gather(1, column) - mass.gather(1, column))


def _truncate(
    scaled: Tensor, mass: Tensor, top_k: int | Tensor | None, top_p: float | Tensor | None
) -> Tensor:
    order = scaled.argsort(dim=1, descending=True, stable=True)
    ranked = mass.gather(1, order).double()
    if top_k is not None:
        bound = top_k.unsqueeze(1) if isinstance(top_k, Tensor) else top_k
        ranked = ranked * (torch.arange(ranked.shape[1], device=ranked.device) < bound)
    if top_p is not None:
        share = top_p.unsqueeze(1) if isinstance(top_p, Tensor) else top_p
        ahead = ranked.cumsum(dim=1) - ranked
        ranked = ranked * (ahead < share * ranked.sum(dim=1, keepdim=True))
    return torch.zeros_like(ranked).scatter(1, order, ranked)


def _shift(value: Tensor, count: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)
