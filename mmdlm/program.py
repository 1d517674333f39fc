"""What the programs in `infer/` and `train/` share: options, loading, and how wrong input ends.

Loads no torch by itself.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mmdlm.pipeline import Pipeline

__all__ = [
    "add_guidance",
    "add_sampling",
    "find_device",
    "load",
    "open_images",
    "options",
    "positive",
    "prepare_process",
    "run",
    "seed",
]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names in glibc's malloc.h: M_TRIM_THRESHOLD, ...


def options(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a program's docstring, with --model, --seed and --device."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="scenes", help="built-in name, model folder or hub repository (default: scenes)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="the same seed gives the same samples (default: 0)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """--steps and --quiet, for programs that generate."""
    parser.add_argument("--steps", type=positive, help="steps of the sampler (default: the model's own)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """--guidance, for programs where a text and a picture meet."""
    parser.add_argument("--guidance", type=float, help="guidance scale, 0 is none (default: the model's own)")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """An integer that seeds every generator, for argparse."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, got {value}")
    return value


def prepare_process() -> None:
    """Settings of this process that make torch faster on a CPU; call it before torch is imported.

    Waiting OpenMP threads sleep, since on shared cores spinning ones take the time of those that work. glibc
    keeps large freed blocks: by default it returns every large tensor to the system and takes page faults for
    the next. What the user set in the environment stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform != "linux" or "MALLOC_MMAP_MAX_" in os.environ:
        return
    try:
        tune = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, which has no such knob
        return
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28)):
        tune(option, value)


def load(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline that --model and --device ask for. Raises ValueError that says what is wrong."""
    prepare_process()
    from mmdlm.pipeline import Pipeline

    return Pipeline.from_pretrained(arguments.model, device=find_device(arguments.device))


def find_device(name: str, *, option: str = "--device ") -> torch.device:
    """The device of that name. Raises ValueError, beginning with `option`, for one that is not here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{option}{name}: no such device; try cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option}{name}: wanted cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"{option}{name}: torch can use {count} CUDA devices here; try cpu")
    return device


def open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Pictures from files, the right way up, in RGB. Raises ValueError naming the file that is none."""
    from mmdlm.data import decode

    return [decode(path) for path in paths]


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line; a ValueError or OSError ends in one line on stderr and status 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
