"""What holds for every test: few threads, no network, CUDA or failure, and a tiny model."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmdlm import Pipeline

# Read when torch and the hub client are first imported, so set here and not in a fixture.
MAX_THREADS = 2
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1" if os.environ.get("OMP_NUM_THREADS") == "1" else str(MAX_THREADS)
os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # before any skipif of the test itself
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.fail("needs CUDA and finds none: run it on a machine with a GPU", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test marked `gpu` that skips itself has failed: what `make test-gpu` promises must have run."""
    report = yield
    if item.get_closest_marker("gpu") is not None and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped itself; a test marked gpu runs or fails"
    return report


@pytest.fixture(scope="session")
def tiny() -> Pipeline:
    """An untrained model, the same in every session: 64 x 64 pictures in 4 x 4 codes, four steps a sample.

    Its weights are so large that every input matters. Do not change it: make a pipeline of its parts.
    """
    import torch

    from mmdlm import Pipeline
    from mmdlm.canvas import Layout
    from mmdlm.codec import Codec
    from mmdlm.evaluate import KINDS, world
    from mmdlm.jobs import TASKS
    from mmdlm.pretrained import Settings
    from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, Vocab

    source = world(KINDS)
    scenes = [(source.scene(index), index) for index in range(150)]
    said = [text for one in scenes for text in (source.caption(*one), *source.question(*one))]
    text = BytePairTokenizer.train(said, size=360)
    none = (0, 0, 0, 0)
    config = AutoencoderConfig(
        channels=(4, 8, 8, 8), encoder_blocks=none, decoder_blocks=none, levels=(4, 4, 4)
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        image = Autoencoder(config).eval()
        image.encoder.project.weight.mul_(4.0)
        vocab = Vocab.build(num_text=text.size, num_codes=image.size)
        layout = Layout(vocab=vocab, grid=(4, 4), caption=64, question=28, answer=6)
        settings = {task: Settings(steps=4) for task in TASKS}
        pipe = Pipeline.untrained(Codec(text, image, layout), dim=32, depth=1, settings=settings)
        for weight in pipe.transformer.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    pipe.transformer.eval()
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_pretrained(folder, card="# tiny\n")
    return folder


@pytest.fixture
def small_law(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The law that pairs are held against is that of fewer scenes: seconds become tenths."""
    from mmdlm import law

    monkeypatch.setattr(law, "_LAW_SCENES", 1500)
    law._law.cache_clear()
    yield
    law._law.cache_clear()
