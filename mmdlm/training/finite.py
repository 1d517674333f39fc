"""Updates whose loss or gradient is not finite: which, made of which samples, and when it is too many.

Knows no weights: the trainer leaves such an update out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IN_A_ROW = 3  # updates that end the run
_SHOWN = 8  # samples of one update that a message names; the metrics name all

Every = Callable[[list[str]], list[list[str]]]


def _alone(samples: list[str]) -> list[list[str]]:
    return [samples]


class Watch:
    """Counts the updates of one run that were left out."""

    def __init__(self) -> None:
        self.skipped = 0  # in all
        self._row: list[tuple[int, list[str]]] = []  # the last ones, one right after the other
        self._fatal: list[tuple[int, list[str]]] = []
        self._unseen: list[tuple[int, Tensor, list[str]]] = []

    def add(self, step: int, broken: Tensor, samples: Sequence[str]) -> None:
        """Notes update `step` (1 is the first), made of `samples`, without a host sync; `broken`: () bool."""
        self._unseen.append((step, broken, list(samples)))

    def look(self, every: Every = _alone) -> list[tuple[int, list[str]]]:
        """The updates that were not finite since the last look, with their samples (a host sync).

        `every` gathers what each of several processes names; they all find the same updates.
        """
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return []
        flags = torch.stack([broken for _, broken, _ in unseen]).tolist()
        found = []
        for (step, _, mine), broken in zip(unseen, flags, strict=True):
            if broken:
                samples = [name for part in every(mine) for name in part]
                found.append((step, samples))
                self._row.append((step, samples))
                self.skipped += 1
                if len(self._row) == IN_A_ROW and not self._fatal:
                    self._fatal = list(self._row)
            else:
                self._row = []
        return found

    def check(self, standing: Callable[[], str]) -> None:
        """Raises FloatingPointError, naming steps and samples, if too many were seen one after the other."""
        if self._fatal:
            told = "; ".join(f"step {step}: {_few(samples)}" for step, samples in self._fatal)
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {IN_A_ROW} updates in a row; they were left "
                f"out. Their samples: {told}. It stops; {standing()}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; after a look."""
        return {"skipped": self.skipped, "row": [list(each) for each in self._row]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the count where another process left it."""
        self.skipped = state["skipped"]
        self._row = [(step, list(samples)) for step, samples in state["row"]]


def _few(samples: Sequence[str]) -> str:
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return ", ".join(samples[:_SHOWN]) + more
