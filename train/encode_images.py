"""Turn pictures into shards of codes once: `python train/encode_images.py DATA --out codes --model MODEL`.

DATA is an imagefolder, or .jsonl, .parquet or .tar files or a folder of them; MODEL is a model, or (then with
--size) an image tokenizer that train_tokenizer.py made or a VQModel of diffusers. Pictures are scaled and
cropped to squares. The work is shared by --processes processes and, under torchrun, by all ranks; the files
are the same whatever their number. The same command takes up an interrupted run, and mends damaged shards.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdlm.program import find_device, load, options, positive, prepare_process, run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmdlm.data import Indexed, OnError, Sample
    from tokenizers_mm import Autoencoder, VQModelTokenizer

RANKS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # what torchrun sets
SECONDS = 0.2  # how often is looked whether processes have ended


def main(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "")
    add = parser.add_argument
    add("data", type=Path, help="folder or file")
    add("--out", type=Path, required=True, help="folder to write")
    add("--columns", help="columns with texts (default: text)")
    add("--image-column", help="column with pictures (default: what is usual)")
    add("--pieces", help="column with documents of texts and pictures; or TEXTS,PICTURES")
    add("--skip", action="store_true", help="leave out rows whose picture cannot be had, and say which")
    add("--size", type=positive, help="pixels a side (default: the model's)")
    add("--shard-size", type=positive, default=4096, help="rows a shard (default: 4096)")
    add("--batch", type=positive, default=64, help="pictures encoded together (default: 64)")
    add("--processes", type=positive, help="default: the CPUs of this machine; with CUDA 1")
    add("--worker", help=argparse.SUPPRESS)  # K/N: this is process K of N that the program started
    given = parser.parse_args(arguments)
    prepare_process()
    rank, world, local = (int(os.environ.get(name, first)) for name, first in RANKS.items())
    from mmdlm.data import Columns, Shards, Skip, Stop, open_source

    on_error = Skip() if given.skip else Stop()
    columns = Columns.named(given.columns, given.image_column, given.pieces)
    source = open_source(given.data, columns=columns, on_error=on_error)
    if given.worker:
        threading.Thread(target=end_with_parent, daemon=True).start()
        number, processes = map(int, given.worker.split("/"))
        encode(given, source, on_error, (rank * processes + number, world * processes))
        return
    num_shards = -(-len(source) // given.shard_size)
    wanted = given.processes or (1 if given.device != "cpu" else max(1, num_cpus() // local))
    processes = min(wanted, -(-num_shards // world))
    if processes == 1:
        encode(given, source, on_error, (rank, world))
    else:
        start(arguments, processes, given.out, num_shards)
    if not (given.out / "index.json").is_file():
        print(f"{given.out}: rank {rank} of {world} is done, others are not")
        return
    made = Shards(given.out)
    print(f"{given.out}: {len(made)} {'documents' if given.pieces else 'pairs'}")
    if made.skipped:
        print(f"left out {len(made.skipped)}: {made.skipped}", file=sys.stderr)


def num_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however that was."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def encode(
    given: argparse.Namespace, source: Indexed[Sample], on_error: OnError, part: tuple[int, int]
) -> None:
    """Encodes one part of the shards in this process, on one thread: floats depend on their number."""
    import torch
    from tqdm import tqdm

    from mmdlm.data import ShardPlan, data_digest, encode_shards
    from mmdlm.pretrained import fingerprint
    from tokenizers_mm import VQModelTokenizer

    tokenizer, size = find_tokenizer(given)
    tokenizer.grid(size, size)  # refuses a size that is none
    device = find_device(given.device)
    if given.device == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    module = tokenizer.model if isinstance(tokenizer, VQModelTokenizer) else tokenizer
    torch.nn.Module.to(module, device)
    told = {"columns": given.columns, "image_column": given.image_column, "pixels": size}
    told |= {"pieces": given.pieces} if given.pieces else {}
    plan = ShardPlan(
        num_codes=tokenizer.size,
        tokenizer=fingerprint(module),
        made_of={"data": data_digest(given.data), **told},
        shard_size=given.shard_size,
        batch_size=given.batch,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(desc="encode", unit="row", disable=bool(given.worker)) as bar:
            encode_shards(
                source,
                given.out,
                encode=Codes(tokenizer, size, device),
                plan=plan,
                part=part,
                on_error=on_error,
                on_items=bar.update,
            )
    finally:
        torch.set_num_threads(threads)


def find_tokenizer(given: argparse.Namespace) -> tuple[Autoencoder | VQModelTokenizer, int]:
    """The image tokenizer of --model, and pixels a side."""
    from tokenizers_mm import Autoencoder, VQModelTokenizer

    folder = Path(given.model)
    if (folder / "model_index.json").is_file() or not (folder / "config.json").is_file():
        pipe = load(given)
        tokenizer = pipe.image_tokenizer
        assert isinstance(tokenizer, Autoencoder), "the only one that a model folder holds"
        return tokenizer, given.size or pipe.codec.image_size
    if not given.size:
        raise ValueError(f"--model {folder} is an image tokenizer: say with --size how many pixels a side")
    known = json.loads((folder / "config.json").read_text("utf-8"))
    if known.get("_class_name") == "VQModel":
        return VQModelTokenizer.from_pretrained(folder), given.size
    return Autoencoder.from_pretrained(folder), given.size


class Codes:
    """Pictures of any size to codes."""

    def __init__(self, tokenizer: Autoencoder | VQModelTokenizer, size: int, device: torch.device) -> None:
        self.tokenizer, self.size, self.device = tokenizer, size, device

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        from PIL import Image

        from mmdlm.data import fit
        from tokenizers_mm import to_tensor

        fitted = [fit(Image.fromarray(image), self.size) for image in images]
        return self.tokenizer.encode(to_tensor(fitted).to(self.device)).cpu().numpy()


def start(arguments: Sequence[str], processes: int, out: Path, num_shards: int) -> None:
    """Runs this program as several processes. Raises ValueError with the last words of one that fails."""
    from tqdm import tqdm

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # nothing fills the pipe
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--worker"]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen([*command, f"{k}/{processes}"], stdin=pipe, stderr=pipe, env=environment, text=True)
        for k in range(processes)
    ]
    try:
        with tqdm(total=num_shards, desc="encode", unit="shard") as bar:
            states = [None]
            while None in states:
                time.sleep(SECONDS)
                states = [child.poll() for child in children]
                num_done = len(list(out.glob("shard-*.json")))
                if num_done > bar.n:
                    bar.update(num_done - bar.n)
                for child in children:
                    if child.poll() and child.stderr is not None:
                        words = child.stderr.read().strip().splitlines() or [f"status {child.returncode}"]
                        raise ValueError(words[-1].removeprefix(f"{Path(__file__).name}: "))
    finally:
        for child in children:
            child.kill()
            child.wait()


if __name__ == "__main__":
    run(main)
