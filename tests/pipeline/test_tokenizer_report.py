"""A report on a tokenizer whose every figure is known, and bounds on codes whose entropy is known."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from mmdlm.evaluate import KINDS, world
from mmdlm.predictability import Probe, predictability
from mmdlm.tokenizer_report import Digit, tokenizer_report
from tokenizers_mm import psnr, round_trip, to_tensor

QUICK = Probe(steps=2, batch=4, dim=32, depth=1, draws=2, progress=False)


class Grey:
    """Four codes: the mean brightness of each patch of 8 x 8."""

    size, downsample = 4, 8
    digits: tuple[int, ...] | None = None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(images.mean(1), 8)
        return ((means + 1) * 2).floor().long().clamp(0, 3)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        values = (codes.float() + 0.5) / 2 - 1
        return values.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)


class Grey22(Grey):
    """The same codes, of two digits of two levels each."""

    digits = (2, 2)


class Perfect(Grey):
    """Gives back the pictures that it was asked to encode."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return super().encode(images)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.images


class Drawings(HTMLParser):
    """The pictures of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.captions.append(values["alt"])
        self.sources += [values[name] for name in ("src", "href") if name in values]

    def handle_data(self, data):
        self.words.append(data)


def greys(*values: float, side: int = 16) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, side, side).clone()


# the report


def test_figures_of_a_tokenizer_worked_out_by_hand(tmp_path):
    held_out = greys(-0.75, -0.75, -0.25, 0.25)
    held_out[3, :, 8:] = 0.75  # codes: 4 x 0, 4 x 0, 4 x 1, 2 x 2 and 2 x 3, all met exactly
    report = tokenizer_report(Grey22(), held_out, held_out, tmp_path, probe=None)
    assert (report.used, report.size, report.grid, report.figures.num_images) == (4, 4, (2, 2), 4)
    assert report.unigram == pytest.approx(0.5 + 0.25 * 2 + 2 * 0.125 * 3)
    assert report.digits == (Digit((10, 6)), Digit((12, 4)))
    assert report.digits[1].bits == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert report.figures.psnr == 100
    assert (report.read, report.predictability) == ({}, None)
    told = str(report).splitlines()
    assert "codes used: 4 of 4 (100.0 %)" in told
    assert "digit 0: 2 of 2 levels, 0.95 of 1.00 bits" in told
    assert "bits per code, frequencies in these very pictures (unigram entropy): 1.750" in told
    assert "the masked model: skipped: no steps were asked for" in told


def test_the_page_shows_pictures_and_figures_and_needs_no_other_file(tmp_path):
    held_out = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = tokenizer_report(Grey(), held_out[:8], held_out, tmp_path / "new", probe=QUICK)
    text = (tmp_path / "new" / "report.html").read_text("utf-8")
    page = Drawings(text)
    assert all(source.startswith("data:") for source in page.sources)
    assert page.captions[0] == "originals, reconstructions below"
    trip = round_trip(Grey(), held_out)
    worst = ", ".join(f"{value:.1f}" for value in trip.psnr.sort().values[:8])
    assert page.captions[1:] == [f"the worst by PSNR: {worst} dB"]
    found = report.predictability
    assert found is not None
    assert f"{found.bits:.3f} +- {found.error:.3f}" in page.words
    assert f"{4 * found.bits:,.1f} +- {4 * found.error:,.1f}" in page.words
    assert any("2 steps of 4 rows on 8 training pictures, seed 0" in words for words in page.words)
    assert any(f"{found.parameters:,} parameters (1 layers of width 32)" in words for words in page.words)


def test_every_code_that_occurs_is_in_the_drawings(tmp_path):
    held_out = greys(*[-0.75] * 6, 0.25, 0.25)
    for tokenizer, count in ((Grey(), 1), (Grey22(), 2)):
        tokenizer_report(tokenizer, held_out, held_out, tmp_path, probe=None)
        text = (tmp_path / "report.html").read_text("utf-8")
        drawings = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", text)]
        assert len(drawings) == count
        told = [[title.text for title in drawing.iter("title")] for drawing in drawings]
        assert told[0] == ["rank 1: 75 % each", "rank 2: 25 % each"]
        if count == 2:
            assert told[1] == ["level 0: 100 %", "level 1: 0 %", "level 0: 75 %", "level 1: 25 %"]
            bars = [float(rect.get("height", "")) for rect in drawings[1].iter("rect") if len(rect)]
            assert bars == pytest.approx([100, 0, 75, 25], abs=0.1)


def test_a_page_of_one_picture_and_one_code(tmp_path):
    report = tokenizer_report(Grey22(), greys(0.1), greys(0.1), tmp_path, probe=QUICK)
    assert report.predictability is not None
    assert report.predictability.error == math.inf
    assert "+- inf" in str(report)
    assert report.unigram == 0
    assert report.figures.perplexity == 1


def test_scenes_are_read_after_the_round_trip_by_kind(tmp_path):
    sources = [world((kind,)) for kind in KINDS for _ in range(2)]
    scenes = [source.scene(number) for number, source in enumerate(sources)]
    images = to_tensor([source.image(scene) for source, scene in zip(sources, scenes, strict=True)])
    right = tokenizer_report(Perfect(), images, images, tmp_path, scenes=scenes, probe=None)
    assert {kind: (rate.right, rate.total) for kind, rate in right.read.items()} == dict.fromkeys(
        KINDS, (2, 2)
    )
    assert "read exactly, groups: 2 of 2, 100.0 % (34.2 to 100.0)" in str(right)
    swapped = [scenes[1], scenes[0], *scenes[2:]]
    some = tokenizer_report(Perfect(), images, images, tmp_path, scenes=swapped, probe=None)
    assert [rate.right for rate in some.read.values()] == [0, 2, 2, 2]
    none = tokenizer_report(Grey(), images, images, tmp_path, scenes=scenes, probe=None)
    assert [rate.right for rate in none.read.values()] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="1 scenes for 8"):
        tokenizer_report(Grey(), images, images, tmp_path, scenes=scenes[:1], probe=None)


def test_sheets_hold_each_original_above_its_reconstruction(tmp_path, monkeypatch):
    from mmdlm import tokenizer_report as module

    sheets = []
    monkeypatch.setattr(module, "sheet", lambda pairs, **layout: sheets.append(pairs) or pairs[0])
    values = [-0.7, -0.25, 0.15, 0.75]
    tokenizer_report(Grey(), greys(0.0), greys(*values), tmp_path, probe=None)
    first, worst = sheets
    middles = [[pair.getpixel((20, pair.height * row // 4))[0] for row in (1, 3)] for pair in first]
    back = Grey().decode(Grey().encode(greys(*values)))
    wanted = [
        [round((value + 1) * 127.5), round((float(one[0, 0, 0]) + 1) * 127.5)]
        for value, one in zip(values, back, strict=True)
    ]
    assert middles == wanted
    order = psnr(greys(*values), back).argsort(stable=True).tolist()
    assert [pair.getpixel((20, 20))[0] for pair in worst] == [wanted[number][0] for number in order]


# predictability


def alike(count: int, seed: int) -> torch.Tensor:
    """(count, 4, 4) codes, all of a picture the same one of four: 2 bits a picture, 1 / 8 bit a code."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(4, (count, 1, 1), generator=rng).expand(-1, 4, 4)


