"""What an import costs: `import mmdlm` and its command nothing, a room torch at most."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from house import PACKAGES, ROOT, read_house

REPORT = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    command = [sys.executable, "-c", f"{code}\n{REPORT}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def foreign(modules: set[str]) -> set[str]:
    """Those that neither Python itself nor a bare start-up brings."""
    return modules - set(sys.stdlib_module_names) - loaded_by("pass")


@pytest.mark.parametrize(
    "code",
    [
        "import mmdlm; assert 'Pipeline' in dir(mmdlm) and mmdlm.__version__",
        "import mmdlm.cli",
        "from mmdlm.cli import main; assert main(['--help']) == 0",
        "from mmdlm.cli import main; assert main(['no-such-program']) == 2",
    ],
)
def test_the_package_and_its_command_load_nothing_foreign(code):
    assert foreign(loaded_by(code)) == {"mmdlm"}


def test_the_measure_sees_what_is_loaded():
    assert "numpy" in foreign(loaded_by("import numpy"))


def test_no_module_loads_the_slow_libraries():
    names = [name for name in read_house() if name.split(".")[0] in PACKAGES]
    modules = loaded_by("\n".join(f"import {name}" for name in names))
    assert modules >= {"mmdlm", "tokenizers_mm", "torch"}
    assert not modules & {"diffusers", "transformers", "torchvision", "xformers"}


def test_a_name_that_is_not_offered_is_an_attribute_error():
    import mmdlm

    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = mmdlm.Pipelin
