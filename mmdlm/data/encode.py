"""A source becomes shards of codes, once: in parts, resumably, with the same bytes however it was shared out.

Knows no tokenizer: pictures become codes by a function.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mmdlm.data.encoded import Encode, Encoded, with_codes
from mmdlm.data.images import OnError, Stop
from mmdlm.data.indexed import Indexed
from mmdlm.data.sample import Sample, SampleError
from mmdlm.data.shards import FORMAT, INDEX, Shard, dtype_for, read_sealed, shard_of, write_sealed
from mmdlm.io import atomic_write

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in messages of Pillow: another one in every process


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All that the bytes of shards depend on besides the source; a folder holds shards of one plan.

    `made_of` is plain JSON values.
    """

    num_codes: int
    tokenizer: str = ""  # fingerprint of what makes the codes
    made_of: Mapping[str, Any] = field(default_factory=dict)  # what else: data, pixels a side, ...
    shard_size: int = 4096  # items of the source a shard
    batch_size: int = 64  # pictures encoded together: floats, and so codes, may depend on it
    texts_alone: bool = False  # carried, or else errors: items without a picture

    def __post_init__(self) -> None:
        for name in ("num_codes", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def num_shards(self, items: int) -> int:
        """How many shards a source of so many items becomes."""
        return -(-items // self.shard_size)


def encode_shards(
    source: Indexed[Sample],
    out: Path | str,
    *,
    encode: Encode,
    plan: ShardPlan,
    part: tuple[int, int] = (0, 1),
    on_error: OnError = Stop(),
    on_items: Callable[[int], object] = lambda items: None,
) -> bool:
    """Write the codes and texts of a source to the folder `out`; `Shards` reads it.

    Items of every kind are carried, pairs and documents; one that is no document and has no picture is a
    SampleError, unless the plan has `texts_alone`.

    Shard k holds the items k * shard_size and on, whatever the order of the source. `part` is (rank, world):
    this call makes every shard k with k % world == rank, so that several processes or machines share the work
    in one folder; whoever is last writes `index.json`. Returns whether the folder is complete.

    A shard that stands, with the SHA-256 of its record, is not made again: an interrupted call is taken up by
    the same call, and one on a damaged folder mends it. Each file is written whole or not at all.

    A sample that cannot be had goes to `on_error`, also one that an earlier call left out; if that does not
    raise, it is left out and named in the index. `on_items` is told of each shard's items as they are
    done. Raises ValueError for an empty source, one without a picture, codes that are none or of several
    shapes, and a folder that holds shards of another plan.
    """
    rank, world = part
    if not 0 <= rank < world:
        raise ValueError(f"part is (rank, world) with 0 <= rank < world, got {part}")
    if not len(source):
        raise ValueError("the source is empty, there is nothing to encode")
    out = Path(out)
    stated = {"items": len(source), **asdict(plan), "made_of": dict(plan.made_of)}
    if not plan.texts_alone:
        del stated["texts_alone"]  # shards from before there was this choice are taken up
    if json.loads(json.dumps(stated)) != stated:
        raise ValueError(f"made_of wants plain JSON values, got {dict(plan.made_of)}")
    _check_plan(out, stated)
    for number in range(rank, plan.num_shards(len(source)), world):
        span = range(number * plan.shard_size, min((number + 1) * plan.shard_size, len(source)))
        standing = _standing(out, number, stated, whole=True)
        if standing is None:
            data, shard = _make(source, span, encode, plan, on_error)
            _write(out, number, data, shard, stated)
        else:
            for name, reason in standing.skipped.items():
                on_error(SampleError(name, reason))
        on_items(len(span))
    return _finish(out, plan, stated)


def _make(
    source: Indexed[Sample], span: range, encode: Encode, plan: ShardPlan, on_error: OnError
) -> tuple[bytes, Shard]:
    """The file of a shard, and its record."""
    held: list[Sample] = []
    num_held = 0  # pictures
    pairs: list[Encoded] = []
    skipped: dict[str, str] = {}
    for index in span:
        try:
            sample = source[index]
            if not (plan.texts_alone or sample.pieces or sample.all_images):
                raise SampleError(sample.name, "has no picture")
        except SampleError as error:
            on_error(error)
            skipped[error.name] = _ADDRESS.sub("", error.reason)
        else:
            held.append(sample)
            num_held += len(sample.all_images)
        if num_held >= plan.batch_size:
            pairs += with_codes(held, encode, plan.batch_size)
            held, num_held = [], 0
    pairs += with_codes(held, encode, plan.batch_size)
    counts = np.array([len(pair.all_codes) for pair in pairs], np.int64)
    every = [grid for pair in pairs for grid in pair.all_codes]
    grids = {grid.shape for grid in every}
    if len(grids) > 1:
        raise ValueError(f"wanted codes of one shape, got {sorted(grids)}")
    height, width = grids.pop() if grids else (0, 0)
    codes = np.array(every, np.int64).reshape(len(every), height, width)
    if codes.size and not (codes.min() >= 0 and codes.max() < plan.num_codes):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}, wanted 0 to {plan.num_codes - 1}")
    rows = [_row(pair) for pair in pairs]
    tensors = {
        "codes": codes.astype(dtype_for(plan.num_codes)),
        "ends": np.cumsum([len(row) for row in rows], dtype=np.int64),
        "rows": np.frombuffer(b"".join(rows), np.uint8),
    }
    if (counts != 1).any():
        tensors["pictures"] = np.cumsum(counts)
    data = save(tensors)
    shard = Shard(
        file=_name(span.start // plan.shard_size, "safetensors"),
        start=span.start,
        stop=span.stop,
        samples=len(pairs),
        pictures=len(every),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        grid=(height, width),
        skipped=skipped,
    )
    return data, shard


def _row(pair: Encoded) -> bytes:
    row: dict[str, Any] = {"name": pair.name, "texts": list(pair.texts)}
    if pair.pieces:
        row["pieces"] = [piece if isinstance(piece, str) else None for piece in pair.pieces]
    asked = {"question": pair.question, "answer": pair.answer}
    row |= {name: text for name, text in asked.items() if text is not None}
    return (json.dumps(row) + "\n").encode()


def _write(out: Path, number: int, data: bytes, shard: Shard, stated: Mapping[str, Any]) -> None:
    """The shard, and then its record: without that it does not stand."""
    out.mkdir(parents=True, exist_ok=True)
    for ending in ("safetensors", "json"):  # what a killed process of this part left behind
        for rest in out.glob(f".{_name(number, ending)}.*.part"):
            rest.unlink(missing_ok=True)
    atomic_write(out / shard.file, data)
    write_sealed(out / _name(number, "json"), {"plan": stated, "shard": asdict(shard)})


def _standing(out: Path, number: int, stated: Mapping[str, Any], *, whole: bool) -> Shard | None:
    """The shard if it is there as its record says."""
    try:
        record = read_sealed(out / _name(number, "json"))
    except ValueError:
        return None
    if record["plan"] != stated:
        return None
    shard = shard_of(record["shard"])
    return None if shard.fault(out, whole=whole) else shard


def _check_plan(out: Path, stated: Mapping[str, Any]) -> None:
    """Raises ValueError when the folder holds shards of another plan."""
    for path in (out / INDEX, *sorted(out.glob("shard-*.json"))):
        try:
            found = read_sealed(path)["plan"]
        except (ValueError, KeyError):
            continue
        if found != stated:
            names = [name for name in {**stated, **found} if found.get(name) != stated.get(name)]
            differ = "; ".join(f"{name} {found.get(name)!r}, now {stated.get(name)!r}" for name in names)
            raise ValueError(f"{path}: there are shards made otherwise ({differ}); write elsewhere")
        return


def _finish(out: Path, plan: ShardPlan, stated: Mapping[str, Any]) -> bool:
    """Write the index if every shard stands; two who find so at once write the same."""
    shards = []
    for number in range(plan.num_shards(stated["items"])):
        shard = _standing(out, number, stated, whole=False)
        if shard is None:
            return False
        shards.append(shard)
    grids = sorted({shard.grid for shard in shards if shard.pictures})
    if len(grids) > 1:
        raise ValueError(f"{out}: wanted codes of one shape, got {grids}")
    if not grids:
        raise ValueError(f"{out}: not one picture could be read")
    index = {
        "format": FORMAT,
        "plan": dict(stated),
        "samples": sum(shard.samples for shard in shards),
        "grid": list(grids[0]),
        "dtype": dtype_for(plan.num_codes),
        "shards": [asdict(shard) for shard in shards],
    }
    write_sealed(out / INDEX, index)
    return True


def _name(number: int, ending: str) -> str:
    return f"shard-{number:05d}.{ending}"
