"""Sources give every item once an epoch, resume exactly, and name file and line of what is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.images import ImageError, Skip, decode, fit
from mmdlm.data.indexed import Endless, InOrder, Listed, Shuffled
from mmdlm.data.rows import Columns
from mmdlm.data.sources import ImageFolder


def folder(path: Path, count: int = 7, **columns) -> Path:
    """Pictures whose red is their number."""
    path.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"number {number}", **columns})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write(path: Path, text: str, name: str = "metadata.jsonl") -> Path:
    (path / name).write_text(text, encoding="utf-8")
    return path


def test_samples_hold_picture_texts_and_the_rest(tmp_path):
    source = ImageFolder(folder(tmp_path, style="flat"), order=InOrder())
    assert len(source) == 7
    sample = source[3]
    assert (sample.name, sample.texts, sample.extra) == ("3.png", ("number 3",), {"style": "flat"})
    assert sample.image is not None
    assert sample.image.shape == (3, 4, 3)
    assert (sample.image == (3, 0, 0)).all()
    assert source[-1].name == "6.png"
    assert [s.name for s in source] == [f"{n}.png" for n in range(7)]
    assert list(source.texts()) == [f"number {n}" for n in range(7)]
    assert source.texts_of(3) == ("number 3",)
    with pytest.raises(IndexError):
        source[7]


def test_load_is_the_callers(tmp_path):
    source = ImageFolder(folder(tmp_path), load=lambda path: fit(decode(path), 2))
    assert source[0].image.shape == (2, 2, 3)
    (tmp_path / "0.png").unlink()
    Image.new("RGBA", (1, 1)).save(tmp_path / "0.png")
    assert ImageFolder(tmp_path, load=partial(decode, background=(1, 2, 3)))[0].image.tolist() == [
        [[1, 2, 3]]
    ]


def test_columns_are_configurable(tmp_path):
    folder(tmp_path, 1, captions=["a", "b", "a", "number 0"], q="how many?", a="one")
    columns = Columns(texts=("text", "captions"), question="q", answer="a")
    sample = ImageFolder(tmp_path, columns=columns)[0]
    assert (sample.texts, sample.question, sample.answer) == (("number 0", "a", "b"), "how many?", "one")
    assert sample.extra == {}
    assert ImageFolder(tmp_path, columns=Columns(texts=("captions",)))[0].texts == ("a", "b", "number 0")
    assert ImageFolder(tmp_path, columns=Columns(texts=()))[0].texts == ()


def test_csv_is_read_as_jsonl_is(tmp_path):
    folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    write(
        tmp_path,
        '\ufefffile_name,text,kind\r\n0.png,"a ""red""\nthing, small",x\r\n1.png,b,y\r\n',
        "metadata.csv",
    )
    source = ImageFolder(tmp_path)
    assert source[0].texts == ('a "red"\nthing, small',)
    assert (source[1].texts, source[1].extra) == (("b",), {"kind": "y"})


def test_unusual_text_survives(tmp_path):
    folder(tmp_path, 1)
    text = "line\u2028separator \U0001f9d1\u200d\U0001f33e <mask> \x85"
    write(
        tmp_path, "\ufeff\n" + json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) + "\r\n\n"
    )
    write(tmp_path, json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) + "\r\n\n")
    assert ImageFolder(tmp_path)[0].texts == (text,)


GOOD = '{"file_name": "0.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "wanted an object"),
        ('{"text": "a"}', "file_name"),
        ('{"file_name": 3, "text": "a"}', "file_name"),
        ('{"file_name": "0.png", "caption": "a"}', "no column 'text'; there are caption"),
        ('{"file_name": "0.png", "text": 3}', "wants a text or a list of texts, got 3"),
        ('{"file_name": "0.png", "text": []}', "wants a text or a list"),
        ('{"file_name": "0.png", "text": ["a", null]}', "wants a text or a list"),
        ('{"file_name": "../0.png", "text": "a"}', "does not stay inside"),
        ('{"file_name": "a/../../0.png", "text": "a"}', "does not stay inside"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "does not stay inside"),
        ('{"file_name": "..\\\\0.png", "text": "a"}', "does not stay inside"),
        ('{"file_name": "C:0.png", "text": "a"}', "does not stay inside"),
        ('{"file_name": "", "text": "a"}', "does not stay inside"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, message):
    write(folder(tmp_path), f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        ImageFolder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'metadata.jsonl'}:3:")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(GOOD.encode() + b'{"file_name": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2: not JSON"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n0.png\n", r":2: 1 cells under 2 columns"),
        ("file_name,text\n0.png,a\n0.png,a,b\n", r":3: 3 cells under 2 columns"),
        ('file_name,text\n0.png,"a\n', "not CSV"),
        ("file_name,text\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_errors_of_csv(tmp_path, text, message):
    folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path, text, "metadata.csv")
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_a_folder_without_metadata_says_where_some_is(tmp_path):
    folder(tmp_path / "train")
    with pytest.raises(ValueError, match=r"neither.*train"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        ImageFolder(tmp_path / "absent")
    write(tmp_path / "train", "file_name,text\n", "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata.jsonl and metadata.csv"):
        ImageFolder(tmp_path / "train")


def test_broken_pictures_stop_or_are_skipped_and_counted(tmp_path):
    folder(tmp_path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "6.png").write_bytes(b"no picture")
    source = ImageFolder(tmp_path, order=InOrder())
    with pytest.raises(ImageError, match=r"2\.png: no such file"):
        list(source)
    skip = Skip()
    source = ImageFolder(tmp_path, order=InOrder(), on_error=skip)
    for _ in range(2):
        assert [sample.name for sample in source] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert skip.names == (str(tmp_path / "2.png"), str(tmp_path / "6.png"))
    with pytest.raises(ImageError):
        source[2]


def test_a_shuffle_is_a_permutation_by_seed_and_epoch():
    orders = [tuple(Shuffled(seed)(50, epoch)) for seed in range(5) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 25
    assert tuple(Shuffled(1)(50, 2)) == tuple(Shuffled(1)(50, 2))


def test_a_shuffle_is_the_stated_integer_arithmetic():
    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from state 0
    for seed, epoch in ((0, 0), (12, 3), (2**70 + 1, 9)):
        key = mix(mix(seed % 2**64) ^ epoch)
        order = sorted(range(40), key=lambda index: mix((index + key) % 2**64))
        assert Shuffled(seed)(40, epoch).tolist() == order


def test_a_shuffle_is_uniform():
    counts = np.zeros((4, 4))
    pairs = np.zeros((4, 4))
    for epoch in range(3000):
        order = Shuffled(7)(4, epoch)
        counts[np.arange(4), order] += 1
        pairs[order[0], order[1]] += 1
    expected = 3000 / 4
    assert ((counts - expected) ** 2 / expected).sum() < 28  # 9 degrees of freedom, p = 0.001
    off = pairs[~np.eye(4, dtype=bool)]
    assert ((off - 250) ** 2 / 250).sum() < 31.3  # 11 degrees of freedom, p = 0.001


@pytest.mark.parametrize("stop", range(23))
def test_a_source_resumes_exactly(stop):
    def take(source, count):
        items = []
        while len(items) < count:
            for item in source:
                items.append(item)
                if len(items) == count:
                    break
        return items

    whole = take(Listed(lambda index: index, 7, order=Shuffled(3)), 23)
    for epoch in range(3):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert whole[:7] != whole[7:14]
    first = Listed(lambda index: index, 7, order=Shuffled(3))
    begun = take(first, stop) if stop else []
    second = Listed(lambda index: index, 7, order=Shuffled(3))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + take(second, 23 - stop) == whole


def test_a_state_of_another_size_is_refused():
    state = Listed(str, 7).state_dict()
    with pytest.raises(ValueError, match="7 items, this one has 8"):
        Listed(str, 8).load_state_dict(state)


def test_an_endless_source_counts_on():
    source = Endless(lambda index: index * index)
    items = iter(source)
    assert [next(items) for _ in range(4)] == [0, 1, 4, 9]
    again = Endless(lambda index: index * index)
    again.load_state_dict(source.state_dict())
    assert next(iter(again)) == 16
