"""The plan for eight billion parameters says what the code says: counts, operations, bytes, seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmdlm.canvas import TEXT, Canvas, Layout, Rows, pack
from mmdlm.model import Predictor, Transformer, training_flops, utilisation
from mmdlm.model.predictor import PIECE
from mmdlm.training import WSD
from tokenizers_mm import Vocab

ROOT = Path(__file__).resolve().parents[2]
PLAN = (ROOT / "mmdlm" / "training" / "SCALE.md").read_text("utf-8")
ROWS = [line for line in PLAN.splitlines() if line.startswith("|")]
PROSE = " ".join(PLAN.split())
GB = 1e9
PEAK, SHARE = 989e12, 0.62  # operations a second in bfloat16, and how much of it products reach
NVLINK, NETWORK = 0.75 * 450 * GB, 0.75 * 50 * GB  # bytes a second


def read_recipe() -> ModuleType:
    path = ROOT / "train" / "recipes" / "eight_billion.py"
    spec = importlib.util.spec_from_file_location("recipe_eight_billion", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return Vocab.build(num_text=126_464, num_codes=8192)


@pytest.fixture(scope="module")
def predictor(vocab) -> Predictor:
    """The recipe's network at its own size, without memory."""
    with torch.device("meta"):
        return Predictor(Transformer(read_recipe().shape(vocab, 4096, 32, 32, 12288)))


@pytest.fixture(scope="module")
def batch(vocab) -> Canvas:
    """A micro-batch of 16 pairs of 32 x 32 codes and captions of 39 tokens, every second position masked."""
    layout = Layout(vocab=vocab, grid=(32, 32), caption=40, question=1, answer=1)
    packed = pack([layout.pairs([[1] * 39] * 16, torch.zeros(16, 32, 32, dtype=torch.long))], 4352)
    return packed.hide(packed.fillable & (torch.arange(packed.shape[1]) % 2 == 0), vocab.mask)


def test_the_parameters_are_those_that_the_plan_states(predictor) -> None:
    block = sum(weight.numel() for weight in predictor.network.blocks[0].parameters())
    total, table = predictor.num_parameters(), predictor.network.embedding.weight.numel()
    assert f"= {block:,}, 32 of them {32 * block / GB:.2f} B; table and head {table:,} each" in PROSE
    assert f"N = {total:,}" in PROSE
    assert 0 < total - 32 * block - 2 * table < 20_000  # one norm, three vectors for modalities


def test_a_token_costs_what_the_plan_states(predictor, batch) -> None:
    length = 4096
    shape = (1, length)
    text = Canvas(
        tokens=torch.zeros(shape, dtype=torch.long),
        modality=torch.full(shape, TEXT, dtype=torch.uint8),
        fillable=torch.ones(shape, dtype=torch.bool),
        masked=torch.arange(length)[None] < length // 2,
        position=torch.zeros(*shape, 2, dtype=torch.long),
        segment=torch.zeros(shape, dtype=torch.long),
        span=torch.zeros(shape, dtype=torch.long),
    )
    half, none = (
        float(training_flops(predictor, text, Rows.of(where))) / length / GB
        for where in (text.masked, torch.zeros_like(text.masked))
    )
    config = predictor.config
    attention = 12 * config.depth * config.dim * length / GB
    assert f"costs {half:.1f} GFLOP a token ({none:.1f} without the head, {attention:.1f} of them" in PROSE
    live = int((batch.segment >= 0).sum())
    pair = float(training_flops(predictor, batch, Rows.of(batch.masked))) / live / GB
    inside = 12 * config.depth * config.dim * live / 16 / GB
    assert f"costs {pair:.1f}: attention stays inside a pair ({inside:.1f})" in PROSE
    assert f"not {config.vocab_size:,}" in PROSE


