"""The model folder: components as JSON and safetensors under a manifest; knows no class, only their names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm.io.atomic import atomic_folder, atomic_write_json

INDEX = "model_index.json"
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
_CONFIG, _TENSORS, _SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
_KIND, _VERSION = "_class_name", "_mmdlm_version"
_UNCHECKED = ("README.md",)  # the model card, which people edit where it lies
_FETCHED = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.md",
    "LICENSE*",
)  # of a hub repository: nothing that could be code


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a model on its way to the disk, as plain values."""

    class_name: str  # what the reader's table of classes is asked for
    config: Mapping[str, Any] = field(default_factory=dict)  # JSON values, as config.to_json gives
    tensors: Mapping[str, Tensor] | None = None  # becomes model.safetensors; None: no such file
    write: Callable[[Path], object] | None = None  # writes further files into the component's (empty) folder


@dataclass(frozen=True, kw_only=True)
class StoredComponent:
    """One part of a model on the disk; its files have been checked against the manifest."""

    class_name: str
    config: Mapping[str, Any]
    path: Path  # the component's folder, for files beyond config and tensors

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU, from one file or from shards.

        Raises ValueError when there are none, when a shard or a tensor of the shards' index is missing, and
        for a file that is not safetensors.
        """
        index = self.path / _SHARDS
        if not index.exists():
            return _load(self.path / _TENSORS)
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index}: wanted an object with the key 'weight_map'")
        found: dict[str, Tensor] = {}
        for name in sorted(set(places.values())):
            found |= _load(contained(self.path, name))
        wrong = sorted(set(places) ^ set(found))
        if wrong:
            raise ValueError(
                f"{index}: the index and its files disagree on {len(wrong)} tensors, the first {wrong[0]!r}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on the disk: what `write_folder` was given, read back."""

    path: Path
    kind: str  # class name of the whole
    version: str  # of the library that wrote it
    components: Mapping[str, StoredComponent]
    generation: Mapping[str, Any]  # empty when the folder has no generation_config.json
    digest: str  # sha256 over the manifest, in hex: equal folders have equal digests

    def component(self, name: str) -> StoredComponent:
        """The component called `name`; ValueError names those there are."""
        if name not in self.components:
            raise ValueError(f"{self.path} has no component {name!r}; it has {', '.join(self.components)}")
        return self.components[name]


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a model folder says of itself as a whole."""

    kind: str  # class name of the whole, such as "Pipeline"
    version: str  # of the library that writes
    card: str = ""  # README.md, Markdown; empty: none


def write_folder(
    path: Path | str,
    components: Mapping[str, Component],
    *,
    label: Label,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder at `path`, whole or not at all; a model folder that stood there is replaced.

    Tensors that share storage are written once each. Raises ValueError for a name that is no folder name, for
    values that are not JSON, and when `path` holds anything that a replacement would lose: only files that
    the manifest there lists are ours to remove.
    """
    path = Path(path)
    _check_replaceable(path)
    with atomic_folder(path) as folder:
        for name, component in components.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ValueError(f"a component's name is letters, digits, '_' and '-', got {name!r}")
            (folder / name).mkdir()
            _write_component(folder / name, component)
        names = {name: component.class_name for name, component in components.items()}
        atomic_write_json(folder / INDEX, {_KIND: label.kind, _VERSION: label.version, **names})
        if generation is not None:
            atomic_write_json(folder / GENERATION, generation)
        if label.card:
            (folder / "README.md").write_text(label.card, encoding="utf-8")
        seal(folder)


