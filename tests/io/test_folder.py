"""A model folder gives back what was written, notices every damage, and never loses what it did not write."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdlm.io import Component, Label, contained, read_folder, resolve, seal, write_folder

LABEL = Label(kind="Pipeline", version="0.1.0", card="# A model\n")


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "a": whole,
        "tied": whole,
        "turned": whole.T,
        "part": whole[1:],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }


def write(path: Path, **config) -> Path:
    def words(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    components = {
        "transformer": Component(class_name="Predictor", config={"dim": 8, **config}, tensors=tensors()),
        "text_tokenizer": Component(class_name="BytePairs", write=words),
    }
    write_folder(path, components, label=LABEL, generation={"steps": 12})
    return path


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_what_is_written_is_read(tmp_path):
    model = read_folder(write(tmp_path / "model"))
    assert (model.kind, model.version, model.generation) == ("Pipeline", "0.1.0", {"steps": 12})
    assert list(model.components) == ["transformer", "text_tokenizer"]
    transformer = model.component("transformer")
    assert (transformer.class_name, transformer.config) == ("Predictor", {"dim": 8})
    found = transformer.tensors()
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    text = model.component("text_tokenizer")
    assert (text.config, (text.path / "tokenizer.json").read_text()) == ({}, "{}")
    with pytest.raises(
        ValueError, match=r"no component 'image_tokenizer'; it has transformer, text_tokenizer"
    ):
        model.component("image_tokenizer")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        text.tensors()


def test_the_layout_is_the_usual_one(tmp_path):
    path = write(tmp_path / "model")
    assert sorted(files(path)) == [
        "README.md",
        "generation_config.json",
        "manifest.json",
        "model_index.json",
        "text_tokenizer/config.json",
        "text_tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/model.safetensors",
    ]
    index = json.loads((path / "model_index.json").read_text())
    assert index == {
        "_class_name": "Pipeline",
        "_mmdlm_version": "0.1.0",
        "transformer": "Predictor",
        "text_tokenizer": "BytePairs",
    }


def test_the_digest_tells_models_apart(tmp_path):
    first, second, other = (write(tmp_path / name, dim=dim) for name, dim in (("a", 1), ("b", 1), ("c", 2)))
    assert read_folder(first).digest == read_folder(second).digest != read_folder(other).digest
    shutil.move(first, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("edited by hand")  # the model card may be
    assert read_folder(tmp_path / "moved").digest == read_folder(second).digest


CHECKED = [
    "generation_config.json",
    "model_index.json",
    "text_tokenizer/tokenizer.json",
    "transformer/config.json",
    "transformer/model.safetensors",
]


@pytest.mark.parametrize("name", CHECKED)
def test_every_damage_is_noticed_and_named(tmp_path, name):
    path = write(tmp_path / "model")
    data = (path / name).read_bytes()
    for damaged in (data[:-1], data + b" ", data[:-1] + bytes([data[-1] ^ 1])):
        (path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_folder(path)
    (path / name).unlink()
    with pytest.raises(ValueError, match=name):
        read_folder(path)


def test_files_that_would_be_read_but_are_not_listed_are_noticed(tmp_path):
    path = write(tmp_path / "model")
    (path / "transformer" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"transformer/model\.safetensors\.index\.json is not in manifest"):
        read_folder(path)
    seal(path)
    with pytest.raises(ValueError, match="weight_map"):
        read_folder(path).component("transformer").tensors()


def test_what_is_no_model_folder_is_said_to_be_so(tmp_path):
    with pytest.raises(ValueError, match=r"no model folder: it has no model_index\.json"):
        read_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusion", "unet": ["diffusers", "UNet"]}'
    )
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        read_folder(tmp_path)
    seal(tmp_path)
    with pytest.raises(ValueError, match="_mmdlm_version"):
        read_folder(tmp_path)
    for text, message in (("{", "is not JSON"), ("[]", "wanted a JSON object")):
        (tmp_path / "model_index.json").write_text(text)
        seal(tmp_path)
        with pytest.raises(ValueError, match=message):
            read_folder(tmp_path)
    label = {"_class_name": "Pipeline", "_mmdlm_version": "1"}
    for entry, message in (
        ({"../up": "X"}, "does not stay inside"),
        ({"unet": ["a", "B"]}, "wanted a class name"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(label | entry))
        seal(tmp_path)
        with pytest.raises(ValueError, match=message):
            read_folder(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path):
    path = write(tmp_path / "model")
    (path / "manifest.json").write_text('{"files": {"../secret": {"sha256": "", "bytes": 0}}}')
    with pytest.raises(ValueError, match="does not stay inside"):
        read_folder(path)


def test_shards_are_read_as_one(tmp_path):
    path = write(tmp_path / "model")
    folder = path / "transformer"
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")

    def index(places: dict[str, str]) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        seal(path)

    index({"a": "one.safetensors", "b": "two.safetensors"})
    found = read_folder(path).component("transformer").tensors()
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0, 0], "b": [1, 1]}
    index({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match="disagree on 1 tensors, the first 'c'"):
        read_folder(path).component("transformer").tensors()
    index({"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(ValueError, match=r"three\.safetensors is missing"):
        read_folder(path).component("transformer").tensors()
    index({"a": "../../../one.safetensors"})
    with pytest.raises(ValueError, match="does not stay inside"):
        read_folder(path).component("transformer").tensors()


def test_what_is_not_safetensors_is_named(tmp_path):
    path = write(tmp_path / "model")
    torch.save({}, path / "transformer" / "model.safetensors")
    seal(path)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_folder(path).component("transformer").tensors()


def test_a_failing_write_leaves_the_old_model(tmp_path):
    path = write(tmp_path / "model")
    before = files(path)

    def fail(folder: Path) -> None:
        raise RuntimeError("no")

    for component in (
        Component(class_name="X", write=fail),
        Component(class_name="X", config={"a": object()}),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            write_folder(path, {"x": component}, label=LABEL)
        assert files(path) == before
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
    write(path, dim=9)
    assert read_folder(path).component("transformer").config == {"dim": 9}


def test_what_others_put_there_is_never_lost(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is not empty and no model folder"):
        write(tmp_path / "work")
    path = write(tmp_path / "model")
    (path / ".git").mkdir()
    (path / ".git" / "config").write_text("")
    with pytest.raises(ValueError, match=r"holds \.git/config"):
        write(path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    assert (path / ".git" / "config").exists()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_components_are_checked(tmp_path):
    def writes_config(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    with pytest.raises(ValueError, match=r"X writes config\.json itself"):
        write_folder(tmp_path / "m", {"x": Component(class_name="X", write=writes_config)}, label=LABEL)
    for name in ("../x", "", "_x", "a/b"):
        with pytest.raises(ValueError, match="component's name"):
            write_folder(tmp_path / "m", {name: Component(class_name="X")}, label=LABEL)
    assert list(tmp_path.iterdir()) == []


def test_names_that_leave_the_folder_are_refused(tmp_path):
    assert contained(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    assert contained(tmp_path, "..a") == tmp_path / "..a"
    for name in ("", "..", "../a", "a/../../b", "/a", "C:\\a", "C:a", "\\a", "..\\a", "\\\\host\\share\\a"):
        with pytest.raises(ValueError, match="does not stay inside"):
            contained(tmp_path, name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub's client: notes what is asked, gives a folder or an error."""
    asked: list[str] = []
    module = types.ModuleType("huggingface_hub")

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert not any(pattern in allow_patterns for pattern in ("*", "*.py", "*.bin", "*.pt"))
        if repository == "owner/there":
            return str(tmp_path / "cache")
        raise ConnectionError("no route")

    monkeypatch.setattr(module, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_a_local_folder_or_built_in_name_asks_nobody(tmp_path, hub, monkeypatch):
    write(tmp_path / "runs" / "mine")
    builtin = {"scenes": tmp_path / "package" / "scenes"}
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/mine", builtin) == Path("runs/mine")
    assert resolve(tmp_path / "runs" / "mine", builtin) == tmp_path / "runs" / "mine"
    (tmp_path / "scenes").mkdir()  # some folder that happens to be called so
    assert resolve("scenes", builtin) == builtin["scenes"]
    write(tmp_path / "scenes")
    assert resolve("scenes", builtin) == Path("scenes")
    for wrong in ("absent", "./absent", "a/b/c", "../x", str(tmp_path / "absent"), Path("owner/there"), ""):
        with pytest.raises(ValueError, match=r"no model|no model_index"):
            resolve(wrong, builtin)
    with pytest.raises(ValueError, match=r"built-in name \(scenes\)"):
        resolve("absent", builtin)
    (tmp_path / "other" / "folder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is no model folder: it has no model_index\.json"):
        resolve("other/folder", builtin)
    assert hub == []


def test_a_repository_is_fetched_or_the_reason_given(hub, tmp_path, monkeypatch):
    assert resolve("owner/there", {}) == tmp_path / "cache"
    with pytest.raises(ValueError, match=r"no model 'owner/absent'.*ConnectionError: no route"):
        resolve("owner/absent", {"scenes": tmp_path})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        resolve("owner/there", {})
