"""Bounds on the log-likelihood of image-text pairs: joint, conditional, marginal. Knows no sampler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tqdm import tqdm

from mmdlm.canvas import IMAGE, TEXT, Canvas
from mmdlm.diffusion import Absorbing, conditional, marginal, nelbo
from mmdlm.model import Predictor
from mmdlm.output import Score

__all__ = ["score_pairs", "text_given_image"]

NAMES = ("joint", "text_given_image", "image_given_text", "text", "image")


def score_pairs(
    model: Predictor, pairs: Canvas, *, draws: int, seed: int, batch_size: int, progress: bool
) -> Score:
    """Lower bounds on log p of the rows of `pairs`, a whole canvas with text and image open, in nats.

    The rows go through the model `batch_size` at a time; each batch and bound draws its noise from `seed`.
    """
    device = next(model.parameters()).device
    process = Absorbing(model.mask)
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    errors: dict[str, list[float]] = {name: [] for name in NAMES}
    parts = torch.arange(pairs.shape[0]).split(batch_size)
    with tqdm(total=len(parts) * len(NAMES), desc="score", disable=not progress) as bar:
        for rows in parts:
            for name, view in _views(pairs.select(rows), process):
                rng = torch.Generator().manual_seed(seed)
                bound = nelbo(model, view.to(device), process, num_draws=draws, rng=rng)
                values[name] += (-bound.nats).tolist()
                errors[name] += bound.error.tolist()
                bar.update()
    sides = zip(values["joint"], values["text"], values["image"], strict=True)
    return Score(
        **{name: tuple(numbers) for name, numbers in values.items()},
        pmi=tuple(joint - text - image for joint, text, image in sides),
        error={name: tuple(numbers) for name, numbers in errors.items()},
    )


def text_given_image(
    model: Predictor, pairs: Canvas, *, draws: int, seed: int, batch_size: int, progress: bool
) -> tuple[list[float], list[float]]:
    """Upper bounds on -log p(text | image) of the rows of `pairs`, in nats, and their standard errors.

    Every position of the text run is scored, the `end`s behind the text too. One stream of noise, from
    `seed`, goes through all batches, so that the errors of any two rows are independent.
    """
    device, process = next(model.parameters()).device, Absorbing(model.mask)
    rng = torch.Generator().manual_seed(seed)
    nats: list[float] = []
    errors: list[float] = []
    for rows in tqdm(torch.arange(pairs.shape[0]).split(batch_size), "likelihood", disable=not progress):
        view = conditional(pairs.select(rows), TEXT).to(device)
        bound = nelbo(model, view, process, num_draws=draws, rng=rng)
        nats += bound.nats.tolist()
        errors += bound.error.tolist()
    return nats, errors


def _views(pairs: Canvas, process: Absorbing) -> Iterator[tuple[str, Canvas]]:
    """The same rows, as each bound sees them."""
    yield "joint", pairs
    yield "text_given_image", conditional(pairs, TEXT)
    yield "image_given_text", conditional(pairs, IMAGE)
    yield "text", marginal(pairs, TEXT, process)
    yield "image", marginal(pairs, IMAGE, process)
