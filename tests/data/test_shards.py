"""Shards of codes hold what the source had, in the same bytes however made, and say when they do not."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmdlm.data import (
    Batches,
    ImageError,
    InOrder,
    Listed,
    OnlineEncoded,
    Sample,
    SampleError,
    ShardPlan,
    Shards,
    Shuffled,
    Skip,
    encode_shards,
)

BROKEN = (3, 17)
NUM = 23


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)


def sample(number: int) -> Sample:
    texts = (f"text {number}", "\u00e9t\u00e9\n\r\x0b\x85\u2028\ud800")[: 1 + number % 2]
    question = "how many?" if number % 3 == 0 else None
    return Sample(f"{number}.png", picture(number), texts, question, question and "two")


def flawed(number: int) -> Sample:
    if number in BROKEN:
        raise ImageError(f"{number}.png", f"cannot be decoded (<BytesIO object at {hex(id(object()))}>)")
    return sample(number)


def encode(images: Sequence[np.ndarray]) -> np.ndarray:
    """One code for each 2 x 2 patch, and each image's place in its batch, as floats of batches may differ."""
    stacked = np.stack(images)[..., 0].astype(np.int64)
    return stacked[:, ::2, ::2] + np.arange(len(images))[:, None, None]


PLAN = ShardPlan(num_codes=300, tokenizer="t", made_of={"data": "d", "pixels": 4}, shard_size=5, batch_size=2)


def make(path: Path, item: Callable[[int], Sample] = sample, **options) -> Path:
    source = Listed(item, NUM, order=Shuffled(5))
    assert encode_shards(source, path, encode=encode, plan=PLAN, **options) is True
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "codes")


# reading


def test_what_the_source_had_is_read(folder):
    source = Shards(folder, order=InOrder())
    assert (len(source), source.grid, source.num_codes, source.tokenizer) == (NUM, (2, 3), 300, "t")
    assert [shard.samples for shard in source.shards] == [5, 5, 5, 5, 3]
    for number, pair in enumerate(source):
        wanted = sample(number)
        assert (pair.name, pair.texts) == (wanted.name, wanted.texts)
        assert (pair.question, pair.answer) == (wanted.question, wanted.answer)
        assert pair.codes.dtype == np.int32
        assert (pair.codes == encode([wanted.image])[0] + number % 5 % 2).all()
    assert source[-1].name == "22.png"
    with pytest.raises(IndexError):
        source[NUM]
    assert source.texts_of(1) == sample(1).texts
    assert list(source.texts())[:3] == ["text 0", *sample(1).texts]
    source.verify()


def test_codes_of_many_at_once(folder):
    source = Shards(folder)
    indices = [22, 0, -1, 7, 7, 12]
    assert (source.take(indices) == np.stack([source[index].codes for index in indices])).all()
    assert source.take([]).shape == (0, 2, 3)
    for wrong in ([NUM], [-NUM - 1]):
        with pytest.raises(IndexError, match="23 items"):
            source.take(wrong)


def test_a_shard_is_a_safetensors_file_of_the_smallest_type(folder, tmp_path):
    tensors = load_file(folder / "shard-00004.safetensors")
    assert tensors["codes"].dtype == np.uint16
    first = json.loads(tensors["rows"][: tensors["ends"][0]].tobytes())
    assert first == {"name": "20.png", "texts": ["text 20"]}
    wide = ShardPlan(num_codes=2**16 + 1)
    encode_shards(
        Listed(sample, 3), tmp_path / "wide", encode=lambda images: encode(images) + 2**16 - 300, plan=wide
    )
    assert load_file(tmp_path / "wide" / "shard-00000.safetensors")["codes"].dtype == np.int32
    assert Shards(tmp_path / "wide", order=InOrder())[0].codes.max() > 2**15


