"""Train one tokenizer: `python train/train_tokenizer.py image DATA --out F` or `... text DATA --out F`.

The same command takes an interrupted run up again. For several processes, each with a share of every batch:
`torchrun --nproc-per-node 2 train/train_tokenizer.py image DATA --out F --parts 2`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdlm.program import find_device, positive, prepare_process, run, seed

if TYPE_CHECKING:
    import numpy as np


def main(arguments: Sequence[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("kind", choices=("image", "text"), help="which tokenizer")
    parser.add_argument("data", nargs="+", help="an imagefolder, text files, or the word scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--size", type=positive, default=64, help="image: pixels a side (default: 64)")
    parser.add_argument("--levels", default="8,8,8,8", help="image: levels of the FSQ (default: 8,8,8,8)")
    parser.add_argument("--channels", default="32,64,128", help="image: one number each halving of the size")
    parser.add_argument(
        "--context", type=positive, default=3, help="image: kernel of the encoder (default: 3)"
    )
    parser.add_argument("--steps", type=positive, default=3000, help="image: updates (default: 3000)")
    parser.add_argument("--batch", type=positive, default=32, help="image: pictures an update (default: 32)")
    parser.add_argument(
        "--parts", type=positive, default=1, help="image: parts of a batch, worked on at once (default: 1)"
    )
    parser.add_argument(
        "--held-out",
        type=positive,
        default=256,
        help="image: pictures kept apart for the report (default: 256)",
    )
    parser.add_argument(
        "--predict-steps",
        type=count,
        default=300,
        help="image: updates of the small model that says how predictable codes are, 0: none (default: 300)",
    )
    parser.add_argument(
        "--predict-pictures",
        type=positive,
        default=2000,
        help="image: pictures it learns from (default: 2000)",
    )
    parser.add_argument("--vocabulary", type=positive, default=2000, help="text: tokens (default: 2000)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and order (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    given = parser.parse_args(arguments)
    prepare_process()
    if given.kind == "text":
        from tokenizers_mm import BytePairTokenizer

        tokenizer = BytePairTokenizer.train(texts(given.data), size=given.vocabulary)
        tokenizer.save(given.out)
        print(f"{given.out}: {tokenizer.size} tokens")
    else:
        train_image_tokenizer(given)


def train_image_tokenizer(given: argparse.Namespace) -> None:
    """Trains, takes up an interrupted run in OUT/run, saves, and reports on pictures that were kept apart."""
    import numpy as np
    import torch

    from mmdlm.data import Batches, Listed, Scenes, Shuffled
    from mmdlm.predictability import Probe
    from mmdlm.tokenizer_report import tokenizer_report
    from mmdlm.training import AdamW, Reconstruction, Run, Trainer, WarmupCosine
    from tokenizers_mm import Autoencoder, AutoencoderConfig

    if given.batch % given.parts:
        raise ValueError(f"--batch {given.batch}: wanted a multiple of --parts {given.parts}")
    device = find_device(given.device)
    picture, total = pictures(given.data, given.size)
    order = Shuffled(given.seed)(total, 0).tolist()  # files that lie together are often alike
    kept = order[: min(given.held_out, total // 10)]
    if not kept:
        raise ValueError(f"{total} pictures are too few: a tenth of them is kept apart for the report")

    def batch(indices: list[int]) -> torch.Tensor:
        stacked = np.stack([picture(index) for index in indices])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    torch.manual_seed(given.seed)  # the first weights
    config = AutoencoderConfig(
        channels=numbers(given.channels, "--channels"),
        encoder_blocks=(1,) * len(numbers(given.channels, "--channels")),
        decoder_blocks=(2,) * len(numbers(given.channels, "--channels")),
        levels=numbers(given.levels, "--levels"),
        context=given.context,
    )
    module = Autoencoder(config).to(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes are set up by torchrun
    threads = given.parts if alone and device.type == "cpu" else 1
    source = Listed(order[len(kept) :].__getitem__, total - len(kept), order=Shuffled(given.seed))
    trainer = Trainer(
        Run(
            module=module,
            objective=Reconstruction(),
            batches=Batches(
                source,
                given.batch // given.parts,
                collate=lambda indices, rng: batch(indices),
                prefetch=given.parts,
            ),
            accumulate=given.parts,
            threads=threads,
            steps=given.steps,
            folder=given.out / "run",
            optimizer=AdamW(lr=3e-3, weight_decay=0.01),
            learning_rate=WarmupCosine(warmup=50, floor=0.01),
            ema=None,
            checkpoint_every=500,
        )
    )
    trainer.fit()
    if not trainer.ranks.leads:
        return
    module.save_pretrained(given.out)
    held_out = batch(kept).to(device)
    scenes = [Scenes().scene(index) for index in kept] if given.data == ["scenes"] else []
    probe = Probe(steps=given.predict_steps, seed=given.seed) if given.predict_steps else None
    learnt = batch(order[len(kept) :][: given.predict_pictures]).to(device) if probe else held_out[:0]
    report = tokenizer_report(module, learnt, held_out, given.out, scenes=scenes, probe=probe)
    print(f"{given.out}: on {len(kept)} pictures kept apart")
    print(report)
    print(f"with pictures in {given.out / 'report.html'}")


def pictures(data: Sequence[str], size: int) -> tuple[Callable[[int], np.ndarray], int]:
    """A function from an index to (size, size, 3) uint8, and how many there are."""
    from mmdlm.data import ImageFolder, Scenes, decode, fit

    if list(data) == ["scenes"]:
        if size != 64:
            raise ValueError(f"--size {size}: scenes are 64 pixels a side")
        scenes = Scenes()
        return lambda index: scenes.image(scenes.scene(index)), 100_000
    if len(data) != 1:
        raise ValueError(f"wanted one imagefolder, got {len(data)} paths")
    folder = ImageFolder(data[0], load=lambda path: fit(decode(path), size))

    def picture(index: int) -> np.ndarray:
        image = folder[index].image
        assert image is not None
        return image

    return picture, len(folder)


def texts(data: Sequence[str]) -> Iterator[str]:
    """Every text of an imagefolder, of text files, or of the scenes."""
    from mmdlm.data import ImageFolder, Scenes, TextFiles

    if list(data) == ["scenes"]:
        scenes = Scenes()
        for index in range(10_000):
            scene = scenes.scene(index)
            yield scenes.caption(scene, index)
            yield from scenes.question(scene, index)
    elif len(data) == 1 and Path(data[0]).is_dir():
        yield from ImageFolder(data[0]).texts()
    else:
        yield from TextFiles(data).texts()


def count(text: str) -> int:
    """A whole number that is not negative, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: wanted whole numbers with commas") from error


if __name__ == "__main__":
    run(main)
