"""A small model with lively weights, of text and pictures, for adapters to other libraries."""

from __future__ import annotations

import pytest
import torch

from mmdlm.model import Predictor, Transformer, TransformerConfig, initialise


@pytest.fixture(scope="session")
def model() -> Predictor:
    """Text ids 0 to 15, of which 15 is the mask; codes 16 to 26. Every input matters."""
    config = TransformerConfig(
        vocab_size=27, dim=32, depth=2, num_heads=4, text=(0, 16), image=(16, 27), mask=15
    )
    network, rng = Transformer(config), torch.Generator().manual_seed(6)
    initialise(network, rng)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) * 0.35)
    return Predictor(network).eval()
