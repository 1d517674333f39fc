"""Configurations as JSON, model folders, and files that are written whole or not at all."""

from mmdlm.io.atomic import atomic_folder, atomic_write, atomic_write_json, recover, remove_folder
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
from mmdlm.io.lock import InUseError, locked

__all__ = [
    "Component",
    "InUseError",
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
    "locked",
    "parse_arguments",
    "read_folder",
    "recover",
    "remove_folder",
    "resolve",
    "seal",
    "signature",
    "to_json",
    "write_folder",
]
