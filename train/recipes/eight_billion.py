"""Pairs as codes, by the million, into a transformer as large as LLaDA-8B, on many GPUs; or less of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmdlm import Pipeline
from mmdlm.canvas import Canvas, Layout, Packed
from mmdlm.codec import Codec
from mmdlm.data import Batches, Encoded, InOrder, Shards, Shuffled
from mmdlm.diffusion import Absorbing, Diagonal, Edges, Masking, Mixture, Square
from mmdlm.model import Predictor, Sdpa, Transformer, TransformerConfig, Xformers, peak_flops, training_flops
from mmdlm.pretrained import fingerprint
from mmdlm.program import find_device
from mmdlm.rows import Collator
from mmdlm.training import WSD, AdamW, BFloat16Autocast, Ema, Float32, FullyShard, Run, Validation
from tokenizers_mm import Autoencoder, BytePairTokenizer, HuggingFaceTokenizer, TextTokenizer, Vocab

LAWS = Mixture(((0.25, Square()), (0.15, Diagonal()), (0.6, Edges(text=0.4, image=0.6, hide=0.1))))

KERNELS = {"default": None, "sdpa": Sdpa(), "xformers": Xformers(packed=True)}
PRECISIONS = {"bfloat16": (BFloat16Autocast(), torch.bfloat16), "float32": (Float32(), None)}
WIDTH = 64  # rows are as long as a multiple of it, so that compiled blocks see few lengths


def recipe(
    *,
    codes: Path,
    tokenizer: Path,
    held_out: Path | None = None,
    image_tokenizer: Path | None = None,
    out: Path = Path("runs/eight_billion"),
    dim: int = 4096,
    depth: int = 32,
    heads: int = 32,
    hidden: int = 12288,
    caption: int = 256,
    length: int = 4352,
    documents: int = 16,
    accumulate: int = 64,
    steps: int = 100_000,
    lr: float = 4e-4,
    warmup: int = 2000,
    decay: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    ema: float | None = None,
    replicate: int = 1,
    recompute: int = 1,
    compiled: bool = True,
    kernel: str = "default",
    precision: str = "bfloat16",
    validate_every: int = 500,
    validate_batches: int = 64,
    checkpoint_every: int = 500,
    log_every: int = 10,
    device: str = "cuda",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """One run; under torchrun the GPUs share the weights out (FSDP2). mmdlm/training/SCALE.md is its plan.

    codes, held_out: folders of train/encode_images.py to learn from and to validate on. tokenizer: a folder
    with tokenizer.json, or one that transformers reads. image_tokenizer: the folder of the one that made the
    codes; with it OUT/model becomes a whole model, which only a tokenizer.json can be saved with. caption:
    room for a text and its end, longer ones are cut; a tenth has it all, as in generation, the others what
    they need. documents: pairs a micro-batch, in rows of at most `length`, a multiple of 64. accumulate:
    micro-batches a step, a multiple of the number of GPUs. decay: steps of the way down, none: a tenth of
    all. replicate: groups of GPUs with a whole copy each, as a rule machines. recompute: the first of so many
    blocks is computed again for the gradient, 0: none is. ema: the decay of averaged weights, which take 4
    bytes a weight more.
    """
    for name, value, known in (("precision", precision, PRECISIONS), ("kernel", kernel, KERNELS)):
        if value not in known:
            raise ValueError(f"{name}={value}: wanted one of {', '.join(known)}")
    for name, value, least in (("documents", documents, 1), ("caption", caption, 2), ("steps", steps, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: wanted at least {least}")
    if length < 1 or length % WIDTH:
        raise ValueError(f"length={length}: wanted a multiple of {WIDTH}")
    place = find_device(device, option="device=")
    text, source = read_tokenizer(tokenizer), Shards(codes, order=Shuffled(seed))
    if image_tokenizer is not None and not isinstance(text, BytePairTokenizer):
        raise ValueError(f"tokenizer={tokenizer}: a whole model wants tokenizer.json; or no image_tokenizer")
    vocab = Vocab.build(num_text=text.size, num_codes=source.num_codes)
    layout = Layout(vocab=vocab, grid=source.grid, caption=caption, question=1, answer=1)
    if layout.pair_frame.length > length:
        raise ValueError(f"length={length}: a pair takes up to {layout.pair_frame.length} positions")
    picture = None if image_tokenizer is None else read_image_tokenizer(image_tokenizer, source)
    pairs = Collator(Codec(text, picture, layout), length=length, whole=0.1, truncate=True)
    collate = Even(Packed[Encoded](pairs, length), WIDTH)
    torch.manual_seed(seed)  # the first weights, where they are to lie: each GPU draws all of them
    with place:
        network = Transformer(shape(vocab, dim, depth, heads, hidden), kernel=KERNELS[kernel])
    network.checkpoint_blocks(recompute)
    if compiled:
        network.compile_blocks()
    module = Predictor(network)
    arithmetic, gathered = PRECISIONS[precision]
    yield Run(
        module=module,
        objective=Masking(Absorbing(vocab.mask), LAWS),
        batches=Batches(source, documents, collate=collate, seed=seed, prefetch=2),
        steps=steps,
        folder=out / "transformer",
        optimizer=AdamW(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay),
        learning_rate=WSD(warmup=warmup, decay=steps // 10 if decay is None else decay, floor=0.025),
        clip=clip,
        ema=None if ema is None else Ema(decay=ema),
        precision=arithmetic,
        accumulate=accumulate,
        parallel=FullyShard(replicate=replicate, param_dtype=gathered),
        flops=training_flops,
        peak_flops=peak_flops(place),
        validation=None
        if held_out is None
        else Validation(
            every=validate_every, batches=read_batches(held_out, source, collate, documents, validate_batches)
        ),
        checkpoint_every=checkpoint_every,
        save_in_background=True,
        log_every=log_every,
        seed=seed,
        progress=progress,
    )
    if picture is not None:
        pipe = Pipeline(transformer=module, text_tokenizer=text, image_tokenizer=picture, layout=layout)
        pipe.save_pretrained(out / "model", card=card(out.name, module, source))


def shape(vocab: Vocab, dim: int, depth: int, heads: int, hidden: int) -> TransformerConfig:
    """Norms, rotary base and the lack of biases are LLaDA-8B's; the vector per modality is ours."""
    return TransformerConfig(
        vocab_size=vocab.size,
        text=(vocab.text.start, vocab.text.stop),
        image=(vocab.image.start, vocab.image.stop),
        mask=vocab.mask,
        dim=dim,
        depth=depth,
        num_heads=heads,
        hidden=hidden,
        norm_eps=1e-5,
        rope_base=500_000.0,
        qk_norm=False,
    )


