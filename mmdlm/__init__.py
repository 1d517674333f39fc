"""One masked-diffusion transformer over text and image codes; loads nothing before a name is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdlm.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]

_OFFERED = {"Pipeline": "mmdlm.pipeline"}  # public name -> the module that defines it


def __getattr__(name: str) -> object:
    """The offered name, its module imported now, so that `import mmdlm` itself stays light."""
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
