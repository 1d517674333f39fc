"""A run's state on the disk: safetensors and JSON under a manifest of sha256, whole or not at all.

A checkpoint is a folder `step-00000100`: `module.safetensors`, `optimizer.safetensors`, `average.safetensors`
(where there is one), `state.json` (step, data position, what else is plain) and `manifest.json`. What several
ranks held in parts lies in parts, `shard-00001-model-00001-of-00003.safetensors` (`pieces.py`). A damaged
one is reported and left alone: passed over, neither changed nor deleted nor counted among those that stay.
When the run comes to its step again, it is moved to `broken-step-00000100` to make room.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdlm.io.atomic import atomic_folder, atomic_write, remove_folder
from mmdlm.training.pieces import pieces, read_pieces
from mmdlm.training.ranks import Ranks

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that another run has written."""


class SaveError(OSError):
    """Something of a run could not be written (a full disk, mostly); says what stands."""


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: named tensors by group (`module`, `optimizer`, `average`), and plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    folder: Path | None = None  # where it lies, if in parts: then `tensors` are on the meta device


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is being written: files in `folder`, and what their sha256 are known to be."""

    folder: Path
    digests: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, in one folder; the `keep` newest ones that are whole stay."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._whole: dict[int, bool] = {}  # of the steps that this process has written or read

    def steps(self) -> list[int]:
        """The steps there is a checkpoint of, ascending; unchecked."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Writes the checkpoint of `step`; older ones than the newest `keep` go only after it stands.

        Raises SaveError, saying what stands, when it cannot be written; then nothing of it is left.
        """
        with self.writing(step, checkpoint.state) as begun:
            for group, tensors in checkpoint.tensors.items():
                plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
                save_file(plain, begun.folder / f"{group}.safetensors")
        return self._path(step)

    @contextmanager
    def writing(self, step: int, state: Mapping[str, Any]) -> Iterator[Unfinished]:
        """Inside, the tensors' files of the checkpoint of `step` are written; see `save`."""
        path = self._path(step)
        try:
            with atomic_folder(path) as part:
                begun = Unfinished(part)
                yield begun
                atomic_write(part / "state.json", _json(dict(state)))
                names = sorted(file.name for file in part.iterdir())
                known = begun.digests
                if missing := sorted(known.keys() - set(names)):
                    raise OSError(f"{missing} were written, and are not in {part}: all ranks need one folder")
                manifest = {name: known[name] if name in known else sha256(part / name) for name in names}
                atomic_write(part / "manifest.json", _json(manifest))
                if path.exists() and not self._is_whole(step):
                    path.rename(self._aside(path))
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"the checkpoint {path} could not be written: {error}; {self._standing()}"
            ) from error
        self._whole[step] = True
        self.prune()

    def prune(self) -> None:
        """Removes whole checkpoints older than the `keep` newest such, as each save does at its end."""
        whole = [each for each in self.steps() if self._is_whole(each)]
        for old in whole[: -self.keep]:
            remove_folder(self._path(old))

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, on the CPU; CheckpointError if a file is not as it was saved."""
        path = self._path(step)
        try:
            files = [name for name in _verify(path) if name.endswith(".safetensors")]
            if any(name.startswith("shard-") for name in files):
                return Checkpoint(pieces(path), _state(path), path)
            tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in files}
            return Checkpoint(tensors, _state(path))
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, None if there is none at all.

        A warning reports each damaged one that is passed over; it is left as it is. Raises CheckpointError if
        there were checkpoints and all of them are damaged.
        """
        for step in reversed(self.steps()):
            try:
                checkpoint = self.load(step)
            except CheckpointError as error:
                self._whole[step] = False
                message = f"{error}. It is left as it is and passed over."
                warnings.warn(message, stacklevel=2)
            else:
                self._whole[step] = True
                return checkpoint
        broken = len(self.steps()) + len(list(self.folder.glob("broken-step-*")))
        if broken:
            tried = f"{broken} are damaged; to start anew, remove the folder"
            raise CheckpointError(f"no checkpoint in {self.folder} can be read ({tried})")
        return None

    def _is_whole(self, step: int) -> bool:
        if step not in self._whole:
            try:
                _verify(self._path(step))
                self._whole[step] = True
            except (OSError, ValueError, AttributeError) as error:
                self._whole[step] = False
                told = f"the checkpoint {self._path(step)} cannot be read: {error}"
                warnings.warn(f"{told}. It is left as it is and passed over.", stacklevel=3)
        return self._whole[step]

    def _standing(self) -> str:
        whole = [step for step in self.steps() if self._is_whole(step)]
        return f"{self._path(whole[-1]).name} stands" if whole else "there is none before it"

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _aside(self, path: Path) -> Path:
        """A name that is free."""
        aside, number = path.with_name(f"broken-{path.name}"), 1
        while aside.exists():
            aside, number = path.with_name(f"broken-{path.name}.{number}"), number + 1
        return aside