@dataclass(frozen=True)
class Even:
    """Rows padded to a multiple of `width`."""

    collate: Callable[[list[Encoded], np.random.Generator], Canvas]
    width: int

    def __call__(self, items: list[Encoded], rng: np.random.Generator) -> Canvas:
        made = self.collate(items, rng)
        return made.pad_to(-(-made.shape[1] // self.width) * self.width)


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Any tokenizer.json, which a model folder can hold, or what else transformers reads."""
    if (folder / "tokenizer.json").is_file():
        return BytePairTokenizer.load(folder)
    return HuggingFaceTokenizer.from_pretrained(folder)


def read_image_tokenizer(folder: Path, source: Shards) -> Autoencoder:
    """The one that made the codes of `source`. Raises ValueError for another."""
    tokenizer = Autoencoder.from_pretrained(folder)
    if fingerprint(tokenizer) != source.tokenizer:
        raise ValueError(f"image_tokenizer={folder}: the codes in {source.path} are of another one")
    return tokenizer


def read_batches(
    folder: Path,
    source: Shards,
    collate: Callable[[list[Encoded], np.random.Generator], Canvas],
    documents: int,
    count: int,
) -> list[Canvas]:
    """The first micro-batches of another folder, always the same. ValueError for codes of another kind."""
    held = Shards(folder, order=InOrder())
    if (held.tokenizer, held.grid) != (source.tokenizer, source.grid):
        raise ValueError(f"held_out={folder}: its codes are of another tokenizer or grid than {source.path}")
    starts = range(0, min(len(held), count * documents), documents)
    return [
        collate(
            [held[number] for number in range(start, min(start + documents, len(held)))],
            np.random.default_rng(start),
        )
        for start in starts
    ]


def card(name: str, module: Predictor, source: Shards) -> str:
    """What the model is."""
    return (
        f"# {name}\n\n{module.num_parameters():,} parameters, trained by train/recipes/eight_billion.py on "
        f"{len(source):,} pairs of {source.grid[0]} x {source.grid[1]} codes. Nothing was measured.\n"
    )
