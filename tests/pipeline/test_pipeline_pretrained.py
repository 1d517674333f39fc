"""A model folder gives back the model it was made of, says what is wrong with it, and asks no network."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm import Pipeline
from mmdlm.diffusion import Linear, Polynomial
from mmdlm.io import seal
from mmdlm.output import Output, Record, read_record, save_png
from mmdlm.pretrained import Settings
from mmdlm.sampling import Ancestral, ByModality, Doubtful, LeftToRight, Peak, Scheduled, Unmask, presets
from mmdlm.sampling import Path as Walk


def record(**changes) -> Record:
    values = {
        "task": "text_to_image",
        "prompt": "a star",
        "seed": 3,
        "sample": 0,
        "steps": 4,
        "guidance": {"image": 1.5},
        "policy": "Unmask()",
        "model": "0123456789abcdef",
        "software": "mmdlm 0",
    }
    return Record(**(values | changes))


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder that may be broken."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


# what is written comes back


def test_what_is_said_of_the_training_comes_back(kit, tiny_folder, tmp_path):
    assert Pipeline.from_pretrained(tiny_folder).training == {}
    pipe = kit.like()
    pipe.training = {"mixture": [0.25, 0.0, 0.5, 0.25], "rows": 3}
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.training == pipe.training
    loaded.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(tmp_path / "again").training == pipe.training


def test_a_model_comes_back_as_it_was(kit, tiny_folder):
    loaded = Pipeline.from_pretrained(tiny_folder)
    assert loaded.fingerprint == kit.pipe.fingerprint
    assert loaded.layout == kit.pipe.layout
    assert loaded.settings == kit.pipe.settings
    assert not loaded.transformer.training
    one, other = (
        pipe.joint(["a small"], num_samples=2, guidance=1.0, progress=False) for pipe in (kit.pipe, loaded)
    )
    assert one.texts == other.texts
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert one.records == other.records
    assert (
        loaded.caption(kit.pictures, progress=False).texts
        == kit.pipe.caption(kit.pictures, progress=False).texts
    )


def test_the_folder_is_laid_out_as_stated(tiny_folder):
    names = {path.relative_to(tiny_folder).as_posix() for path in tiny_folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "generation_config.json",
        "image_tokenizer/config.json",
        "image_tokenizer/model.safetensors",
        "manifest.json",
        "model_index.json",
        "text_tokenizer/config.json",
        "text_tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/model.safetensors",
    }
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["_class_name"] == "Pipeline"
    assert {"transformer", "text_tokenizer", "image_tokenizer"} < index.keys()
    assert (tiny_folder / "README.md").read_text() == "# tiny\n"


def test_a_model_is_saved_again_over_itself(tiny_folder, copy):
    Pipeline.from_pretrained(tiny_folder).save_pretrained(copy)
    assert Pipeline.from_pretrained(copy).fingerprint == Pipeline.from_pretrained(tiny_folder).fingerprint
    assert not (copy / "README.md").exists()


POLICIES = (
    Unmask(
        quota=ByModality(Scheduled(Linear()), Scheduled(Polynomial(2.0))),
        order=ByModality(LeftToRight(), Peak()),
    ),
    Unmask(plan=Walk(text=(0.0, 0.5), image=(0.5, 1.0)), top_k=ByModality(None, 7), top_p=0.9),
    Ancestral(temperature=ByModality(0.5, 1.0)),
    presets.llada(block=4),
    presets.fast_dllm(block=4, threshold=None, factor=1.0),
    presets.dream("topk_margin", choice_temperature=0.2),
    presets.klass(block=4),
    presets.entropy_bounded(),
    presets.llada2(edit=0.9, end=3),
    presets.remdm(),
    presets.remdm(Doubtful()),
    presets.p2(),
    presets.halton((3, 4)),
    presets.lumina(),
    presets.mmada_parallel(image_steps=3),
    presets.unidisc(),
)


@pytest.mark.parametrize("policy", POLICIES)
def test_settings_of_every_kind_come_back(kit, tmp_path, policy):
    pipe = kit.like()
    pipe.settings = {
        **pipe.settings,
        "joint": Settings(steps=7, guidance={"image": 1.5, "text": 0.25}, policy=policy),
    }
    pipe.save_pretrained(tmp_path / "model")
    assert Pipeline.from_pretrained(tmp_path / "model").settings == pipe.settings


def test_the_fingerprint_is_that_of_the_weights(kit, copy):
    loaded = Pipeline.from_pretrained(copy)
    assert re.fullmatch("[0-9a-f]{16}", loaded.fingerprint)
    with torch.no_grad():
        next(loaded.transformer.parameters()).view(-1)[0] += 1e-3
    assert loaded.fingerprint != kit.pipe.fingerprint


# what is wrong is named


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    seal(folder)


@pytest.mark.parametrize("name", ["transformer/model.safetensors", "text_tokenizer/tokenizer.json"])
def test_a_damaged_file_is_named(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Pipeline.from_pretrained(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Pipeline.from_pretrained(copy)


def test_an_unknown_class_is_named(copy):
    edit(copy, "model_index.json", lambda index: index.update(transformer="UNet2DModel"))
    with pytest.raises(ValueError, match=r"component transformer is a 'UNet2DModel'.*reads 'Predictor'"):
        Pipeline.from_pretrained(copy)


def test_an_unknown_policy_is_named_and_not_imported(copy):
    edit(
        copy,
        "generation_config.json",
        lambda tasks: tasks["joint"]["policy"].update({"class": "os.system"}),
    )
    with pytest.raises(ValueError, match=r"generation_config\.json.*os\.system"):
        Pipeline.from_pretrained(copy)


def test_weights_that_do_not_fit_their_config_are_refused(copy):
    edit(copy, "transformer/config.json", lambda config: config["network"].update(depth=2))
    with pytest.raises(ValueError, match=r"the weights in .*transformer do not fit its config"):
        Pipeline.from_pretrained(copy)


def test_tokenizers_that_do_not_fit_the_vocabulary_are_refused(copy, tiny_folder):
    def shrink(config: dict) -> None:
        config["vocab"]["image"][1] -= 1

    edit(copy, "transformer/config.json", shrink)
    with pytest.raises(ValueError, match="text ids and 64 codes do not fit"):
        Pipeline.from_pretrained(copy)


@pytest.mark.parametrize("key", ["vocab", "layout", "network"])
def test_a_config_that_lacks_something_is_refused(copy, key):
    edit(copy, "transformer/config.json", lambda config: config.pop(key))
    with pytest.raises(ValueError, match=key):
        Pipeline.from_pretrained(copy)


def test_what_is_said_of_the_training_is_an_object(copy):
    edit(copy, "transformer/config.json", lambda config: config.update(training=["much"]))
    with pytest.raises(ValueError, match=r"config.json: training is \['much'\], wanted an object"):
        Pipeline.from_pretrained(copy)


def test_settings_of_an_unknown_task_are_refused(copy):
    edit(copy, "generation_config.json", lambda tasks: tasks.update(drawing=tasks["joint"]))
    with pytest.raises(ValueError, match=r"settings for unknown tasks \['drawing'\]"):
        Pipeline.from_pretrained(copy)


def test_a_folder_that_is_none_and_a_name_that_is_none_are_named(tmp_path):
    with pytest.raises(ValueError, match="is no model folder"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        Pipeline.from_pretrained("nowhere")


def test_tokenizers_of_other_classes_are_not_saved(kit, tmp_path):
    class Other:
        size, downsample, digits = 64, 16, None

    with pytest.raises(ValueError, match="tokenizers BytePairTokenizer and Other cannot be saved"):
        kit.like(image_tokenizer=Other()).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_local_folder_asks_no_network(tiny_folder, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Pipeline.from_pretrained(str(tiny_folder)).joint(progress=False).images


# records inside pictures


def test_a_saved_picture_says_how_it_was_made_and_is_made_again(kit, tiny_folder, tmp_path):
    pipe = kit.pipe
    output = pipe.text_to_image(kit.prompts, steps=3, guidance={"image": 1.5}, seed=9, progress=False)
    paths = output.save(tmp_path / "new" / "out", stem="star")
    assert [path.name for path in paths] == ["star-000.png", "star-001.png", "star-002.png"]
    for path, made, prompt in zip(paths, output.images, kit.prompts, strict=True):
        found = read_record(path)
        assert (found.prompt, found.seed, found.steps) == (prompt, 9, 3)
        assert (found.guidance, found.model) == ({"image": 1.5}, pipe.fingerprint)
        assert asdict(found) == asdict(output.records[found.sample])
        with Image.open(path) as image:
            assert image.tobytes() == made.tobytes()
            assert (image.info["prompt"], image.info["seed"]) == (prompt, "9")
        loaded = Pipeline.from_pretrained(tiny_folder)
        assert loaded.fingerprint == found.model
        again = loaded.text_to_image(
            [found.prompt] * (found.sample + 1),
            steps=found.steps,
            guidance=found.guidance,
            seed=found.seed,
            progress=False,
        )
        assert again.images[found.sample].tobytes() == made.tobytes()
        assert asdict(again.records[found.sample]) == asdict(found)


def test_prompts_of_any_script_come_back(tmp_path):
    prompt = "\u4e00\u53ea \U0001f98a \u00e9t\u00e9\nsecond line"
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", record(prompt=prompt))
    assert read_record(tmp_path / "a.png") == record(prompt=prompt)


def test_a_picture_without_a_record_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    with pytest.raises(ValueError, match=r"bare\.png holds no record"):
        read_record(tmp_path / "bare.png")


@pytest.mark.parametrize("text", ['{"task": "joint"}', '{"nothing": 1}', "no json", "[1]"])
def test_a_record_of_another_make_is_named(tmp_path, monkeypatch, text):
    made = record()
    monkeypatch.setattr(Record, "chunks", lambda self: {"mmdlm": text})
    save_png(Image.new("RGB", (4, 4)), tmp_path / "other.png", made)
    with pytest.raises(ValueError, match=r"other\.png: its record"):
        read_record(tmp_path / "other.png")


def test_an_output_without_pictures_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        Output(texts=("a",)).save(tmp_path)


def test_records_are_told_apart_by_their_sample():
    assert record(sample=1) != record() == replace(record(sample=1), sample=0)
