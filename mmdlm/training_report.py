"""What became of a training run, on one page, from the files in its folder. Knows no model and no loop."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mmdlm.data import Encoded
from mmdlm.io import atomic_write_json
from mmdlm.report import Page
from mmdlm.training.metrics import Metrics

__all__ = ["curves", "training_report", "write_statistics"]

Point = tuple[float, float]

_TITLES = {
    "loss": "Training loss by modality, mean since the record before",
    "bound": "Bound in training, nats per token of the modality",
    "validation": "Held out, on the averaged weights, per token of the modality",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens_per_second": "Counted positions a second",
    "flops_per_second": "Operations a second, all processes together",
    "utilisation": "Model-FLOP utilisation",
}
_UNPLOTTED = ("step", "seconds", "skipped")
_SHEETS = 6  # of each kind of sheet, the last one among them
_ROWS = 16  # of captions


def training_report(folder: Path, *, model: Path | None = None) -> Path:
    """Write FOLDER/report.html, which needs no other file and no network; its path.

    It shows curves from metrics.jsonl, the configuration from run.json, pictures from *.png (some of all
    `NAME-STEP.png`, evenly, and the last), the last captions-STEP.txt (wanted, tab, said) and texts-STEP.txt
    (a text a line) and, where there is one, data.json (name -> value: statistics of the data). `model` is the
    model folder that came of the run, for the lines that tell how to use it. The run may still be going on.
    Raises ValueError where the folder holds no record of a run.
    """
    records = Metrics(folder / "metrics.jsonl").read()
    configuration = _read_object(folder / "run.json")
    if not records or not configuration:
        raise ValueError(f"{folder}: no records of a training run (metrics.jsonl and run.json)")
    page, captions = Page(f"Training run {folder.name}"), _captions(folder)
    page.table(("figure", "value"), _summary(records, configuration))
    page.heading("Curves")
    for name, series in _groups(records).items():
        page.drawing(curves(series, title=_TITLES.get(name, name)))
    sheets = _sheets(folder)
    texts = _last_lines(folder, "texts")
    if sheets or captions or texts:
        page.heading("Samples on the way")
    for path, told in sheets:
        page.figure(path, told)
    if captions:
        page.table(("text of the training picture", "what the model says of it"), captions)
    if texts:
        page.table(("what the model writes",), [(text,) for text in texts])
    if data := _read_object(folder / "data.json"):
        page.heading("Data")
        page.table(("figure", "value"), [(name, _plain(value)) for name, value in data.items()])
    page.heading("How to use the model")
    for kind, text in _usage(folder, model, captions):
        (page.line if kind == "code" else page.paragraph)(text)
    page.heading("Configuration")
    page.table(("field", "value"), _flat(configuration))
    page.save(folder / "report.html")
    return folder / "report.html"


def write_statistics(folder: Path, pairs: Sequence[Encoded], count: Callable[[str], int]) -> None:
    """Write FOLDER/data.json, which `training_report` shows: what `pairs` are. `count` gives a text's tokens.

    Without a picture there are no figures of codes. Raises ValueError where there is no text.
    """
    texts = [text for pair in pairs for text in pair.all_texts]
    if not texts:
        raise ValueError("statistics need at least one pair with a text")
    lengths = sorted(map(count, texts))
    codes = [grid for pair in pairs for grid in pair.all_codes]
    folder.mkdir(parents=True, exist_ok=True)
    statistics: dict[str, int | str] = {
        "pictures": len(codes),
        "texts": len(texts),
        "texts that differ": len(set(texts)),
        "tokens a text": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}",
    }
    if codes:
        height, width = codes[0].shape
        statistics |= {
            "codes a picture": f"{height} x {width}",
            "codes that occur": len(np.unique(np.stack(codes))),
        }
    atomic_write_json(folder / "data.json", statistics)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a JSON object, got a {type(found).__name__}")
    return found


def _groups(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """The numbers by the first part of their keys, then by key: points (step, value)."""
    groups: dict[str, dict[str, list[Point]]] = {name: {} for name in _TITLES}
    for record in records:
        for key, value in record.items():
            if key not in _UNPLOTTED and isinstance(value, (int, float)) and not isinstance(value, bool):
                group = groups.setdefault(re.split(r"[/.]", key)[0], {})
                group.setdefault(key, []).append((float(record["step"]), float(value)))
    for group in groups.values():
        if len(group) == 2:  # one modality: the sum is the same once more
            short, long = sorted(group, key=len)
            if long.startswith(f"{short}/") and group[short] == group[long]:
                del group[short]
    return {name: group for name, group in groups.items() if group}


def _summary(records: Sequence[Mapping[str, Any]], configuration: Mapping[str, Any]) -> list[tuple[str, str]]:
    def column(key: str) -> list[Point]:
        return [(record["step"], record[key]) for record in records if record.get(key) is not None]

    rows = [("steps", f"{records[-1]['step']:,} of {configuration.get('steps', 0):,}")]
    if seconds := column("seconds"):
        rows.append(("time in updates", _duration(seconds[-1][1])))
    if pace := sorted(value for _, value in column("tokens_per_second")):
        rows.append(("tokens a second, median", f"{pace[len(pace) // 2]:,.0f}"))
    if pace := sorted(value for _, value in column("flops_per_second")):
        rows.append(("GFLOP a second, median", f"{pace[len(pace) // 2] / 1e9:,.1f}"))
    if share := sorted(value for _, value in column("utilisation")):
        rows.append(("model-FLOP utilisation, median", f"{share[len(share) // 2]:.1%}"))
    keys = dict.fromkeys(key for record in records for key in record)
    for key in keys:
        if key.partition("/")[0] in ("loss", "bound") and (found := column(key)):
            rows.append((f"{key}, last", f"{found[-1][1]:.4g}"))
        elif key.partition("/")[0] == "validation" and (found := column(key)):
            step, value = min(found, key=lambda point: point[1])
            rows.append((f"{key}, last", f"{found[-1][1]:.4g} (lowest {value:.4g} at step {step:,})"))
    if skipped := column("skipped"):
        rows.append(("updates left out, not finite", f"{len(skipped):,}"))
    return rows


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def _sheets(folder: Path) -> list[tuple[Path, str]]:
    """Pictures to show, each with its caption."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        name, step = _numbered(path)
        kinds.setdefault(name, []).append((step, path))
    shown = []
    for name, found in kinds.items():
        found.sort()
        count = min(_SHEETS, len(found))
        for number in range(count):
            step, path = found[-1 - (count - 1 - number) * len(found) // count]
            shown.append((path, name if step < 0 else f"{name} after {step:,} steps"))
    return shown


def _captions(folder: Path) -> list[tuple[str, str]]:
    """Rows of the last captions-STEP.txt: what was wanted, what was said."""
    lines = _last_lines(folder, "captions")
    return [(wanted, said) for wanted, _, said in (line.partition("\t") for line in lines)]


def _last_lines(folder: Path, name: str) -> list[str]:
    """The first lines of the last NAME-STEP.txt; none where there is none."""
    files = sorted(folder.glob(f"{name}-*.txt"), key=lambda path: _numbered(path)[1])
    return files[-1].read_text("utf-8").splitlines()[:_ROWS] if files else []


def _numbered(path: Path) -> tuple[str, int]:
    found = re.fullmatch(r"(.+)-(\d+)", path.stem)
    return (found.group(1), int(found.group(2))) if found else (path.stem, -1)


def _usage(folder: Path, model: Path | None, captions: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Paragraphs and code."""
    prompt = captions[0][0] if captions and captions[0][0] else "what to draw"
    if model is not None and _of_text_alone(model):
        code = (
            "from mmdlm import Pipeline\n\n"
            f"pipe = Pipeline.from_pretrained({str(model)!r})\n"
            'for text in pipe.text("", num_samples=8, seed=0).texts:\n'
            "    print(text)"
        )
        return [
            ("text", "In Python, each text from a beginning that may be empty:"),
            ("code", code),
            ("text", "On the command line:"),
            ("code", f"mmdlm text --model {model}"),
        ]
    if model is not None:
        code = (
            "from mmdlm import Pipeline\n\n"
            f"pipe = Pipeline.from_pretrained({str(model)!r})\n"
            f"picture = pipe.text_to_image({prompt!r}, seed=0).images[0]\n"
            'picture.save("drawn.png")\n'
            "print(pipe.caption([picture]).texts[0])\n"
            "pairs = pipe.joint(num_samples=4, seed=1)  # pictures and texts at once"
        )
        quoted = json.dumps(prompt, ensure_ascii=False)
        commands = (
            f"mmdlm text_to_image --model {model} {quoted}\n"
            f"mmdlm caption --model {model} a.png\n"
            f"mmdlm joint --model {model}"
        )
        return [
            ("text", "In Python:"),
            ("code", code),
            ("text", "On the command line:"),
            ("code", commands),
        ]
    steps = sorted((folder / "checkpoints").glob("step-*"))
    usage = []
    if steps:
        newest = steps[-1]
        averaged = (newest / "average.safetensors").is_file() or any(newest.glob("shard-*-of-00003.*"))
        group = "average" if averaged else "module"
        code = (
            "from pathlib import Path\n\nfrom mmdlm.training import load_tensors\n\n"
            f"module.load_state_dict(load_tensors(Path({str(newest)!r}), {group!r}), strict=False)"
        )
        usage = [("text", "The trained weights, put into the module that the run was given:"), ("code", code)]
    if (folder / "best").is_dir():
        code = f"from mmdlm.training import load_best\n\nload_best(Path({str(folder)!r}), module)"
        usage += [("text", "The best weights by validation:"), ("code", code)]
    return usage or [("text", "There is no checkpoint yet.")]


def _of_text_alone(model: Path) -> bool:
    index = _read_object(model / "model_index.json")
    return bool(index) and "image_tokenizer" not in index


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Fields of an object by dotted names."""
    if isinstance(value, Mapping):
        rows = [(name, str(value["class"]))] if "class" in value and name else []
        entries = [(key, entry) for key, entry in value.items() if key != "class"]
        return rows + [row for key, entry in entries for row in _flat(entry, f"{name}.{key}".lstrip("."))]
    if isinstance(value, list) and any(isinstance(entry, (Mapping, list)) for entry in value):
        return [row for number, entry in enumerate(value) for row in _flat(entry, f"{name}[{number}]")]
    return [(name, _plain(value))]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# drawings

_LEFT, _TOP, _WIDE, _HIGH = 76, 56, 780, 210
_INK, _AXIS, _GRID = "#1e1e28", "#8a8a94", "#e6e6ea"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#3a3a44")
_FEW, _MANY = 40, 400  # up to so many points are marked; more than these are averaged


def curves(series: Mapping[str, Sequence[Point]], *, title: str) -> str:
    """An SVG element of lines (step, value) by name; a legend says which, and the last value of each.

    Values that are all above 0 and span more than two orders of magnitude stand on a logarithmic axis. Of a
    long line each 1/400 is one point, its mean; the last point is as it is. Raises ValueError for no points.
    """
    values = [value for points in series.values() for _, value in points]
    steps = [step for points in series.values() for step, _ in points]
    if not values or not all(series.values()):
        raise ValueError(f"curves need points in each of their lines, got {len(series)} lines")
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 100 * low
    ticks = _powers(low, high) if logarithmic else _ticks(low, high)
    scale = math.log10 if logarithmic else float
    bottom, top = scale(ticks[0]), scale(ticks[-1])
    first, last = min(steps), max(steps)

    def place(point: Point) -> Point:
        across = (point[0] - first) / (last - first) if last > first else 0.5
        return _LEFT + _WIDE * across, _TOP + _HIGH * (top - scale(point[1])) / (top - bottom)

    parts = [_words(_LEFT, 20, title, 'font-size="16" font-weight="600"')]
    for tick in ticks:
        height = place((first, tick))[1]
        parts.append(_line([(_LEFT, height), (_LEFT + _WIDE, height)], _GRID, 1))
        parts.append(_words(_LEFT - 8, height + 4.5, f"{tick:,.6g}", 'text-anchor="end"'))
    for tick in (tick for tick in _ticks(first, last) if first <= tick <= last):
        across = place((tick, ticks[0]))[0]
        parts.append(_line([(across, _TOP + _HIGH), (across, _TOP + _HIGH + 5)], _AXIS, 1))
        parts.append(_words(across, _TOP + _HIGH + 20, f"{tick:,.6g}", 'text-anchor="middle"'))
    parts.append(_line([(_LEFT, _TOP + _HIGH), (_LEFT + _WIDE, _TOP + _HIGH)], _AXIS, 1))
    parts.append(_words(_LEFT + _WIDE / 2, _TOP + _HIGH + 38, "updates", 'text-anchor="middle"'))
    along, row = float(_LEFT), 41
    for number, (name, points) in enumerate(series.items()):
        colour, told = _COLOURS[number % len(_COLOURS)], f"{name}: {points[-1][1]:.4g}"
        dash = ' stroke-dasharray="7 4"' if number >= len(_COLOURS) else ""
        thinned = _thinned(points)
        parts.append(_line([place(point) for point in thinned], colour, 1.8, dash))
        if len(thinned) <= _FEW:
            parts += [
                _dot(place(point), colour, f"{name} at {point[0]:,g}: {point[1]:.6g}") for point in thinned
            ]
        parts.append(_line([(along, row - 4), (along + 18, row - 4)], colour, 3, dash))
        parts.append(_words(along + 24, row, told))
        along += 48 + 7.4 * len(told)
    box = f'viewBox="0 0 {_LEFT + _WIDE + 24} {_TOP + _HIGH + 48}" font-size="13" fill="{_INK}"'
    name = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg {name} {box} font-family="system-ui,sans-serif">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances, at most seven, from below `low` to above `high`."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(start, end + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten from below `low` to above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1, -(-(last - first) // 8))] + [10.0**last]


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MANY:
        return list(points)
    edges = [number * (len(points) - 1) // (_MANY - 1) for number in range(_MANY)]
    means = []
    for start, end in pairwise(edges):
        some = points[start:end]
        means.append((sum(step for step, _ in some) / len(some), sum(value for _, value in some) / len(some)))
    return [*means, points[-1]]


def _line(places: Sequence[Point], colour: str, width: float, more: str = "") -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    stroke = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"'
    return f'<polyline points="{points}" {stroke}{more}/>'


def _dot(place: Point, colour: str, told: str) -> str:
    inside = f"<title>{html.escape(told)}</title>"
    return f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.2" fill="{colour}">{inside}</circle>'


def _words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>'
