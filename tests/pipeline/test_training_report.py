"""The page of a run holds its curves, pictures, configuration and use, needs no other file, and escapes."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mmdlm.data import Encoded
from mmdlm.training_report import curves, training_report, write_statistics

NASTY = "<script>alert('x')</script> & \"quoted\""
SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """Tags with their attributes, tags that are open, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def lines_of(svg: str, width: str = "1.8") -> list[list[tuple[float, float]]]:
    """The polylines of the data, as points on the drawing."""
    return [
        [tuple(map(float, point.split(","))) for point in element.get("points", "").split()]
        for element in ElementTree.fromstring(svg).iter("polyline")
        if element.get("stroke-width") == width
    ]


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "stage"
    home.mkdir()
    with (home / "metrics.jsonl").open("w") as file:
        for step in range(10, 101, 10):
            losses = {"loss/text": 2 / step, "loss/image": 8 / step, "bound/text": 3 / step}
            record = {"step": step, "loss": 10 / step, **losses, "lr": 1e-3, "grad_norm": 1.0}
            file.write(json.dumps({**record, "seconds": 6.0 * step, "tokens_per_second": 100 + step}) + "\n")
            if step % 50 == 0:
                file.write(json.dumps({"step": step, "validation": 5 / step, "captions.equal": 0.5}) + "\n")
        file.write('{"step": 100, "skipped": 1, "samples": "a.png", "broken": null}\n')
    configuration = {
        "class": "Run",
        "steps": 100,
        "optimizer": {"class": "AdamW", "lr": 0.5},
        "hooks": [[1, NASTY]],
    }
    (home / "run.json").write_text(json.dumps(configuration))
    for step in range(1, 11):
        Image.new("RGB", (4, 4), (20 * step, 0, 0)).save(home / f"samples-{step:06d}.png")
    (home / "captions-000005.txt").write_text("old\told\n")
    (home / "captions-000010.txt").write_text(f"a red bar\t{NASTY}\n")
    (home / "data.json").write_text(json.dumps({"pairs": 12, "tokens a text": "3 to 9"}))
    return home


def test_the_page_needs_nothing_but_itself_and_is_well_formed(folder):
    path = training_report(folder)
    assert path == folder / "report.html"
    page = path.read_text("utf-8")
    reader = Reader(page)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("link", "script", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "http" not in page
    assert "url(" not in page
    assert NASTY in reader.words


def test_it_tells_what_is_in_the_folder(folder):
    words = " ".join(Reader(training_report(folder).read_text("utf-8")).words)
    for told in (
        "100 of 100", "10 min 0 s", "tokens a second, median 160", "loss/image, last 0.08",
        "0.05 (lowest 0.05 at step 100)", "updates left out, not finite 1", "samples after 10 steps",
        "a red bar", "pairs 12", "tokens a text 3 to 9", "optimizer AdamW", "optimizer.lr 0.5",
        "captions.equal: 0.5", "There is no checkpoint yet",
    ):  # fmt: skip
        assert told in words, told
    assert "old" not in words.split()


def test_of_many_sheets_some_are_shown_and_the_last(folder):
    page = training_report(folder).read_text("utf-8")
    shown = [word for word in Reader(page).words if word.startswith("samples after")]
    assert [int(word.split()[2]) for word in shown] == [2, 4, 5, 7, 9, 10]


def test_it_tells_how_to_use_the_model_that_there_is(folder):
    model = folder.parent / "model"
    words = Reader(training_report(folder, model=model).read_text("utf-8")).words
    (code,) = [word for word in words if "from_pretrained" in word]
    assert repr(str(model)) in code
    assert "text_to_image('a red bar', seed=0)" in code
    compile(code, "page", "exec")
    for step in (4, 10):
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder / "best").mkdir()
    words = " ".join(Reader(training_report(folder).read_text("utf-8")).words)
    assert "step-00000010" in words
    assert "load_best(Path(" in words


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no records of a training run"):
        training_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="wanted a JSON object, got a list"):
        training_report(tmp_path)


def test_statistics_of_the_data_are_written_for_the_page(folder):
    codes = np.array([[0, 1], [1, 5]])
    pairs = [Encoded("a", codes, ("red", "a red bar")), Encoded("b", codes, ("red",))]
    write_statistics(folder / "new", pairs, lambda text: len(text.split()))
    assert json.loads((folder / "new/data.json").read_text()) == {
        "pictures": 2,
        "texts": 3,
        "texts that differ": 2,
        "tokens a text": "1 to 3, median 1",
        "codes a picture": "2 x 2",
        "codes that occur": 3,
    }
    write_statistics(folder / "new", [Encoded("c", None, ("red",))], len)
    told = {"pictures": 0, "texts": 1, "texts that differ": 1, "tokens a text": "3 to 3, median 3"}
    assert json.loads((folder / "new/data.json").read_text()) == told
    with pytest.raises(ValueError, match="at least one pair"):
        write_statistics(folder, [], len)


def test_curves_are_where_the_values_are():
    svg = curves({"a": [(0, 1.0), (50, 3.0), (100, 2.0)], NASTY: [(0, 2.0), (100, 2.0)]}, title=NASTY)
    (first, second) = lines_of(svg)
    assert first[0][0] == second[0][0]
    assert first[1][0] == pytest.approx((first[0][0] + first[2][0]) / 2, abs=0.1)
    assert first[1][1] < first[2][1] < first[0][1], "up is more"
    assert second[0][1] == second[1][1] == first[2][1]
    said = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert NASTY in said
    assert f"{NASTY}: 2" in said
    titles = [element.text for element in ElementTree.fromstring(svg).iter("title")]
    assert "a at 50: 3" in titles


def test_wide_ranges_are_logarithmic_and_long_lines_are_averaged():
    points = [(float(step), 10.0 ** (-step / 1000)) for step in range(4001)]
    (line,) = lines_of(curves({"a": points}, title="t"))
    assert len(line) == 400
    heights = [y for _, y in line]
    assert heights[200] == pytest.approx((heights[0] + heights[-1]) / 2, abs=2)  # straight on that axis
    assert len(lines_of(curves({"a": points[:1]}, title="t"))[0]) == 1
    assert lines_of(curves({"a": [(1, 0.0), (2, 0.0)]}, title="t"))
    with pytest.raises(ValueError, match="need points"):
        curves({"a": []}, title="t")
