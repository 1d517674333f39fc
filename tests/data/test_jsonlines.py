"""Lines of JSON give samples with and without pictures, are not held in memory, and resume exactly."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from mmdlm.data.images import ImageError, Skip, decode, fit
from mmdlm.data.indexed import InOrder, Shuffled, forever
from mmdlm.data.jsonlines import JsonLines
from mmdlm.data.rows import Columns
from mmdlm.data.sample import SampleError

NASTY = Path(__file__).parent / "nasty"


def write(path: Path, *rows: dict | str | bytes) -> Path:
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in lines))
    return path


def seven(path: Path, first: int = 0) -> Path:
    """Pictures whose red is their number, in a folder beside."""
    (path.parent / "pictures").mkdir(exist_ok=True)
    rows = []
    for red in range(first, first + 7):
        Image.new("RGB", (4, 3), (red, 0, 0)).save(path.parent / "pictures" / f"{red}.png")
        rows.append({"image": f"pictures/{red}.png", "text": [f"number {red}", "a picture"], "id": red})
    return write(path, *rows)


def test_samples_hold_picture_texts_and_the_rest(tmp_path):
    source = JsonLines([seven(tmp_path / "a.jsonl"), seven(tmp_path / "b.jsonl", 7)], order=InOrder())
    assert len(source) == 14
    for red, sample in enumerate(source):
        assert sample.name == f"{tmp_path}/{'ab'[red // 7]}.jsonl:{red % 7 + 1}"
        assert sample.texts == (f"number {red}", "a picture")
        assert sample.extra == {"id": red, "image": f"pictures/{red}.png"}
        assert (sample.image == (red, 0, 0)).all()
    assert source[-1].extra["id"] == 13
    assert list(source.texts())[::2] == [f"number {red}" for red in range(14)]
    assert source.texts_of(3) == ("number 3", "a picture")
    with pytest.raises(IndexError):
        source[14]


def test_rows_of_text_alone_blank_lines_and_marks(tmp_path):
    text = "line\u2028separator \u00e9 \x85"
    path = write(
        tmp_path / "a.jsonl",
        '\ufeff{"text": "a"}',
        "",
        " \t",
        {"text": text, "image": None},
        '{"text": "c"}\r',
    )
    source = JsonLines(path, order=InOrder())
    assert [(sample.name, sample.texts, sample.image) for sample in source] == [
        (f"{path}:1", ("a",), None),
        (f"{path}:4", (text,), None),
        (f"{path}:5", ("c",), None),
    ]
    path.write_text('{"text": "no newline"}')
    assert JsonLines(path)[0].texts == ("no newline",)


def test_columns_root_and_load_are_the_callers(tmp_path):
    seven(tmp_path / "a.jsonl")
    (tmp_path / "below").mkdir()
    row = {"file": "0.png", "caption": "a", "q": "which?", "a": "1"}
    path = write(tmp_path / "below" / "b.jsonl", row)
    source = JsonLines(
        path,
        columns=Columns(texts=("caption",), question="q", answer="a", image="file"),
        root=tmp_path / "pictures",
        load=lambda path: fit(decode(path), 2),
    )
    assert source[0].image.shape == (2, 2, 3)
    assert (source[0].texts, source[0].question, source[0].answer) == (("a",), "which?", "1")
    assert source[0].extra == {"file": "0.png"}
    with pytest.raises(ValueError, match=r"b\.jsonl: no row has the image column 'picture'"):
        JsonLines(path, columns=Columns(image="picture"))


def test_every_position_resumes_exactly(tmp_path):
    paths = [seven(tmp_path / "a.jsonl"), seven(tmp_path / "b.jsonl", 7)]

    def source():
        return JsonLines(paths, order=Shuffled(3))

    whole = [sample.name for sample in islice(forever(source()), 30)]
    assert len(set(whole[:14])) == len(set(whole[14:28])) == 14
    for stop in range(30):
        first, second = source(), source()
        begun = [sample.name for sample in islice(forever(first), stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [sample.name for sample in islice(forever(second), 30 - stop)] == whole


BAD = [
    ("{", "not JSON"),
    (b'{"text": "\xff\xfe"}', "not JSON"),
    ("[1]", "wanted an object, got a list"),
    ('{"caption": "a"}', "no column 'text'; there are caption"),
    ('{"text": 3}', "wants a text or a list of texts, got 3"),
    ('{"text": []}', "wants a text or a list"),
    ('{"text": "a", "image": 3}', "wanted a file name under 'image', got 3"),
    ('{"text": "a", "image": "../a.png"}', "does not stay inside"),
    ('{"text": "a", "image": "/etc/passwd"}', "does not stay inside"),
    ('{"text": "a", "image": "C:a.png"}', "does not stay inside"),
    ('{"text": "a", "image": ""}', "does not stay inside"),
    ('{"text": "a", "image": "absent.png"}', "picture 'absent.png': no such file"),
    ('{"text": "a", "image": "nasty.png"}', "picture 'nasty.png': "),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_rows_name_file_and_line(tmp_path, line, message):
    (tmp_path / "nasty.png").write_bytes((NASTY / "png_decompression_dos.png").read_bytes())
    source = JsonLines(write(tmp_path / "a.jsonl", {"text": "a"}, "", line), order=InOrder())
    with pytest.raises(SampleError, match=message) as caught:
        list(source)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:3: ")
    assert isinstance(caught.value, ImageError) == message.startswith("picture")


def test_bad_rows_may_be_skipped(tmp_path):
    (tmp_path / "nasty.png").write_bytes((NASTY / "png_decompression_dos.png").read_bytes())
    path, skip = write(tmp_path / "a.jsonl", *(line for line, _ in BAD), {"text": "good"}), Skip()
    source = JsonLines(path, order=InOrder(), on_error=skip)
    for _ in range(2):
        assert [sample.texts for sample in source] == [("good",)]
    assert skip.names == tuple(f"{path}:{line}" for line in range(1, len(BAD) + 1))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot be read"):
        JsonLines(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
        JsonLines(write(tmp_path / "a.jsonl", "", " "))
    with pytest.raises(ValueError, match="at least one path"):
        JsonLines([])
    source = JsonLines(write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}))
    write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(SampleError, match=r"a\.jsonl: wanted 14 bytes at offset 14, there are 0"):
        source[1]


def test_rows_are_not_held_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": "x" * 1000} for _ in range(5000)))
    tracemalloc.start()
    try:
        source = JsonLines(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 300_000  # of 5 MB
    assert len(source) == 5000
