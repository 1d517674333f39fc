"""The canvas: what flows between data, noise, model and sampler."""

from mmdlm.canvas.canvas import IMAGE, MODALITIES, NOISY, PAD, PLAIN, SHADOW, TEXT, Canvas
from mmdlm.canvas.layout import Fill, Frame, Run
from mmdlm.canvas.packing import Packed, efficiency, pack
from mmdlm.canvas.parts import Denoiser, Part, Predict, Rows
from mmdlm.canvas.tasks import Gap, Layout, Passage

__all__ = [
    "IMAGE",
    "MODALITIES",
    "NOISY",
    "PAD",
    "PLAIN",
    "SHADOW",
    "TEXT",
    "Canvas",
    "Denoiser",
    "Fill",
    "Frame",
    "Gap",
    "Layout",
    "Packed",
    "Part",
    "Passage",
    "Predict",
    "Rows",
    "Run",
    "efficiency",
    "pack",
]
