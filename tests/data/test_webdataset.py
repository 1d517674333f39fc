"""Tar shards are read in place: samples by key, exact resume, every damage named by shard and offset."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.images import ImageError, Skip, decode, fit
from mmdlm.data.indexed import InOrder, Shuffled, forever
from mmdlm.data.rows import Columns
from mmdlm.data.sample import SampleError
from mmdlm.data.webdataset import WebDataset

NASTY = Path(__file__).parent / "nasty"


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, first: int = 0, count: int = 5, **options) -> Path:
    members = []
    for red in range(first, first + count):
        members += [(f"{red:04}.png", png(red)), (f"{red:04}.txt", f"number {red}\n".encode())]
    return write(path, members, **options)


def test_samples_are_read_where_they_lie(tmp_path):
    before = sorted(tmp_path.iterdir())
    source = WebDataset([shard(tmp_path / "a.tar"), shard(tmp_path / "b.tar", 5, 2)], order=InOrder())
    assert len(source) == 7
    for red, sample in enumerate(source):
        assert sample.name == f"{tmp_path}/{'ab'[red // 5]}.tar:{red:04}"
        assert (sample.texts, sample.extra) == ((f"number {red}",), {})
        assert sample.image is not None
        assert sample.image.shape == (3, 4, 3)
        assert (sample.image == (red, 0, 0)).all()
    assert list(source.texts()) == [f"number {red}" for red in range(7)]
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "a.tar", tmp_path / "b.tar"]
    with pytest.raises(IndexError):
        source[7]


def test_members_of_a_key_need_not_be_neighbours_and_names_may_be_long(tmp_path):
    long = "folder/" + "k" * 300
    members = [
        (f"{long}.JPG", png(1)), ("./b.png", png(2)), (f"{long}.txt", b"\xef\xbb\xbfone"),
        ("./b.caption", b"two"), ("./b.text", "zw\u00f6lf".encode()), ("./.hidden.txt", b"x"),
        ("README", b"x"), ("t.txt", b"text alone"), ("../../../escape.txt", b"harmless"),
    ]  # fmt: skip
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write(tmp_path / "a.tar", members, kind)
        samples = list(WebDataset(path, order=InOrder()))
        assert [sample.name for sample in samples] == [
            f"{path}:{key}" for key in (long, "./b", "t", "../../../escape")
        ]
        assert [sample.texts for sample in samples[:3]] == [("one",), ("zw\u00f6lf", "two"), ("text alone",)]
        assert [sample.image is None for sample in samples] == [False, False, True, True]
    assert sorted(tmp_path.iterdir()) == [path]


def test_json_members_and_columns(tmp_path):
    said = {"captions": ["a", "b"], "text": "c", "q": "which?", "a": "1", "url": "u"}
    members = [
        ("k.png", png(1)), ("k.seg.png", png(9)), ("k.webp", png(2)), ("k.cls", b"3\n"), ("k.npy", b"\x93"),
        ("k.json", json.dumps(said).encode()),
    ]  # fmt: skip
    path = write(tmp_path / "a.tar", members)
    columns = Columns(texts=("captions", "text"), question="q", answer="a", image="png")
    sample = WebDataset(path, columns=columns, load=lambda data: fit(decode(data), 2))[0]
    assert (sample.texts, sample.question, sample.answer) == (("a", "b", "c"), "which?", "1")
    assert sample.extra == {"url": "u", "cls": "3"}
    assert sample.image.tolist() == [[[1, 0, 0]] * 2] * 2
    with pytest.raises(SampleError, match=r"a\.tar:k: several pictures \(png, webp\)"):
        WebDataset(path)[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.png", png(0))], "no text under txt, text, caption; there are png"),
        ([("k.png", png(0)), ("k.txt", b"a\xff")], r"member \.txt is not UTF-8 at offset 1537"),
        ([("k.txt", b"a"), ("k.json", b"{")], "not JSON"),
        ([("k.txt", b"a"), ("k.json", b"[]")], "wanted an object"),
        ([("k.txt", b"a"), ("k.json", b'{"txt": "b"}')], "has txt both as a member and in its json"),
        ([("k.json", b'{"text": 3}')], "column 'text' wants a text or a list of texts, got 3"),
        ([("k.txt", b"a"), ("k.v2.png", png(0))], r"no picture among txt, v2\.png"),
        ([("k.txt", b"a"), ("k.png", b"no picture")], r"member \.png at offset 1536: not a picture"),
        ([("k.txt", b"a"), ("k.png", png(0)[:45])], r"member \.png at offset 1536: cannot be decoded"),
        ([("k.txt", b"a"), ("k.png", (NASTY / "png_decompression_dos.png").read_bytes())], r"member \.png"),
    ],
)
def test_bad_samples_are_named_and_may_be_skipped(tmp_path, members, message):
    path = write(tmp_path / "a.tar", [*members, ("good.txt", b"good"), ("good.png", png(7))])
    with pytest.raises(SampleError, match=message) as caught:
        list(WebDataset(path, order=InOrder()))
    assert str(caught.value).startswith(f"{path}:k: ")
    skip = Skip()
    assert [sample.texts for sample in WebDataset(path, order=InOrder(), on_error=skip)] == [("good",)]
    assert skip.names == (f"{path}:k",)


def test_every_position_resumes_exactly(tmp_path):
    paths = [shard(tmp_path / "a.tar"), shard(tmp_path / "b.tar", 5, 2)]

    def source():
        return WebDataset(paths, order=Shuffled(3))

    whole = [sample.name for sample in islice(forever(source()), 16)]
    assert len(set(whole[:7])) == len(set(whole[7:14])) == 7
    for stop in range(16):
        first, second = source(), source()
        begun = [sample.name for sample in islice(forever(first), stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [sample.name for sample in islice(forever(second), 16 - stop)] == whole


def test_threads_and_processes_read_at_once(tmp_path):
    source = WebDataset(shard(tmp_path / "a.tar", 0, 40))
    wanted = [int(index) for index in np.random.default_rng(0).integers(0, 40, 400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: source[index].image[0, 0, 0], wanted))
    assert found == wanted
    assert pickle.loads(pickle.dumps(source))[3].texts == ("number 3",)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "device", "pipe"])
def test_links_and_devices_are_refused(tmp_path, kind):
    types = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("folder/k.txt")
        info.type = types.get(kind, tarfile.FIFOTYPE)
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    what = "a link" if "link" in kind else "a device"
    with pytest.raises(ValueError, match=rf"a\.tar: member 'folder/k\.txt' at offset 512 is {what}"):
        WebDataset(path)


def test_shards_that_are_none_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    for data, message in ((b"", "empty file"), (b"x" * 2000, "no tar file at offset 0")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"a\.tar: .*{message}"):
            WebDataset(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("k.txt"))
    with pytest.raises(ValueError, match="compressed shards are not read"):
        WebDataset(path)
    with pytest.raises(ValueError, match="absent"):
        WebDataset(tmp_path / "absent.tar")
    with pytest.raises(ValueError, match=r"a\.tar: no samples"):
        WebDataset(write(path, [("README", b"")]))
    with pytest.raises(ValueError, match=r"member 'k\.TXT' at offset 1536 comes twice"):
        WebDataset(write(path, [("k.txt", b""), ("l.txt", b""), ("k.TXT", b"")]))
    path.write_bytes(shard(path).read_bytes() + shard(tmp_path / "b.tar").read_bytes())
    with pytest.raises(ValueError, match="more data behind the end of the tar file at offset 10240"):
        WebDataset(path)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_anywhere_is_refused(tmp_path, kind):
    good = shard(tmp_path / "a.tar", count=3, kind=kind).read_bytes()
    end = len(good.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "cut.tar"
    for length in (*range(0, end, 512), *range(1, end, 383)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"cut\.tar: .*offset \d+"):
            WebDataset(path)


def test_a_shard_cut_inside_a_member_names_it(tmp_path):
    path = write(tmp_path / "a.tar", [("a.txt", b"a"), ("b.png", b"x" * 2000)])
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(ValueError, match=r"a\.tar: cut short in 'b\.png' at offset 1536"):
        WebDataset(path)


def test_a_member_of_negative_size_is_no_endless_loop(tmp_path):
    path = shard(tmp_path / "a.tar", count=1)
    info = tarfile.TarInfo("b.txt")
    info.size = -1536
    data = path.read_bytes()
    path.write_bytes(data[:2048] + info.tobuf(tarfile.GNU_FORMAT) + data[2560:])
    with pytest.raises(ValueError, match=r"a\.tar: damaged header at offset 2048"):
        WebDataset(path)


def test_a_shard_that_shrinks_later_is_named(tmp_path):
    path = shard(tmp_path / "a.tar")
    source = WebDataset(path)
    path.write_bytes(path.read_bytes()[:9000])
    assert source[3].texts == ("number 3",)
    with pytest.raises(SampleError, match=r"a\.tar: wanted 9 bytes at offset 9728, there are 0"):
        source[4]


def test_a_damaged_shard_is_an_error_or_does_no_harm(tmp_path):
    good = shard(tmp_path / "a.tar", count=4, kind=tarfile.PAX_FORMAT).read_bytes()
    path, rng, refused = tmp_path / "bad.tar", np.random.default_rng(1), 0
    for _ in range(300):
        data = bytearray(good)
        at = int(rng.integers(0, 16)) * 512 + int(rng.integers(0, 300))
        data[at : at + 4] = rng.bytes(4)
        path.write_bytes(data)
        skip = Skip()
        try:
            samples = list(WebDataset(path, on_error=skip))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            assert "offset" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert len(samples) + skip.count == 4
    assert refused > 100
    assert issubclass(ImageError, SampleError)
