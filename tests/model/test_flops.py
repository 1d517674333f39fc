"""Operations of a step against those that torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdlm.canvas import Canvas, Fill, Frame, Rows, Run, pack
from mmdlm.model import (
    Predictor,
    Reference,
    Transformer,
    TransformerConfig,
    forward_flops,
    training_flops,
    utilisation,
)

CONFIG = TransformerConfig(
    vocab_size=41, text=(0, 20), image=(20, 40), mask=40, dim=32, depth=2, num_heads=4, num_kv_heads=2
)


def pair(text: int, grid: tuple[int, int]) -> Canvas:
    runs = (Run(length=text), Run(grid=grid))
    fills = [Fill(torch.zeros(1, run.size, dtype=torch.long) + 20 * n) for n, run in enumerate(runs)]
    canvas = Frame(runs).canvas(fills, mask=40)
    return canvas.hide(torch.arange(canvas.shape[1])[None] % 2 == 0, 40)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_costs_what_torch_counts(tied: bool) -> None:
    config = TransformerConfig(**{**vars(CONFIG), "tied": tied})
    predictor = Predictor(Transformer(config, kernel=Reference()))
    canvas = Canvas.concat([pair(7, (3, 3))] * 2)
    rows = Rows.of(canvas.masked)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        predictor(canvas, rows)
    assert forward.get_total_flops() == forward_flops(predictor, canvas, rows)
    with FlopCounterMode(display=False) as training:
        torch.stack([part.logits.sum() for part in predictor(canvas, rows)]).sum().backward()
    assert training.get_total_flops() == training_flops(predictor, canvas, rows)


def test_packed_rows_cost_their_documents_and_padding_nothing() -> None:
    predictor = Predictor(Transformer(CONFIG))
    alone = [pair(7, (3, 3)), pair(4, (2, 5)), pair(1, (1, 1))]
    packed = pack(alone, 40)
    each = [forward_flops(predictor, one, Rows.of(one.masked)) for one in alone]
    assert forward_flops(predictor, packed, Rows.of(packed.masked)) == sum(each)
    wide = packed.pad_to(60)
    assert forward_flops(predictor, wide, Rows.of(wide.masked)) == sum(each)
    nothing = Rows.of(torch.zeros_like(packed.masked))
    head = 2 * CONFIG.dim * 20 * int(packed.masked.sum())
    assert forward_flops(predictor, packed, nothing) == sum(each) - head


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert utilisation(6e12, seconds=2.0, peak=10e12) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="above 0, got 0 and"):
        utilisation(1.0, seconds=0, peak=1.0)
