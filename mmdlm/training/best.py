"""When a run stops early and which of its weights were the best: the lowest of a held-out figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmdlm.io.atomic import remove_folder
from mmdlm.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    module_tensors,
    restore_tensors,
)

TOTAL = "validation"  # key of the held-out figures of all modalities, weighted and added up


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Ends a run after `patience` validations in a row that were not lower by more than `min_delta`.

    `key` is that of a validation record: `validation` for all modalities, `validation/text` for one.
    """

    patience: int
    min_delta: float = 0.0
    key: str = TOTAL

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"the patience of an early stop must be at least 1, got {self.patience}")
        if not self.min_delta >= 0.0:
            raise ValueError(f"the min_delta of an early stop must be at least 0, got {self.min_delta}")


class Lowest:
    """The lowest value so far of one key, and how many values since have not been lower."""

    def __init__(self, key: str, min_delta: float = 0.0) -> None:
        self.key = key
        self.min_delta = min_delta
        self.value = math.inf
        self.step = 0
        self.misses = 0

    def take(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the record has a new lowest value; one that is not finite is none.

        Raises ValueError for a record without the key.
        """
        if self.key not in values:
            raise ValueError(f"a validation has no {self.key!r} (it has {', '.join(sorted(values))})")
        value = float(values[self.key])
        lower = math.isfinite(value) and value < self.value - self.min_delta
        if lower:
            self.value, self.step, self.misses = value, step, 0
        else:
            self.misses += 1
        return lower

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; what was never taken is None."""
        value = None if math.isinf(self.value) else self.value
        return {"key": self.key, "value": value, "step": self.step, "misses": self.misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where another run was; nothing where that one watched another key."""
        if state["key"] == self.key:
            self.value = math.inf if state["value"] is None else state["value"]
            self.step, self.misses = state["step"], state["misses"]


def save_best(folder: Path, module: nn.Module, lowest: Lowest) -> Path:
    """Writes the module's present weights to FOLDER/best, whole, and only then removes those before."""
    kept = Checkpoints(folder / "best", keep=1_000_000)
    path = kept.save(lowest.step, Checkpoint({"module": module_tensors(module)}, lowest.state_dict()))
    for other in kept.folder.glob("step-*"):
        if other != path:
            remove_folder(other)
    return path


def load_best(folder: Path, module: nn.Module) -> int:
    """Puts the best weights of the run in `folder` (`Run.keep_best`) into `module`; the step they are of.

    Raises CheckpointError where there are none, they cannot be read, or they are another module's.
    """
    found = Checkpoints(folder / "best", keep=1).newest()
    if found is None:
        raise CheckpointError(f"{folder} holds no best weights; a run keeps them with Run(keep_best=...)")
    restore_tensors(module_tensors(module), found.tensors["module"], "module")
    return found.state["step"]