def test_it_is_shuffled_each_epoch_and_resumes_also_in_another_process(folder):
    source, other = (Shards(folder, order=Shuffled(3)) for _ in range(2))
    epochs = [[pair.name for pair in source] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{number}.png" for number in range(NUM))
    assert epochs[0] != epochs[1]
    begun = iter(other)
    assert [next(begun).name for _ in range(2)] == epochs[0][:2]
    sent = pickle.dumps(other)
    assert len(sent) < 5000  # files are opened anew, not sent
    assert [pair.name for pair in pickle.loads(sent)] == epochs[0][2:]


# making


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_bytes_are_the_same_however_the_work_is_shared(tmp_path, world):
    alone = contents(make(tmp_path / "alone", flawed, on_error=Skip()))
    ends = []
    for rank in reversed(range(world)):
        source = Listed(flawed, NUM)
        ends.append(
            encode_shards(
                source, tmp_path / "shared", encode=encode, plan=PLAN, part=(rank, world), on_error=Skip()
            )
        )
    assert ends[-1] is True
    assert contents(tmp_path / "shared") == alone


def test_an_interrupted_encoding_goes_on_and_makes_nothing_twice(tmp_path, folder):
    class Killed(BaseException):
        pass

    asked: list[int] = []

    def until(stop: int) -> Callable[[int], Sample]:
        def item(number: int) -> Sample:
            asked.append(number)
            if number == stop:
                raise Killed
            return sample(number)

        return item

    out = tmp_path / "killed"
    for stop in (7, 12, 12, 22):
        with pytest.raises(Killed):
            encode_shards(Listed(until(stop), NUM), out, encode=encode, plan=PLAN)
        assert not (out / "index.json").exists()
    (out / ".shard-00004.safetensors.0123456789ab.part").write_bytes(b"half")
    (out / "shard-00003.json").unlink()  # killed between a shard and its record
    told: list[int] = []
    make(out, until(-1), on_items=told.append)
    assert asked == [*range(8), *range(5, 13), *range(10, 13), *range(10, 23), *range(15, 23)]
    assert told == [5, 5, 5, 5, 3]
    assert contents(out) == contents(folder)


def test_samples_that_cannot_be_had_stop_it_or_are_left_out_and_named(tmp_path):
    with pytest.raises(ImageError, match=r"3\.png"):
        make(tmp_path / "stopped", flawed)
    assert not (tmp_path / "stopped").exists()
    make(tmp_path / "codes", flawed, on_error=Skip())
    source = Shards(tmp_path / "codes", order=InOrder())
    assert [shard.samples for shard in source.shards] == [4, 5, 5, 4, 3]
    assert [pair.name for pair in source] == [
        f"{number}.png" for number in range(NUM) if number not in BROKEN
    ]
    reason = "cannot be decoded (<BytesIO object>)"  # no address, which another process would not have
    assert source.skipped == {"3.png": reason, "17.png": reason}
    again = Skip()
    make(tmp_path / "codes", flawed, on_error=again)  # all stands, and is told again
    assert again.failures == source.skipped
    with pytest.raises(ValueError, match=r"3\.png: cannot be decoded"):
        make(tmp_path / "codes", flawed)


def test_a_row_that_lacks_its_picture_is_no_text_unless_asked_for(tmp_path):
    def lacking(number: int) -> Sample:
        return Sample("4.png", None, ("a text",)) if number == 4 else sample(number)

    with pytest.raises(SampleError, match=r"4\.png: has no picture"):
        make(tmp_path / "stopped", lacking)
    make(tmp_path / "codes", lacking, on_error=Skip())
    source = Shards(tmp_path / "codes", order=InOrder())
    assert (len(source), source.skipped) == (NUM - 1, {"4.png": "has no picture"})
    carried, asked = tmp_path / "carried", replace(PLAN, texts_alone=True)
    encode_shards(Listed(lacking, NUM), carried, encode=encode, plan=asked)
    assert Shards(carried, order=InOrder())[4].codes is None
    for folder, plan in ((carried, PLAN), (tmp_path / "codes", asked)):
        with pytest.raises(ValueError, match="texts_alone"):
            encode_shards(Listed(lacking, NUM), folder, encode=encode, plan=plan, on_error=Skip())


def test_a_shard_may_be_left_with_nothing_but_not_all(tmp_path):
    def none(number: int) -> Sample:
        raise ImageError(f"{number}.png", "no")

    def late(number: int) -> Sample:
        return none(number) if 5 <= number < 10 else sample(number)

    source = Shards(make(tmp_path / "codes", late, on_error=Skip()), order=InOrder())
    assert [pair.name for pair in source][4:6] == ["4.png", "10.png"]
    assert source.take([4, 5]).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="not one picture"):
        make(tmp_path / "none", none, on_error=Skip())


def test_shards_of_another_plan_are_left_alone(folder):
    before = contents(folder)
    other = ShardPlan(num_codes=300, tokenizer="u", made_of=PLAN.made_of, shard_size=5, batch_size=2)
    with pytest.raises(ValueError, match="made otherwise \\(tokenizer 't', now 'u'\\)"):
        encode_shards(Listed(sample, NUM), folder, encode=encode, plan=other)
    with pytest.raises(ValueError, match="items 23, now 22"):
        encode_shards(Listed(sample, 22), folder, encode=encode, plan=PLAN)
    (folder / "index.json").unlink()  # what an interrupted encoding leaves is of a plan, too
    with pytest.raises(ValueError, match="tokenizer 't', now 'u'"):
        encode_shards(Listed(sample, NUM), folder, encode=encode, plan=other)
    assert contents(folder) | {"index.json": before["index.json"]} == before


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (lambda images: encode(images) + 300, "wanted 0 to 299"),
        (lambda images: encode(images) - 300, "wanted 0 to 299"),
        (lambda images: encode(images)[0], "wanted \\(2, h, w\\) integers"),
        (lambda images: encode(images)[:1], "wanted \\(2, h, w\\) integers"),
        (lambda images: encode(images) / 2, "wanted \\(2, h, w\\) integers"),
        (lambda images: np.zeros((len(images), len(images), 1), int), "one shape"),
    ],
)
def test_codes_that_are_none_are_refused(tmp_path, codes, message):
    with pytest.raises(ValueError, match=message):
        encode_shards(Listed(sample, 5), tmp_path / "codes", encode=codes, plan=PLAN)
    assert not (tmp_path / "codes").exists()