def load_tensors(folder: Path, group: str = "module") -> dict[str, Tensor]:
    """Tensors of a checkpoint's `folder` (`step-00000100`), whole, on the CPU, also if it lies in parts.

    `group` is "module", "optimizer" or "average". Raises CheckpointError where the checkpoint cannot be read.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint, wanted a folder step-00000100 or the like")
    found = Checkpoints(folder.parent, keep=1).load(int(match.group(1)))
    if group not in found.tensors:
        raise CheckpointError(f"{folder} holds no {group}, but {', '.join(found.tensors)}")
    if found.folder is None:
        return dict(found.tensors[group])
    whole = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in found.tensors[group].items()}
    read_pieces(found.folder, group, whole, Ranks())
    return whole


def _verify(path: Path) -> list[str]:
    """The files of a checkpoint, all as they were saved, by its manifest; ValueError or OSError else."""
    written = (path / "manifest.json").read_bytes()
    manifest: dict[str, str] = json.loads(written)
    stray = manifest.keys() ^ {file.name for file in path.iterdir() if file.name != "manifest.json"}
    if stray:
        raise ValueError(f"its manifest and its files disagree about {sorted(stray)}")
    for name, digest in manifest.items():
        if sha256(path / name) != digest:
            raise ValueError(f"{name} is not the file that was saved (its sha256 differs)")
    if written != _json(manifest):  # no byte of the manifest itself is without a check
        raise ValueError("manifest.json is not the file that was saved")
    return list(manifest)


def _state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, live; a tensor with two names (tied) has the first."""
    seen: set[int] = set()
    tensors = {}
    for name, value in module.state_dict(keep_vars=True).items():  # live: a tied one is the same object
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    return tensors


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `PARAMETER|SLOT`."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                owner, kind = type(optimizer).__name__, type(value).__name__
                raise ValueError(f"{owner} keeps {slot!r} as {kind}, wanted a tensor")
            tensors[f"{name}|{slot}"] = value
    return tensors


@torch.no_grad()
def restore_tensors(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copies saved tensors into live ones in place; CheckpointError if names, shapes or dtypes differ."""
    missing, unexpected = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    changed = [name for name, value in live.items() if name in saved and _kind(value) != _kind(saved[name])]
    if missing or unexpected or changed:
        raise CheckpointError(
            f"the checkpoint's {what} does not fit this run: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(changed)} of another shape or dtype "
            f"{changed[:3]}; resume with the run that wrote it, or take another folder"
        )
    for name, value in live.items():
        value.copy_(saved[name])


@torch.no_grad()
def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Puts tensors of `optimizer_tensors` back; CheckpointError if they do not fit the module."""
    parameters = dict(module.named_parameters())
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, slot = key.rpartition("|")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            shape = tuple(value.shape)
            raise CheckpointError(f"the checkpoint's optimizer state {key!r} {shape} fits no parameter")
        slots.setdefault(name, {})[slot] = value
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    # torch's own loading knows on which device an optimizer wants its step counters
    state = {number: slots[name] for number, name in enumerate(ordered) if name in slots}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # fused kernels walk parameter and state side by side, so their strides (channels_last) must agree
    for parameter, mine in optimizer.state.items():
        for slot, value in mine.items():
            if value.ndim:
                mine[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
