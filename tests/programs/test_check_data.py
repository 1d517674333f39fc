"""check_data tells bad rows, counts and duplicates of folders, files of rows and shards; it draws a sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data import ImageError, Listed, Sample, ShardPlan, encode_shards

CHECK = "train/check_data.py"


def check(program, data: Path, out: Path, *more: object):
    return program(CHECK, data, "--out", out / "check.png", *more)


def sheet_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def write(folder: Path, rows: list[object]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_every_bad_row_of_a_folder_is_told_and_the_rest_counted(program, tmp_path):
    for name, size in (("a", (10, 8)), ("b", (20, 8)), ("c", (30, 40)), ("again", (10, 8))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    write(tmp_path, [
        {"file_name": "a.png", "text": ["one", "one too"]},
        {"file_name": "broken.png", "text": "one"},
        {"file_name": "broken.png", "text": "two"},
        {"file_name": "b.png", "text": "three"},
        {"file_name": "../b.png", "text": "out"},
        {"file_name": "b.png"},
        "{",
        {"text": "no picture"},
        {"file_name": "c.png", "text": "  "},
        {"file_name": "again.png", "text": "three"},
        {"file_name": "a.png", "text": ["one", "one too"]},
    ])  # fmt: skip
    done = check(program, tmp_path, tmp_path / "out")
    assert done.status == 1
    told = "\n".join(done.lines)
    for words in (
        "11 rows",
        "rows              5   1 of them seen before",
        "texts             7   3 of them seen before",
        "pictures          5   2 of them seen before",
        "characters a text: 2 to 7, median 5",
        "pixels: width 10 to 30, median 10; height 8 to 40, median 8",
        "without text: 1 rows, the first is",
        "bad rows: 6",
        "check.png: 5 samples",
    ):
        assert words in told
    bad = [line for line in done.lines if line.startswith("  ")]
    assert len(bad) == 6
    assert sum("broken.png" in line for line in bad) == 2
    places = "metadata.jsonl:5", "metadata.jsonl:6", "metadata.jsonl:7", "metadata.jsonl:8"
    assert all(any(place in line for line in bad) for place in places)
    assert sheet_size(tmp_path / "out" / "check.png")[0] == 4 * 168 + 8


def test_a_folder_without_fault_ends_with_0_and_16_samples_of_all(program, tmp_path, imagefolder):
    rows = [json.loads(line) for line in (imagefolder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        name = row["file_name"]
        (tmp_path / name).write_bytes((imagefolder / name).read_bytes())
    write(tmp_path, [row for row in rows if row["file_name"] != "broken.png"] * 3)
    done = check(program, tmp_path, tmp_path)
    assert (done.status, done.err) == (0, "")
    assert "bad rows: none" in done.lines
    assert done.lines[-1] == f"{tmp_path / 'check.png'}: 16 samples"


def test_files_of_rows_are_known_by_their_ending(program, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n{"txt": "c"}\n')
    done = check(program, tmp_path / "a.jsonl", tmp_path)
    assert done.status == 1
    assert "JsonLines, 2 rows" in done.lines[0]
    assert "a.jsonl:2: no column 'text'" in done.lines[-2]
    assert check(program, tmp_path / "a.jsonl", tmp_path, "--columns", "txt").lines[1].split() == [
        "rows",
        "1",
    ]
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert "TextFiles, 2 rows" in check(program, tmp_path / "b.txt", tmp_path).lines[0]
    done = check(program, tmp_path, tmp_path)
    assert done.status == 2
    assert "found .jsonl and .txt" in done.err
    assert check(program, tmp_path / "nowhere", tmp_path).status == 2


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    def item(number: int) -> Sample:
        if number == 7:
            raise ImageError("7.png", "not a picture")
        return Sample(f"{number}.png", np.full((4, 4, 3), number, np.uint8), (f"number {number}",))

    encode_shards(
        Listed(item, 30),
        tmp_path / "codes",
        encode=lambda images: np.stack(images)[:, :, :, 0].astype(int),
        plan=ShardPlan(num_codes=64, shard_size=10),
        on_error=lambda error: None,
    )
    return tmp_path / "codes"


def test_shards_are_read_to_the_last_byte(program, tmp_path, shards, tiny_folder):
    done = check(program, shards, tmp_path, "--model", tiny_folder)
    assert done.status == 1  # what encoding left out is told
    assert "3 code shards, 4 x 4 of 64 codes" in done.lines[0]
    assert "rows             29" in done.lines
    assert "  7.png: left out when encoding (not a picture)" in done.lines
    drawn = (tmp_path / "check.png").read_bytes()
    path = shards / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = check(program, shards, tmp_path)
    assert done.status == 1
    assert "rows             19" in done.lines
    assert any(f"{path}: its bytes are not those that were written" in line for line in done.lines)
    assert (tmp_path / "check.png").read_bytes() != drawn
    path.unlink()
    done = check(program, shards, tmp_path)
    assert done.status == 1
    assert f"{path}: cannot be read" in done.lines[0]


@pytest.mark.parametrize("option", ["pieces", "texts,images"])
def test_documents_are_checked_piece_by_piece(program, tmp_path, option):
    for number in range(3):
        Image.new("RGB", (8 + number, 8), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    texts, images = ["one", None, "two", None], [None, "0.png", None, "1.png"]
    whole = [{"text": text, "image": image} for text, image in zip(texts, images, strict=True)]
    rows = [
        {"pieces": whole, "texts": texts, "images": images},
        {"pieces": [{"text": "one"}, {"image": "2.png"}], "texts": ["one", None], "images": [None, "2.png"]},
        {"pieces": [{"image": "none.png"}], "texts": [None], "images": ["none.png"]},
        {"pieces": [{}], "texts": [None], "images": [None]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = check(program, path, tmp_path, "--pieces", option)
    assert done.status == 1
    told = "\n".join(done.lines)
    for words in (
        "rows              2",
        "texts             3   1 of them seen before",
        "pictures          3",
        "width 8 to 10",
        "bad rows: 2",
        "rows.jsonl:3: picture 'none.png'",
        "rows.jsonl:4: piece 0 of",
        "check.png: 2 samples",
    ):
        assert words in told
    done = check(program, path, tmp_path, "--pieces", option, "--columns", "caption")
    assert done.status == 2
    assert "with pieces, no texts" in done.err


def test_shards_of_documents_are_drawn_by_their_first_picture(program, tmp_path):
    def item(number: int) -> Sample:
        picture = np.full((4, 4, 3), number, np.uint8)
        return Sample(str(number), pieces=(f"text {number}", *[picture] * (number % 3)))

    encode = {"encode": lambda images: np.stack(images)[:, :, :, 0].astype(int)}
    encode_shards(Listed(item, 9), tmp_path / "codes", plan=ShardPlan(num_codes=64), **encode)
    done = check(program, tmp_path / "codes", tmp_path)
    assert done.status == 0
    assert "rows              9" in done.lines
    assert "pictures          9   3 of them seen before" in done.lines
    assert done.lines[-1].endswith("9 samples")
