"""Fashion-MNIST through torchvision: captions of pictures, pictures of captions, ten classes, and a judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmdlm import Pipeline
from mmdlm.data import Batches, Listed, Sample, Shuffled
from mmdlm.diffusion import Diagonal, Edges, LossOutput, Mixture, Square
from mmdlm.pairs import Look, encoded, evenly, learn, learn_codes, percent, tensor_of, untrained
from mmdlm.program import find_device
from mmdlm.report import sheet
from mmdlm.training import AdamW, Run, WarmupCosine
from tokenizers_mm import Autoencoder, AutoencoderConfig, BytePairTokenizer, prepare_torchvision

LAWS = Mixture(((0.25, Square()), (0.15, Diagonal()), (0.6, Edges(text=0.3, image=0.7, hide=0.15))))
NAMES = (
    "a t-shirt",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
FORMS = ("a photo of {}", "a small grey picture of {}", "{}")


def recipe(
    *,
    data: Path,
    out: Path = Path("runs/fashion"),
    download: bool = False,
    judge_steps: int = 1500,
    tokenizer_steps: int = 1200,
    steps: int = 3000,
    batch: int = 64,
    parts: int = 2,
    lr: float = 5e-3,
    dim: int = 128,
    depth: int = 6,
    exam: int = 1000,
    guidance: float = 1.0,
    samples_every: int = 500,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """A judge, a tokenizer, a transformer, and an exam; the model stands in OUT/model, figures in its card.

    data: torchvision's root of FashionMNIST (`download=true` fetches it). exam: held-out pictures that are
    captioned, and captions of ten classes that are drawn. guidance: scale for drawing. batch: rows a step,
    worked on in `parts`, on a CPU at once; they divide 64 as well, the pictures a step of the tokenizer (the
    judge has 128). lr: of Muon.
    """
    if parts < 1 or batch < 1 or batch % parts or 64 % parts:
        raise ValueError(f"batch={batch}: wanted a multiple of parts={parts}, which is to divide 64 as well")
    if exam < 1:
        raise ValueError(f"exam={exam}: wanted at least 1")
    place = find_device(device, option="device=")
    known, unseen = read(data, train=True, download=download), read(data, train=False, download=download)
    torch.manual_seed(seed)  # the first weights
    judge = Judge()
    yield Run(
        module=judge,
        objective=Naming(),
        batches=labelled(known, 128 // parts, seed),
        accumulate=parts,
        steps=judge_steps,
        folder=out / "judge",
        optimizer=AdamW(lr=2e-3, weight_decay=0.05),
        learning_rate=WarmupCosine(warmup=50, floor=0.01),
        ema=None,
        checkpoint_every=500,
        seed=seed,
        progress=progress,
    )
    image_tokenizer = Autoencoder(
        AutoencoderConfig(
            channels=(32, 64), encoder_blocks=(0, 2), decoder_blocks=(1, 2), levels=(8, 8, 8), context=3
        )
    )
    yield learn_codes(
        image_tokenizer,
        known,
        folder=out / "image_tokenizer",
        steps=tokenizer_steps,
        parts=parts,
        shown=evenly(known, 32),
        every=samples_every,
        seed=seed,
        progress=progress,
    )
    texts = [form.format(name) for name in NAMES for form in FORMS]
    text_tokenizer = BytePairTokenizer.train(texts * 10, size=300)
    pairs = encoded(image_tokenizer, known)
    height, width, _ = known[0].all_images[0].shape
    grid = image_tokenizer.grid(height, width)
    pipe = untrained(
        texts, text_tokenizer, image_tokenizer, grid=grid, dim=dim, depth=depth, guidance=guidance
    )
    yield learn(
        pipe,
        pairs,
        LAWS,
        folder=out / "transformer",
        steps=steps,
        batch=batch,
        parts=parts,
        lr=lr,
        hooks=((samples_every, Look(pipe, evenly(known, 16))),),
        device=place,
        seed=seed,
        progress=progress,
    )
    told, figures, drawn = report(pipe, judge, evenly(unseen, exam), len(known))
    print(told)
    (out / "scores.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    drawn.save(out / "drawn.png")
    pipe.save_pretrained(out / "model", card=f"# {out.name}\n\n{told}\n")


def read(root: Path, *, train: bool, download: bool) -> list[Sample]:
    """Every picture with its captions; `extra` holds the class. Raises ValueError where it is not there."""
    prepare_torchvision()
    from torchvision.datasets import FashionMNIST

    try:
        found = FashionMNIST(str(root), train=train, download=download)
    except RuntimeError as error:
        wanted = (
            f"{root} holds no FashionMNIST/raw with the four files of Fashion-MNIST; download=true gets them"
        )
        raise ValueError(f"{wanted} ({error})") from error
    pictures = found.data.numpy()[..., None].repeat(3, axis=3)
    return [
        Sample(
            name=f"{'train' if train else 'test'} {number}",
            image=picture,
            texts=tuple(form.format(NAMES[label]) for form in FORMS),
            extra={"class": label},
        )
        for number, (picture, label) in enumerate(zip(pictures, found.targets.tolist(), strict=True))
    ]


def labelled(samples: list[Sample], size: int, seed: int) -> Batches:
    """Batches of pictures (B, 3, H, W) in [-1, 1] and classes (B,) long."""

    def collate(items: list[Sample], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return tensor_of(items), torch.tensor([item.extra["class"] for item in items])

    source = Listed(samples.__getitem__, len(samples), order=Shuffled(seed))
    return Batches(source, size, collate=collate, prefetch=2)


class Judge(nn.Module):
    """A small convolutional classifier, grey pictures (B, 3, 28, 28) in [-1, 1] -> (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 49, 128),
            nn.ReLU(),
            nn.Linear(128, len(NAMES)),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures[:, :1])

    @torch.no_grad()
    def name(self, pictures: Tensor) -> Tensor:
        """(B,) long: the most probable classes."""
        return torch.cat([self(part).argmax(dim=1) for part in pictures.split(500)])


