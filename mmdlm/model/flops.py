"""What a step costs in floating-point operations, by the shape of a network. Knows no device but its peak."""

from __future__ import annotations

import torch

from mmdlm.canvas import Canvas, Rows
from mmdlm.model.predictor import Predictor

BACKWARD = 2  # the gradient of a product is two products of its size


def forward_flops(predictor: Predictor, canvas: Canvas, rows: Rows) -> int:
    """Operations of the matrix products in one forward of `canvas` with logits at `rows`.

    An addition and a multiplication count as two. Only what is needed counts: no padding, attention inside
    each segment (blocks and copies are not looked at), the head at the rows asked for and over the ids that
    may stand there; nothing elementwise. So a program that pads, or takes all logits, gains no operations
    by it. On an accelerator it waits for the device.
    """
    config = predictor.config
    live = canvas.segment >= 0
    width = canvas.shape[1] + 1
    document = torch.arange(canvas.shape[0], device=canvas.device)[:, None] * width + canvas.segment
    sizes = document[live].unique(return_counts=True)[1]
    seen = int(sizes.square().sum())  # pairs of query and key
    keys = config.kv_heads * config.dim // config.num_heads
    products = config.dim * (2 * config.dim + 2 * keys + 3 * config.hidden_dim)  # weights of one block
    blocks = config.depth * (2 * int(live.sum()) * products + 2 * 2 * seen * config.dim)
    heads = [int(asked.valid.sum()) * (ids.stop - ids.start) for asked, ids in predictor.asked(canvas, rows)]
    return blocks + 2 * config.dim * sum(heads)


def training_flops(predictor: Predictor, canvas: Canvas, rows: Rows) -> int:
    """Operations of a forward and its gradient: three times `forward_flops`.

    What is computed again to save memory is not counted, as is usual for model-FLOP utilisation
    (arXiv:2204.02311, appendix B).
    """
    return (1 + BACKWARD) * forward_flops(predictor, canvas, rows)


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model-FLOP utilisation: `flops` in `seconds`, as a share of `peak` operations a second.

    Raises ValueError for a time or a peak that is not above 0.
    """
    if not seconds > 0 or not peak > 0:
        raise ValueError(f"seconds and peak must be above 0, got {seconds} and {peak}")
    return flops / seconds / peak
