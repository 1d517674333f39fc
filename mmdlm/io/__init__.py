"""Configurations as JSON, model folders, and files that are written whole or not at all."""

from mmdlm.io.atomic import atomic_folder, atomic_write, atomic_write_json
from mmdlm.io.config import describe, from_json, parse_arguments, signature, to_json
from mmdlm.io.folder import (
    Component,
    Label,
    ModelFolder,
    StoredComponent,
    check,
    contained,
    read_folder,
    resolve,
    seal,
    write_folder,
)

__all__ = [
    "Component",
    "Label",
    "ModelFolder",
    "StoredComponent",
    "atomic_folder",
    "atomic_write",
    "atomic_write_json",
    "check",
    "contained",
    "describe",
    "from_json",
    "parse_arguments",
    "read_folder",
    "resolve",
    "seal",
    "signature",
    "to_json",
    "write_folder",
]
