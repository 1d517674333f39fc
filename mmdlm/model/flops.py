"""What a step costs in floating-point operations, by the shape of a network, and what devices could do."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Rows
from mmdlm.model.predictor import Predictor

BACKWARD = 2  # the gradient of a product is two products of its size

# Dense matrix products in bfloat16 with float32 sums, as the makers' data sheets state them.
# What counts is the first part of the device's name that is here.
_BFLOAT16 = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def forward_flops(predictor: Predictor, canvas: Canvas, rows: Rows) -> Tensor:
    """Operations of the matrix products in one forward of `canvas` with logits at `rows`: () float64.

    An addition and a multiplication count as two. Only what is needed counts: no padding, attention inside
    each segment (blocks and copies are not looked at), the head at the rows asked for and over the ids that
    may stand there; nothing elementwise. So a program that pads, or takes all logits, gains no operations
    by it. The answer lies on the canvas's device, without a host sync.
    """
    config = predictor.config
    live = (canvas.segment >= 0).double()
    width = canvas.shape[1] + 1
    document = torch.arange(canvas.shape[0], device=canvas.device)[:, None] * width + canvas.segment + 1
    sizes = live.new_zeros(canvas.shape[0] * width).index_add(0, document.flatten(), live.flatten())
    seen = sizes.square().sum()  # pairs of query and key
    keys = config.kv_heads * config.dim // config.num_heads
    products = config.dim * (2 * config.dim + 2 * keys + 3 * config.hidden_dim)  # weights of one block
    total = config.depth * (2 * live.sum() * products + 2 * 2 * seen * config.dim)
    for asked, ids in predictor.asked(canvas, rows):
        total = total + 2 * config.dim * (ids.stop - ids.start) * asked.valid.sum()
    return total


def training_flops(predictor: Predictor, canvas: Canvas, rows: Rows, **_: object) -> Tensor:
    """Operations of a forward and its gradient: three times `forward_flops`, for `Run.flops`.

    It may be called with all that the predictor is called with. What is computed again to save memory is not
    counted, as is usual for model-FLOP utilisation (arXiv:2204.02311, appendix B).
    """
    return (1 + BACKWARD) * forward_flops(predictor, canvas, rows)


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model-FLOP utilisation: `flops` in `seconds`, as a share of `peak` operations a second.

    Raises ValueError for a time or a peak that is not above 0.
    """
    if not seconds > 0 or not peak > 0:
        raise ValueError(f"seconds and peak must be above 0, got {seconds} and {peak}")
    return flops / seconds / peak


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a CUDA device could do in bfloat16 by its data sheet, for `Run.peak_flops`.

    None for a device that is not in the table, and for a CPU, for which no sheet says it.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BFLOAT16.items() if part in name), None)