def test_what_cannot_be_encoded_is_refused(tmp_path):
    for source, options, message in (
        (Listed(sample, 1), {"part": (1, 1)}, "rank < world"),
        (Listed(sample, 1), {"plan": ShardPlan(num_codes=1, made_of={"a": (1,)})}, "plain JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_shards(source, tmp_path / "codes", encode=encode, **({"plan": PLAN} | options))
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        ShardPlan(num_codes=1, shard_size=0)


# damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_missing_or_short_shard_is_seen_at_opening(folder):
    (folder / "shard-00001.safetensors").unlink()
    path = folder / "shard-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"2 of 5 shards .*shard-00001\.safetensors.*shard-00003\.safetensors: \d+ bytes"
    ):
        Shards(folder)


def test_any_flipped_bit_is_seen_and_mended(folder):
    whole = contents(folder)
    rng = np.random.default_rng(0)
    for name, data in whole.items():
        spots = {0, 8, len(data) - 1, *rng.integers(0, len(data), 12).tolist()}
        for spot in spots if name.endswith((".safetensors", "index.json")) else ():
            flip(folder / name, spot)
            with pytest.raises(ValueError, match=name):
                Shards(folder).verify()
            (folder / name).write_bytes(data)
    for name in ("shard-00000.safetensors", "shard-00001.json", "index.json"):
        flip(folder / name, 20)
    (folder / "shard-00002.safetensors").unlink()
    make(folder)
    assert contents(folder) == whole
    Shards(folder).verify()


def test_a_damaged_row_names_its_file(folder):
    path = folder / "shard-00002.safetensors"
    at = path.read_bytes().index(b'{"name": "12.png"')
    flip(path, at)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: item 2 is damaged"):
        Shards(folder)[12]
    with pytest.raises(ValueError, match="cannot be read"):
        Shards(folder / "nowhere")


# on-line, and speed


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_encoding_on_the_way_resumes_with_the_same_codes(taken):
    def source() -> OnlineEncoded:
        return OnlineEncoded(Listed(flawed, NUM), encode, batch_size=4, order=Shuffled(1), on_error=Skip())

    whole = [(pair.name, pair.codes.tolist()) for pair in source()]
    assert len(whole) == NUM - len(BROKEN)
    first, second = source(), source()
    begun = iter(first)
    for _ in range(taken):
        next(begun)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [(pair.name, pair.codes.tolist()) for pair in second] == whole[taken:]
    assert source()[0].codes.tolist() == encode([picture(0)])[0].tolist()


def test_encoding_on_the_way_takes_a_batch_at_once():
    sizes: list[int] = []

    def counted(images: Sequence[np.ndarray]) -> np.ndarray:
        sizes.append(len(images))
        return encode(images)

    source = OnlineEncoded(Listed(sample, NUM), counted, batch_size=8)
    assert len(list(source)) == NUM
    assert sizes == [8, 8, 7]
    with pytest.raises(ImageError):
        list(OnlineEncoded(Listed(flawed, NUM), encode))


def measure(folder: Path, num: int) -> float:
    """Samples a CPU second of one process through `Batches`, texts and all, at 64 codes."""
    image = np.zeros((8, 8, 3), np.uint8)
    rng = np.random.default_rng(0)
    encode_shards(
        Listed(
            lambda number: Sample(f"{number}.png", image, (f"a red circle above {number} squares",) * 2), num
        ),
        folder,
        encode=lambda images: rng.integers(0, 4096, (len(images), 8, 8)),
        plan=ShardPlan(num_codes=4096),
    )
    batches = Batches(Shards(folder), 64, collate=lambda pairs, rng: np.stack([pair.codes for pair in pairs]))
    next(batches)
    start = time.process_time()
    for _ in range(num // 64):
        next(batches)
    return num // 64 * 64 / (time.process_time() - start)


def test_reading_costs_little(tmp_path):
    assert measure(tmp_path / "codes", 5000) > 5000


@pytest.mark.slow
def test_one_process_reads_twenty_thousand_samples_a_second(tmp_path):
    rate = measure(tmp_path / "codes", 200_000)
    print(f"{rate:.0f} samples a second")
    assert rate > 20_000
