"""The absorbing process: a position is clean, or it is masked. Knows no schedule's shape and no model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdlm.canvas import Canvas


@dataclass(frozen=True)
class Absorbing:
    """A token becomes `mask`, and a masked one stays masked (D3PM's absorbing kernel, arXiv:2107.03006)."""

    mask: int  # the id of the mask token

    def corrupt(self, canvas: Canvas, where: Tensor) -> Canvas:
        """`canvas` with those positions of `where` (B, L) bool masked that are fillable."""
        return canvas.hide(where & canvas.fillable, self.mask)

    def reveal(self, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """Probability (alpha_s - alpha_t) / (1 - alpha_t) that what is masked at t is clean at an earlier s.

        The reverse posterior q(z_s | z_t, x) of a masked position (arXiv:2406.07524, equation 6); a clean one
        stays. Elementwise, alpha_t <= alpha_s; a time with alpha_t = 1 has no masked position and gives NaN.
        """
        return (alpha_s - alpha_t) / (1 - alpha_t)