def seal(path: Path | str) -> None:
    """Write the manifest of a folder: sha256 and size of every file but the model card and hidden files."""
    path = Path(path)
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if file.is_file() and not hidden and name not in (MANIFEST, *_UNCHECKED):
            files[name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
    atomic_write_json(path / MANIFEST, {"files": files})


def check(path: Path | str) -> str:
    """Compare every file that the manifest of `path` lists with its size and sha256; the folder's digest.

    Raises ValueError naming the first file that is missing or differs.
    """
    path = Path(path)
    files = _manifest(path)
    for name, stated in files.items():
        file = contained(path, name)
        if not file.is_file():
            raise ValueError(f"{path}: {name} is missing, though {MANIFEST} lists it")
        if not isinstance(stated, dict) or not {"sha256", "bytes"} <= stated.keys():
            raise ValueError(f"{path / MANIFEST}: the entry of {name} wants the keys 'sha256' and 'bytes'")
        size = file.stat().st_size
        if size != stated["bytes"]:
            raise ValueError(
                f"{path}: {name} is damaged: {size} bytes, and {MANIFEST} says {stated['bytes']}"
            )
        if _sha256(file) != stated["sha256"]:
            raise ValueError(f"{path}: {name} is damaged: its sha256 is not the one in {MANIFEST}")
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_folder(path: Path | str) -> ModelFolder:
    """Read a model folder, after checking every file against its manifest; tensors are read when asked for.

    Raises ValueError, naming the file, for whatever is missing, damaged, or not in the manifest though it
    would be read.
    """
    path = Path(path)
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is no model folder: it has no {INDEX}")
    digest = check(path)
    files = _manifest(path)
    for file in (*path.glob("*.json"), *path.glob("*/*.json"), *path.glob("*/*.safetensors")):
        name = file.relative_to(path).as_posix()
        if name != MANIFEST and name not in files and not name.startswith("."):
            raise ValueError(f"{path}: {name} is not in {MANIFEST}")
    index = _read_json(path / INDEX)
    kind, version = index.pop(_KIND, None), index.pop(_VERSION, None)
    if not isinstance(kind, str) or not isinstance(version, str):
        raise ValueError(
            f"{path / INDEX}: wanted texts under {_KIND!r} and {_VERSION!r}; not a folder of this library?"
        )
    components = {}
    for name, class_name in index.items():
        if not isinstance(class_name, str):
            raise ValueError(f"{path / INDEX}: wanted a class name under {name!r}, got {class_name!r}")
        folder = contained(path, name)
        components[name] = StoredComponent(
            class_name=class_name, config=_read_json(folder / _CONFIG), path=folder
        )
    generation = _read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    return ModelFolder(
        path=path, kind=kind, version=version, components=components, generation=generation, digest=digest
    )


def resolve(name_or_path: Path | str, builtin: Mapping[str, Path]) -> Path:
    """The folder that a user means: a local model folder, a built-in name, or a hub repository "owner/name".

    A local folder never costs a network call; a name in `builtin` wins over a local folder that holds no
    model. A hub repository is fetched through huggingface_hub, without anything but JSON, text and
    safetensors. Raises ValueError that says what was tried.
    """
    path = Path(name_or_path).expanduser()
    if (path / INDEX).is_file():
        return path
    if str(name_or_path) in builtin:
        return builtin[str(name_or_path)]
    if path.exists():
        raise ValueError(f"{path} is no model folder: it has no {INDEX}")
    known = ", ".join(builtin) or "none"
    if not isinstance(name_or_path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name_or_path):
        raise ValueError(
            f"no model {str(name_or_path)!r}: not a local folder, not a built-in name ({known}), "
            "not a hub repository 'owner/name'"
        )
    return _fetch(name_or_path, known)


def contained(folder: Path, name: str) -> Path:
    """`folder / name` for a name read from a file. Raises ValueError unless it stays inside `folder`."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name
        or posix.is_absolute()
        or windows.drive
        or windows.root
        or ".." in (*posix.parts, *windows.parts)
    ):
        raise ValueError(f"{name!r} does not stay inside {folder}")
    return folder / name


def _fetch(repository: str, known: str) -> Path:
    tried = f"no model {repository!r}: not a local folder, not a built-in name ({known})"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{tried}; `pip install huggingface_hub` to look on the hub") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(_FETCHED)))
    # no connection, no such repository, no access: each its own class, of several packages
    except Exception as error:
        raise ValueError(f"{tried}, and the hub did not give it ({type(error).__name__}: {error})") from error


def _write_component(folder: Path, component: Component) -> None:
    if component.write is not None:
        component.write(folder)
    for name in (_CONFIG, _TENSORS) if component.tensors is not None else (_CONFIG,):
        if (folder / name).exists():
            raise ValueError(f"{component.class_name} writes {name} itself, which is written from its values")
    atomic_write_json(folder / _CONFIG, component.config)
    if component.tensors is not None:
        save_file(_apart(component.tensors), folder / _TENSORS, metadata={"format": "pt"})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, none sharing storage with another: what the format can hold."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        place = flat.untyped_storage().data_ptr()
        result[name] = flat.clone() if place in seen else flat
        seen.add(place)
    return result


def _check_replaceable(path: Path) -> None:
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / INDEX).is_file() or not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is not empty and no model folder; nothing was written")
    ours = {MANIFEST, *_UNCHECKED, *_manifest(path)}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if not file.is_dir() and name not in ours:
            raise ValueError(
                f"{path} holds {name}, which replacing the model there would lose; nothing was written"
            )


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} has no {MANIFEST}: not written whole, or put together by hand (then seal it)"
        )
    files = _read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{path / MANIFEST}: wanted an object under 'files'")
    return files


def _load(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: wanted a JSON object, got a {type(value).__name__}")
    return value


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
