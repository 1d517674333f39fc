"""Held-out losses by modality: an objective over some batches, with the same noise each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from mmdlm.training.metrics import Window
from mmdlm.training.optim import Precision
from mmdlm.training.ranks import Ranks
from mmdlm.training.run import BatchT, Objective, generator

T = TypeVar("T")


def validate(
    module: nn.Module,
    objective: Objective[BatchT],
    batches: Iterable[BatchT],
    *,
    precision: Precision,
    seed: int,
    ranks: Ranks = Ranks(),
) -> dict[str, float]:
    """Mean per counted position of each modality over `batches`: of the bound where the objective states one.

    Batch i is noised by a generator of (seed, i) alone, so that two calls differ by the weights only. Bounds
    are in nats per token of their modality. The module is in evaluation mode meanwhile, and after in the mode
    it was in. Of several `ranks` each works on its share of the batches, as many forward passes as the others
    (the module may be sharded), and all return the same means over all batches. Raises ValueError if there
    is no batch.
    """
    training, window, seen = module.training, Window(), 0
    module.eval()
    try:
        with torch.no_grad(), precision.context(next(module.parameters()).device):
            for group in _groups(batches, ranks.world):
                mine = ranks.rank if ranks.rank < len(group) else 0  # not counted: another's
                losses = objective(module, group[mine], generator(seed, seen + mine))
                if mine == ranks.rank:
                    window.add(losses)
                seen += len(group)
    finally:
        module.train(training)
    if seen == 0:
        raise ValueError("validation got no batch, wanted at least one")
    total = window.over(ranks.every)
    return {**total.losses(), **total.bounds()}


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time, the last ones perhaps fewer."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
