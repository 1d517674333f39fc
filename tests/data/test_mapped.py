"""Data sets of torchvision and Hugging Face become sources: texts, exact resume, errors by name."""

from __future__ import annotations

import io
import json
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.images import ImageError, Skip, fit, to_rgb
from mmdlm.data.indexed import InOrder, Shuffled, forever
from mmdlm.data.mapped import FromPairs, FromRows, Mapped
from mmdlm.data.rows import Columns
from mmdlm.data.sample import SampleError
from tokenizers_mm import prepare_torchvision

NASTY = Path(__file__).parent / "nasty"


class Rows:
    """A table as `datasets.Dataset` offers one."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def torchvision():
    prepare_torchvision()
    import torchvision

    return torchvision


def fashion(path: Path, torchvision):
    """A tiny one, written as the published files are; picture n is all n, of class 9 - n."""
    raw = path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(10, dtype=np.uint8), 28 * 28)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, 10, 28, 28) + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, 10) + bytes(range(9, -1, -1))
        )
    return torchvision.datasets.FashionMNIST(path, train=True)


def test_a_data_set_of_torchvision(tmp_path, torchvision):
    dataset = fashion(tmp_path, torchvision)
    sample = FromPairs(dataset.classes, ("a photo of a {}", "{}"), load=lambda image: fit(to_rgb(image), 14))
    source = Mapped(dataset, sample, order=InOrder())
    found = list(source)
    assert len(source) == len(found) == 10
    assert [one.name for one in found] == [f"FashionMNIST[{n}]" for n in range(10)]
    assert found[0].texts == ("a photo of a Ankle boot", "Ankle boot")
    assert [one.extra for one in found] == [{"label": 9 - n} for n in range(10)]
    for n, one in enumerate(found):
        assert one.image is not None
        assert one.image.shape == (14, 14, 3)
        assert (one.image == n).all()
    with pytest.raises(IndexError):
        source[10]


def test_columns_of_classes_and_names_with_braces():
    rows = Rows([{"img": Image.new("L", (2, 2), 7), "fine": 1}])
    sample = Mapped(rows, FromPairs(["a", "{0}"], ("<{}>",), image="img", label="fine"))[0]
    assert (sample.texts, sample.image.tolist()) == (("<{0}>",), [[[7] * 3] * 2] * 2)
    with pytest.raises(ValueError, match="wanted templates with"):
        FromPairs(["a"], ("a photo",))


@pytest.mark.parametrize("shape", ["pairs", "rows"])
def test_every_position_resumes_exactly(shape, torchvision):
    def source():
        if shape == "pairs":
            fake = torchvision.datasets.FakeData(7, (3, 5, 4), num_classes=3, random_offset=1)
            return Mapped(fake, FromPairs(["a", "b", "c"]), order=Shuffled(1))
        rows = Rows([{"image": png(red), "text": str(red)} for red in range(7)])
        return Mapped(rows, FromRows(), order=Shuffled(1))

    def key(sample):
        return sample.name, sample.texts, sample.image.tobytes()

    whole = [key(sample) for sample in islice(forever(source()), 16)]
    assert len(set(whole[:7])) == 7
    for stop in range(16):
        first, second = source(), source()
        begun = [key(sample) for sample in islice(forever(first), stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [key(sample) for sample in islice(forever(second), 16 - stop)] == whole


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (4, 3), (9, 0, 0)),
        Image.new("RGBA", (4, 3), (9, 0, 0, 255)),
        png(9),
        {"bytes": png(9), "path": None},
        np.full((3, 4, 3), (9, 0, 0), np.uint8),
    ],
)
def test_rows_with_any_kind_of_picture(picture):
    row = {"image": picture, "captions": ["a", "b", "a"], "q": "which?", "a": "1", "id": 5}
    columns = Columns(texts=("captions",), question="q", answer="a")
    sample = Mapped(Rows([row]), FromRows(columns))[0]
    assert (sample.name, sample.texts) == ("Rows[0]", ("a", "b"))
    assert (sample.question, sample.answer, sample.extra) == ("which?", "1", {"id": 5})
    assert (sample.image == np.full((3, 4, 3), (9, 0, 0))).all()


def test_rows_of_text_alone():
    source = Mapped(Rows([{"text": "a"}, {"text": "b", "image": None}]), FromRows())
    assert [source[0].image, source[1].image] == [None, None]
    with pytest.raises(SampleError, match=r"Rows\[0\]: no column 'image'; there are text"):
        Mapped(Rows([{"text": "a"}]), FromRows(Columns(image="image")))[0]


def test_items_that_are_not_so_are_named_and_may_be_skipped(torchvision):
    good = {"image": png(1), "text": "a"}
    bad = [
        {"image": (NASTY / "png_decompression_dos.png").read_bytes(), "text": "a"},
        {"image": Image.open(io.BytesIO(png(1)[:45])), "text": "a"},
        {"image": "a.png", "text": "a"},
        {"image": {"bytes": None, "path": "a.png"}, "text": "a"},
        {"image": png(1), "text": 3},
        {"image": png(1)},
        ["a list"],
    ]
    skip = Skip()
    source = Mapped(Rows([*bad, good]), FromRows(), order=InOrder(), on_error=skip)
    assert [sample.name for sample in source] == ["Rows[7]"]
    assert skip.names == tuple(f"Rows[{n}]" for n in range(7))
    assert "got str" in skip.failures["Rows[2]"]
    with pytest.raises(SampleError, match=r"Rows\[4\]: column 'text' wants a text"):
        source[4]

    with pytest.raises(SampleError, match=r"0 \.\. 1, got -1"):
        Mapped(Rows([(Image.new("L", (1, 1)), -1)]), FromPairs(["a", "b"]))[0]
    pairs = Rows([(Image.new("L", (1, 1)), 2), (Image.new("L", (1, 1)), "a"), (Image.new("L", (1, 1)),)])
    for index, message in enumerate((r"0 \.\. 1, got 2", r"0 \.\. 1, got 'a'", "nothing under 1")):
        with pytest.raises(SampleError, match=message):
            Mapped(pairs, FromPairs(["a", "b"]))[index]
    tensors = torchvision.datasets.FakeData(1, (3, 2, 2), transform=torchvision.transforms.ToTensor())
    with pytest.raises(ImageError, match="got Tensor; does the data set transform its pictures"):
        Mapped(tensors, FromPairs(["a"] * 10))[0]


def test_errors_of_the_data_set_are_named():
    class Broken(Rows):
        def __getitem__(self, index):
            raise KeyError("no such record")

    with pytest.raises(SampleError, match=r"Broken\[1\]: cannot be had \(KeyError: 'no such record'\)"):
        Mapped(Broken([0, 1]), FromRows())[1]
    with pytest.raises(ValueError, match="at least one item"):
        Mapped(Rows([]), FromRows())


def test_a_data_set_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(red), "path": None} for red in range(4)], "text": list("abcd")}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for given in (dataset, dataset.cast_column("image", datasets.Image(decode=False))):
        source = Mapped(given, FromRows(), order=Shuffled(2))
        samples = sorted(source, key=lambda sample: sample.texts)
        assert [sample.texts for sample in samples] == [("a",), ("b",), ("c",), ("d",)]
        assert [int(sample.image[0, 0, 0]) for sample in samples] == [0, 1, 2, 3]
