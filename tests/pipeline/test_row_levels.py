"""Which noise levels rows of every kind get, and what a task that is not there adds to the loss: nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from row_kinds import COLLATE, KINDS, VOCAB, grid, rng

from mmdlm.canvas import IMAGE, TEXT, Canvas, Packed
from mmdlm.data import Encoded
from mmdlm.diffusion import Absorbing, Diagonal, Draw, Edges, Masking, Mixture, Square
from mmdlm.model import Predictor, Transformer, TransformerConfig


def documents(count: int) -> Canvas:
    """Documents of 2 to 7 pieces, packed."""
    draws = rng()
    items = []
    for number in range(count):
        kinds = draws.integers(2, size=draws.integers(2, 8))
        items.append(Encoded(f"{number}", pieces=tuple(grid(number % 12) if k else "ab" for k in kinds)))
    return Packed(COLLATE, 100)(items, rng())


def by_span(canvas: Canvas, draw: Draw) -> list[list[tuple[float, bool, int]]]:
    """Of each document and span the level, whether it is in the loss, and the modality; each must be one."""
    found = []
    for number in range(canvas.shape[0]):
        for document in range(int(canvas.segment[number].max()) + 1):
            found.append([])
            mine = canvas.segment[number] == document
            for span in canvas.span[number][mine & (canvas.span[number] >= 0)].unique():
                where = canvas.span[number] == span
                (level,) = draw.level[number][where].unique().tolist()
                (live,) = (draw.group[number][where] >= 0).unique().tolist()
                (kind,) = canvas.modality[number][where].unique().tolist()
                found[-1].append((level, live, kind))
    return found


def drawn(law, count: int = 300) -> list[list[tuple[float, bool, int]]]:
    canvas = documents(count)
    assert int(canvas.segment.max()) > 2
    return by_span(canvas, law.draw(canvas, torch.Generator().manual_seed(0)))


def test_square_has_a_level_for_every_span():
    found = drawn(Square())
    levels = [level for document in found for level, _, _ in document]
    assert len(found) == 300
    assert all(live for document in found for _, live, _ in document)
    assert len(set(levels)) == len(levels) > 1000
    counts, _ = np.histogram(levels, bins=10, range=(0, 1))
    assert counts.max() - counts.min() <= 4  # spread evenly over both modalities


def test_diagonal_has_one_level_for_a_document():
    found = drawn(Diagonal())
    assert all(len({level for level, _, _ in document}) == 1 for document in found)
    assert len({document[0][0] for document in found}) == 300


def test_edges_have_one_live_span_and_the_others_alike():
    hide, hidden, images = 0.25, 0, 0
    found = drawn(Edges(text=1.0, image=1.0, hide=hide))
    for document in found:
        (live,) = [(level, kind) for level, is_live, kind in document if is_live]
        assert 0 < live[0] <= 1
        rest = {level for level, is_live, _ in document if not is_live}
        assert rest in ({0.0}, {1.0})
        hidden += rest == {1.0}
        images += live[1] == IMAGE
    assert abs(hidden - 300 * hide) < 3  # stratified by the modality of what is live
    share = sum(sum(kind == IMAGE for _, _, kind in document) / len(document) for document in found)
    assert abs(images - share) < 30  # every span is as likely as another
    only = drawn(Edges(text=0.0, image=1.0, hide=0.0))
    for document in only:
        (live,) = [kind for _, is_live, kind in document if is_live]
        assert live == IMAGE or all(kind == TEXT for _, _, kind in document)


def test_a_mixture_gives_every_document_one_law():
    found = drawn(Mixture(((1.0, Diagonal()), (1.0, Edges(hide=0.0)))))
    alike = [document for document in found if len({level for level, _, _ in document}) == 1]
    assert abs(len(alike) - 150) < 15
    assert all(sum(live for _, live, _ in document) == 1 for document in found if document not in alike)


# tasks that are not there


def network() -> Predictor:
    config = TransformerConfig(
        vocab_size=VOCAB.size,
        text=(VOCAB.text.start, VOCAB.text.stop),
        image=(VOCAB.image.start, VOCAB.image.stop),
        mask=VOCAB.mask,
        dim=32,
        depth=1,
        num_heads=2,
        grid=(2, 2),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Predictor(Transformer(config))


@pytest.mark.parametrize("law", [Square(), Diagonal(), Edges(text=0.0, image=1.0, hide=1.0)], ids=repr)
@pytest.mark.parametrize("kinds", [["text"], ["picture"], ["asked", "text"], ["question"]], ids=str)
def test_a_task_without_a_token_adds_nothing_and_no_nan(law, kinds):
    items = [item for item in KINDS if item.name in kinds]
    module, objective = network(), Masking(Absorbing(VOCAB.mask), law)
    for collate in (COLLATE, Packed(COLLATE, 80)):
        out = objective(module, collate(items, rng()), torch.Generator().manual_seed(0))
        loss = {name: float(value.detach()) for name, value in out.per_token().items()}
        absent = "text" if kinds == ["picture"] else "image"
        present = "image" if absent == "text" else "text"
        assert (int(out.counts[absent]), float(out.sums[absent].detach()), loss[absent]) == (0, 0, 0)
        assert int(out.counts[present]) > 0
        assert loss[present] > 0
        module.zero_grad()
        (out.per_token()["text"] + out.per_token()["image"]).backward()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in module.parameters())


def test_a_batch_in_which_nothing_is_open_is_zero():
    canvas = COLLATE(KINDS[:3], rng())
    canvas = canvas.replace(fillable=torch.zeros_like(canvas.fillable))
    out = Masking(Absorbing(VOCAB.mask), Square())(network(), canvas, torch.Generator().manual_seed(0))
    assert {name: (int(out.counts[name]), float(out.sums[name].detach())) for name in out.sums} == {
        "text": (0, 0.0),
        "image": (0, 0.0),
    }
