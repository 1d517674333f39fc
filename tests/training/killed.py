"""Kills a small real run again and again until it is done, and compares it with one that was never killed.

`python killed.py FOLDER KILLS SEED BACKGROUND` prints counts as JSON; BACKGROUND is 1 for a run that saves in
the background, compared with one that does not. Every run is a child forked from this process, so
that hundreds of starts cost no import of torch. Half of the kills wait for a point inside a checkpoint write,
the others come at any time; what a child is doing when it dies is read from memory that it shares.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdlm.canvas import Canvas, Layout
from mmdlm.data import Batches
from mmdlm.diffusion import Absorbing, Masking, Square
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.training import AdamW, Ema, Run, Trainer, Validation, WarmupCosine
from mmdlm.training import checkpoint as checkpoints
from tokenizers_mm import Vocab

STEPS, EVERY, KEEP = 12, 2, 2
SIDE, TEXTS = 3, 12
INSIDE, SAVES, EVENTS = range(
    3
)  # bytes of the shared memory: in a save or not, saves begun, calls in this one
PAUSE = 0.0004  # seconds before each call that touches the disk inside a save


def run(folder: Path, *, prefetch: int = 2, background: bool = False) -> Run[Canvas]:
    """A transformer of one block on pairs of a few words and nine codes."""
    vocab = Vocab.build(num_text=TEXTS, num_codes=8)
    layout = Layout(vocab=vocab, grid=(SIDE, SIDE), caption=6, question=1, answer=1)

    def collate(numbers: list[int], rng: np.random.Generator) -> Canvas:
        texts = [rng.integers(0, TEXTS, size=1 + number % 4).tolist() for number in numbers]
        codes = [[(number + place) % 8 for place in range(SIDE * SIDE)] for number in numbers]
        return layout.pairs(texts, torch.tensor(codes).unflatten(1, (SIDE, SIDE)))

    def batches(seed: int, prefetch: int) -> Batches[int, Canvas]:
        return Batches(int, 4, collate=collate, seed=seed, size=20, prefetch=prefetch)

    text, image = (slice_.indices(vocab.size)[:2] for slice_ in (vocab.text, vocab.image))
    config = TransformerConfig(
        vocab_size=vocab.size, text=text, image=image, mask=vocab.mask, dim=16, depth=1, num_heads=2
    )
    torch.manual_seed(0)
    held_out = batches(1, 0)
    return Run(
        module=Predictor(Transformer(config)),
        objective=Masking(Absorbing(vocab.mask), Square()),
        batches=batches(0, prefetch),
        steps=STEPS,
        folder=folder,
        optimizer=AdamW(lr=1e-2),
        learning_rate=WarmupCosine(warmup=3),
        ema=Ema(decay=0.9),
        validation=Validation(every=3, batches=[next(held_out)]),
        keep_best="validation",
        checkpoint_every=EVERY,
        save_in_background=background,
        keep_checkpoints=KEEP,
        log_every=1,
        progress=False,
    )


def watch(shared: mmap.mmap) -> None:
    """Makes saves tell where they are, and slows them down."""
    save = checkpoints.Checkpoints.save

    def told(self, step, checkpoint):
        shared[EVENTS], shared[SAVES], shared[INSIDE] = 0, shared[SAVES] + 1, 1
        try:
            return save(self, step, checkpoint)
        finally:
            shared[INSIDE] = 0

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*arguments: Any, **named: Any) -> Any:
            if shared[INSIDE]:
                shared[EVENTS] = min(255, shared[EVENTS] + 1)
                time.sleep(PAUSE)
            return call(*arguments, **named)

        return slowed

    checkpoints.Checkpoints.save = told
    checkpoints.save_file = slow(checkpoints.save_file)
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink")):
        setattr(module, name, slow(getattr(module, name)))
    shutil.rmtree = slow(shutil.rmtree)


def start(folder: Path, shared: mmap.mmap, background: bool) -> int:
    """A child that trains in `folder`; it ends with 0 when the run is done."""
    child = os.fork()
    if child:
        return child
    try:
        shared[:] = bytes(len(shared))
        watch(shared)
        # a kill must never leave a checkpoint that looks like one and is damaged
        warnings.filterwarnings("error", message=".*cannot be read.*")
        Trainer(run(folder, background=background)).fit()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(child: int, due: Callable[[], bool]) -> bool:
    """Waits until it is `due` or the child has ended; whether it has ended, and well."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"a run that was killed before did not go on (status {status})")
            return True
        if due():
            return False
        time.sleep(0.0002)


def result(folder: Path) -> dict[str, Any]:
    """What a completed run has left: hashes of its files, its records without clock times."""
    places = sorted((folder / "checkpoints").iterdir()) + sorted((folder / "best").iterdir())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {
        f"{place.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for place in places
        for file in place.glob("*.safetensors")
    }
    timeless = [
        {k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records
    ]
    return {"names": [place.name for place in places], "files": files, "records": timeless}


def main(folder: Path, kills: int, seed: int, background: bool) -> dict[str, Any]:
    rng, shared = random.Random(seed), mmap.mmap(-1, 16)
    Trainer(run(folder / "warm", prefetch=0)).fit()  # what children would load and make ready, each anew
    began = time.perf_counter()
    wait(start(folder / "straight", shared, False), lambda: False)
    lasts = time.perf_counter() - began
    straight = result(folder / "straight")
    counts = {"kills": 0, "inside a checkpoint write": 0, "completed runs": 0, "differing runs": 0}
    while True:
        place = folder / f"run-{counts['completed runs']}"
        child, began = start(place, shared, background), time.perf_counter()
        if rng.random() < 0.5:
            save, event, later = rng.randint(1, 2), rng.randint(0, 26), rng.uniform(0, 2 * PAUSE)

            def due(save: int = save, event: int = event, later: float = later) -> bool:
                if not (shared[INSIDE] and shared[SAVES] >= save and shared[EVENTS] >= event):
                    return False
                time.sleep(later)
                return True
        else:
            moment = rng.uniform(0, lasts)

            def due(moment: float = moment, began: float = began) -> bool:
                return time.perf_counter() - began > moment

        last = counts["kills"] == kills
        if wait(child, (lambda: False) if last else due):
            counts["completed runs"] += 1
            found = result(place)
            if found != straight:
                counts["differing runs"] += 1
                differ = {
                    name: [found[name], straight[name]] for name in found if found[name] != straight[name]
                }
                print(json.dumps(differ), file=sys.stderr)
            shutil.rmtree(place)
            if last:
                return counts
            continue
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            counts["kills"] += 1
            counts["inside a checkpoint write"] += shared[INSIDE]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")))