def test_the_memory_adds_up(predictor, batch) -> None:
    total, dim, depth = predictor.num_parameters(), 4096, 32
    block = sum(weight.numel() for weight in predictor.network.blocks[0].parameters())
    table = predictor.network.embedding.weight.numel()
    positions = int((batch.segment >= 0).sum())
    assert f"packed into {positions:,} positions" in PROSE
    root = 2 * (total - depth * block) / GB
    head = 2 * 2 * table / GB
    blocks = (2 * 2 + 2 + 4) * block / GB
    streams, inside = 2 * dim * depth * positions / GB, 21 * 2 * dim * positions / GB
    logits = 6 * 4 * PIECE / GB  # a piece in both dtypes, its softmax, and the gradients of these
    fixed = [root, head, blocks, streams, inside, logits]
    names = ("table, head", "the head's", "two gathered", "residual", "inside", "logits")
    for starts, value in zip(names, fixed, strict=True):
        assert cells(starts) == [f"{value:.1f}"] * 3
    states = [16 * total / ranks / GB for ranks in (8, 64, 512)]
    assert cells("float32 weights") == [f"{state:.1f}" for state in states]
    assert cells("averaged") == [f"{state / 4:.1f}" for state in states]
    assert cells("**together") == [f"**{state + sum(fixed):.1f}**" for state in states]
    every_second = states[0] + sum(fixed) + inside * depth / 2
    assert f"{inside * depth / 2:.0f} GB more, so {every_second:.1f} at S = 8" in PROSE
    whole = 4 * total / GB
    assert f"on the first GPU, {whole:.1f} GB" in PROSE
    assert f"keeps its part: {whole:.1f} + {whole / 8:.1f} GB" in PROSE
    assert f"12 N = {12 * total / GB:.1f} GB ({16 * total / GB:.1f} with the average)" in PROSE
    assert f"{12 * total / 8 / GB:.1f} GB a rank at S = 8" in PROSE


def cells(starts: str) -> list[str]:
    (row,) = [line for line in ROWS if line.startswith(f"| {starts}")]
    return [cell.strip() for cell in row.split("|")[3:6]]


def test_the_speed_follows_from_its_assumptions(predictor, batch) -> None:
    total, positions = predictor.num_parameters(), int((batch.segment >= 0).sum())
    flops = float(training_flops(predictor, batch, Rows.of(batch.masked)))
    blocks = float(training_flops(predictor, batch, Rows.of(torch.zeros_like(batch.masked))))
    seconds = (flops + blocks / 3) / (SHARE * PEAK)  # the blocks' forward once more
    inside = 8 * total * 7 / 8 / NVLINK
    flat = 8 * total * 63 / 64 / NETWORK
    assert f"{seconds:.2f} s of arithmetic" in PROSE
    assert f"{8 * total * 7 / 8 / GB:.1f} GB, {inside:.2f} s over NVLink" in PROSE
    assert f"{8 * total * 63 / 64 / GB:.1f} GB and {flat:.1f} s" in PROSE
    assert flat > seconds
    for ranks, groups, accumulate in ((8, 1, 64), (64, 8, 64), (512, 64, 512)):
        between = 2 * 4 * total / 8 * (groups - 1) / groups / NETWORK
        worst, turns = seconds + inside + between, accumulate // ranks
        low, high = (utilisation(flops, each, PEAK) for each in (worst, seconds))
        slow, fast = (100 * round(positions / each / 100) for each in (worst, seconds))
        told = f"| {accumulate * positions / 1e6:.1f} M | {turns * seconds:.1f}-{turns * worst:.1f} "
        told += f"| {low:.2f}-{high:.2f} | {slow:,}-{fast:,} |"
        (row,) = [line for line in ROWS if line.startswith(f"| {ranks} |")]
        assert row.endswith(told), told
    seconds = (flops + blocks / 6) / (SHARE * PEAK)
    between = 2 * 4 * total / 8 * 63 / 64 / NETWORK
    low, high = (utilisation(flops, each, PEAK) for each in (seconds + inside + between, seconds))
    assert f"`recompute=2` gives {low:.2f}-{high:.2f}" in PROSE


def test_the_learning_rate_is_that_of_the_table() -> None:
    rate = WSD(warmup=2000, decay=10_000, floor=0.025)
    assert 4e-4 * rate.scale(2000, 100_000) == 4e-4
    assert 4e-4 * rate.scale(100_000, 100_000) == pytest.approx(1e-5)