class Naming:
    """Cross-entropy of the judge's answers about pictures of which some pixels are left out."""

    def part(self, index: int, count: int, step: int) -> Naming:
        """Itself: every micro-batch is judged alike."""
        return self

    def counts(self, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        """The pictures of a batch."""
        return {"class": torch.tensor(len(batch[1]))}

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> LossOutput:
        pictures, classes = batch
        kept = torch.rand(pictures.shape[0], 1, *pictures.shape[2:], generator=rng) >= 0.2
        pictures = torch.where(kept, pictures, -1.0)
        loss = F.cross_entropy(module(pictures), classes, reduction="sum")
        return LossOutput({"class": loss}, {"class": torch.tensor(len(classes))})


def report(
    pipe: Pipeline, judge: Judge, samples: list[Sample], trained: int
) -> tuple[str, dict[str, float], Image.Image]:
    """What the model makes of held-out pictures and of the ten classes: in words, in figures, on a sheet."""
    num = len(samples)
    classes = torch.tensor([sample.extra["class"] for sample in samples])
    real = tensor_of(samples)
    told = pipe.caption(
        [Image.fromarray(s.image) for s in samples if s.image is not None], progress=False
    ).texts
    named = torch.tensor([text in sample.texts for text, sample in zip(told, samples, strict=True)])
    legal = {form.format(name) for form in FORMS for name in NAMES}
    prompts = [FORMS[number % len(FORMS)].format(NAMES[number % len(NAMES)]) for number in range(num)]
    drawn = pipe.text_to_image(prompts, progress=False).images
    wanted = torch.arange(num) % len(NAMES)
    made = torch.stack([torch.from_numpy(np.array(image)) for image in drawn]).permute(0, 3, 1, 2)
    made = made.float() / 127.5 - 1.0
    codes = pipe.codec.encode(real)
    rebuilt = torch.cat([pipe.image_tokenizer.decode(part) for part in codes.split(100)])
    figures = {
        "captions": float(named.float().mean()),
        "captions that are one of the thirty": sum(text in legal for text in told) / num,
        "pictures": float((judge.name(made) == wanted).float().mean()),
        "judge on real pictures": float((judge.name(real) == classes).float().mean()),
        "judge on rebuilt pictures": float((judge.name(rebuilt) == classes).float().mean()),
        "mean square error of rebuilt pictures, of [-1, 1]": float((rebuilt - real).square().mean()),
        "exam": num,
    }
    words = (
        f"Trained by train/recipes/fashion.py on {trained:,} pictures of Fashion-MNIST. Of {num} held-out "
        f"pictures {percent(int(named.sum()), num)} are captioned with their class; of {num} pictures "
        "drawn, of ten classes in turn, a classifier that was trained on the real ones says that "
        f"{percent(round(figures['pictures'] * num), num)} are of theirs. The same classifier names "
        f"{figures['judge on real pictures']:.1%} of the real held-out pictures and "
        f"{figures['judge on rebuilt pictures']:.1%} of them after the tokenizer."
    )
    columns = [image for number in range(8) for image in drawn[number * 10 : number * 10 + 10]]
    return words, figures, sheet(columns, columns=10)
