"""The source that reads a path is told by its files; a census counts what it was shown."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data import (
    Census,
    Columns,
    Encoded,
    ImageFolder,
    JsonLines,
    Sample,
    TextFiles,
    WebDataset,
    data_digest,
    open_source,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "text": "a", "words": "b"}\n')
    return tmp_path


def test_files_are_read_by_what_is_made_for_them(folder):
    rows = open_source(folder)
    assert isinstance(rows, JsonLines)
    assert (len(rows), rows[0].texts) == (1, ("a",))
    assert open_source(folder / "rows.jsonl", columns=Columns(texts=("words",)))[0].texts == ("b",)
    (folder / "text").mkdir()
    (folder / "text" / "b.txt").write_text("one\ntwo\n")
    lines = open_source(folder / "text")
    assert isinstance(lines, TextFiles)
    assert [sample.texts for sample in lines] == [("one",), ("two",)]
    with tarfile.open(folder / "text" / "c.tar", "w") as tar:
        for name, data in (("1.png", (folder / "a.png").read_bytes()), ("1.txt", b"red")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = open_source(folder / "text" / "c.tar")
    assert isinstance(found, WebDataset)
    assert found[0].texts == ("red",)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "c"}\n')
    assert isinstance(open_source(folder), ImageFolder)


def test_what_no_source_reads_is_said(folder):
    with pytest.raises(ValueError, match=r"nowhere: there is no such"):
        open_source(folder / "nowhere")
    with pytest.raises(ValueError, match=r"a\.png: wanted .*found \.png"):
        open_source(folder / "a.png")
    (folder / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"found \.jsonl and \.txt"):
        open_source(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="found nothing"):
        open_source(folder / "empty")


def test_the_digest_of_data_tells_other_data(folder):
    first = data_digest(folder)
    assert data_digest(folder) == first
    assert len(first) == 16
    (folder / "rows.jsonl").write_text('{"image": "a.png", "text": "z", "words": "b"}\n')  # of the same size
    second = data_digest(folder)
    (folder / "b.png").write_bytes(b"")
    third = data_digest(folder)
    (folder / "b.png").write_bytes(b"1")
    assert len({first, second, third, data_digest(folder)}) == 4
    assert data_digest(folder / "rows.jsonl") != data_digest(folder / "a.png")


def test_a_census_counts_and_knows_what_it_has_seen():
    census = Census()
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    census.add(Sample("a", image, ("one", "two")))
    census.add(Sample("b", image, ("two", "one")))  # other order, another row
    census.add(
        Sample("c", image.reshape(2, 8, 3), ("one",), question="which?")
    )  # the same bytes, another picture
    census.add(Sample("d", image.reshape(2, 8, 3), ("one",), question="who?"))
    census.add(Sample("e", None, ("",)))
    census.add(Sample("f", None, ()))
    census.add(Encoded("g", np.zeros((2, 2), np.int32), ("one", "\ud800")))
    census.add(Encoded("h", np.zeros((2, 2), np.int32), ("one", "\ud800")))
    assert census.counts == {"rows": 8, "texts": 11, "pictures": 6}
    assert census.repeated == {"rows": 1, "texts": 7, "pictures": 3}
    assert census.wordless == ["e", "f"]
    census.bad["x"] = "why"
    told = list(census.lines())
    assert told[-2:] == ["bad rows: 1", "  x: why"]
    assert "pixels: width 4 to 8, median 6; height 2 to 4, median 3" in told
    assert json.dumps(told)
    assert list(Census().lines())[-1] == "bad rows: none"
