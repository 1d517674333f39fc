"""torchvision can be imported beside a torch that it does not fit, and what is missing fails loudly."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tokenizers_mm import prepare_torchvision, torchvision_compat

PROBE = """
import sys
from tokenizers_mm import prepare_torchvision
assert prepare_torchvision() is prepare_torchvision()
assert not {"torchvision", "transformers", "diffusers"} & set(sys.modules)
import torch, torchvision
from torchvision.transforms import v2
assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
declared = prepare_torchvision() is not None
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except (NotImplementedError, RuntimeError):
    assert declared
else:
    assert not declared
print("fine")
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_can_be_imported_and_no_kernel_is_faked():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


@pytest.fixture
def fresh(monkeypatch):
    """The probe forgets what it found, and declares nothing in this process."""
    declared = []

    class Recorder:
        def __init__(self, name: str, kind: str) -> None:
            assert (name, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            declared.append(schema)

    monkeypatch.setattr(torch.library, "Library", Recorder)
    prepare_torchvision.cache_clear()
    yield declared
    prepare_torchvision.cache_clear()


def found(monkeypatch, folder, load) -> None:
    (folder / "_C.so").write_bytes(b"")
    (folder / "_C.py").write_bytes(b"")
    monkeypatch.setattr(torchvision_compat, "package_folders", lambda: [folder])
    monkeypatch.setattr(torch.ops, "load_library", load)


def test_a_healthy_install_is_left_alone(monkeypatch, tmp_path, fresh):
    loaded = []
    found(monkeypatch, tmp_path, loaded.append)
    assert prepare_torchvision() is None
    assert loaded == [str(tmp_path / "_C.so")]
    assert fresh == []


def test_without_torchvision_nothing_happens(monkeypatch, fresh):
    monkeypatch.setattr(torchvision_compat, "package_folders", list)
    assert prepare_torchvision() is None
    assert fresh == []


def test_a_library_that_does_not_load_gets_schemas_once(monkeypatch, tmp_path, fresh):
    def fail(path: str) -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    found(monkeypatch, tmp_path, fail)
    assert prepare_torchvision() is prepare_torchvision() is not None
    assert [schema.split("(")[0] for schema in fresh] == ["nms", "qnms"]


def test_other_failures_are_not_swallowed(monkeypatch, tmp_path, fresh):
    def fail(path: str) -> None:
        raise RuntimeError("something else")

    found(monkeypatch, tmp_path, fail)
    with pytest.raises(RuntimeError, match="something else"):
        prepare_torchvision()
    assert fresh == []
