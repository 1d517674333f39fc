"""What a run writes down as it goes: one JSON object a line. Knows no model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.diffusion.loss import LossOutput
from mmdlm.io.atomic import atomic_write

Value = float | int | str | None
Totals = dict[str, dict[str, float]]

_KINDS = ("sums", "bounds", "counts", "flops")


class Metrics:
    """The file `metrics.jsonl`: records with a `step`, appended, and cut back when a run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: Mapping[str, Value]) -> dict[str, Value]:
        """Adds one line and hands it to the operating system; a number that is not finite becomes null.

        Returns the values as they were written. OSErrors (a full disk) are passed on; then nothing is added.
        """
        finite = {name: None if _broken(value) else value for name, value in values.items()}
        with self.path.open("ab", buffering=0) as file:
            end, line = file.tell(), (json.dumps({"step": step, **finite}) + "\n").encode()
            try:
                if (written := file.write(line)) < len(line):
                    file.write(line[written:])  # says why it was cut short
            except OSError:
                file.truncate(end)
                raise
        return finite

    def read(self) -> list[dict[str, Value]]:
        """All records. A torn last line (the machine died while writing) is left out.

        Raises ValueError at a torn line elsewhere.
        """
        if not self.path.exists():
            return []
        records = []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{self.path}, line {number} is not JSON ({error}): mend it") from error
        return records

    def truncate(self, step: int) -> None:
        """Drops the records after `step`, so that a resumed run writes none twice."""
        if self.path.exists():
            kept = [record for record in self.read() if int(record["step"] or 0) <= step]
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _broken(value: Value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Window:
    """Losses added up since the last record, on the device: adding costs no host sync."""

    def __init__(self) -> None:
        self._totals: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}

    def add(self, losses: LossOutput) -> None:
        """Adds the figures of one forward pass."""
        for kind, new in (("sums", losses.sums), ("bounds", losses.bounds), ("counts", losses.counts)):
            self._add(kind, new)

    def add_flops(self, flops: Tensor) -> None:
        """Adds operations that were done."""
        self._add("flops", {"flops": flops})

    def join(self, other: Window, *, unless: Tensor | None = None) -> None:
        """Adds the figures of another window; nothing where `unless`, () bool on the device, is true."""
        for kind, new in other._totals.items():
            totals = self._totals[kind]
            for name, value in new.items():
                kept = value if unless is None else torch.where(unless, 0.0, value)
                totals[name] = totals[name] + kept if name in totals else kept

    def over(self, every: Callable[[Totals], list[Totals]]) -> Window:
        """The figures of all processes, added up; `every` gathers what each of them holds (a host sync)."""
        total = Window()
        for state in every(self.state_dict()):
            other = Window()
            other.load_state_dict(state, torch.device("cpu"))
            total.join(other)
        return total

    def losses(self) -> dict[str, float]:
        """The objective per counted position, of each modality that had one (a host sync)."""
        return self._means("sums")

    def bounds(self) -> dict[str, float]:
        """The bound per counted position likewise; empty where the objective states none (a host sync)."""
        return self._means("bounds")

    def count(self) -> int:
        """The counted positions of all modalities (a host sync)."""
        return int(sum(float(value) for value in self._totals["counts"].values()))

    def flops(self) -> float | None:
        """The operations done; None where they are not counted (a host sync)."""
        found = self._totals["flops"].get("flops")
        return None if found is None else float(found)

    def clear(self) -> None:
        """Starts the next window."""
        self._totals = {kind: {} for kind in _KINDS}

    def state_dict(self) -> Totals:
        """Plain floats for JSON, exact in both directions (a host sync)."""
        return {kind: {n: float(v) for n, v in totals.items()} for kind, totals in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]], device: torch.device) -> None:
        """Takes up a saved window."""
        for kind, totals in state.items():
            self._totals[kind] = {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in totals.items()
            }

    def _add(self, kind: str, new: Mapping[str, Tensor]) -> None:
        totals = self._totals[kind]
        for name, value in new.items():
            wide = value.detach().to(torch.float64)
            totals[name] = totals[name] + wide if name in totals else wide

    def _means(self, kind: str) -> dict[str, float]:
        counts = {name: float(value) for name, value in self._totals["counts"].items()}
        totals = self._totals[kind].items()
        return {name: float(value) / counts[name] for name, value in totals if counts[name] > 0}