def test_codes_that_tell_one_another_are_predictable_and_others_are_not():
    probe = Probe(steps=120, dim=32, depth=1, progress=False)
    known = predictability(Grey(), alike(500, 0), alike(100, 1), probe=probe)
    assert 1 / 8 - 0.01 < known.bits < 0.4
    assert known.frequency == pytest.approx(2, abs=0.05)
    assert 0 < known.error < 0.05
    rng = torch.Generator().manual_seed(2)
    noise = torch.randint(4, (600, 4, 4), generator=rng)
    unknown = predictability(Grey(), noise[100:], noise[:100], probe=probe)
    assert 2 - 3 * unknown.error - 0.02 < unknown.bits < 2.4


def test_the_seed_decides_the_figures_and_the_global_generator_is_left_alone():
    found = []
    with torch.random.fork_rng(devices=[]):
        for number in range(2):
            torch.manual_seed(number)
            state = torch.get_rng_state()
            found.append(predictability(Grey22(), alike(9, 0), alike(5, 1), probe=QUICK))
            assert torch.equal(state, torch.get_rng_state())
    first, again = found
    assert first == again
    other = predictability(Grey22(), alike(9, 0), alike(5, 1), probe=replace(QUICK, seed=1))
    assert other.bits != first.bits


def test_the_error_shrinks_with_the_number_of_pictures():
    train, held_out = alike(9, 0), alike(400, 1)
    few, many = (predictability(Grey(), train, held_out[:n], probe=QUICK).error for n in (100, 400))
    assert many == pytest.approx(few / 2, rel=0.4)


def test_frequencies_count_half_a_code_more():
    train, held_out = torch.tensor([[[0, 0], [0, 3]]]), torch.tensor([[[0, 3], [1, 1]]])
    found = predictability(Grey(), train, held_out, probe=QUICK)
    wanted = [3.5 / 6, 1.5 / 6, 0.5 / 6, 0.5 / 6]
    assert found.frequency == pytest.approx(-sum(map(math.log2, wanted)) / 4)
    assert found.num_train == 1


def test_a_probe_is_as_wide_as_its_heads():
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        Probe(dim=48)
