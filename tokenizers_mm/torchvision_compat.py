"""Lets torchvision be imported where its compiled library does not fit torch. Knows nothing of tokenizers.

PyPI's torchvision is a CUDA build. Beside a CPU-only torch its library cannot load, and `import torchvision`
ends in "operator torchvision::nms does not exist", and with it the import of most of transformers and
diffusers.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def prepare_torchvision() -> torch.library.Library | None:
    """Call right before torchvision, diffusers or models of transformers are first imported.

    Where torchvision is missing or its library loads, does nothing and returns None. Only where the library
    fails to load declares the schemas of the two operators that torchvision annotates on import; no kernel is
    faked, so calling them still fails loudly. Returns the declarations, which live as long as the process
    (the cache holds them).
    """
    libraries = [
        file for folder in package_folders() for file in sorted(folder.glob("_C*")) if is_library(file)
    ]
    if not libraries:
        return None
    try:
        for file in libraries:
            torch.ops.load_library(str(file))
    except OSError:
        declarations = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            declarations.define(schema)
        return declarations
    return None


def package_folders() -> list[Path]:
    """Where torchvision is installed, found without importing it; empty when it is not."""
    spec = find_spec("torchvision")
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def is_library(file: Path) -> bool:
    return file.suffix in (".so", ".pyd", ".dylib")
