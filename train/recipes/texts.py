"""Text alone, of any length: packed rows, a bound in bits per byte on texts held out, and an honest exam."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mmdlm import Pipeline
from mmdlm.canvas import Canvas, Packed, efficiency
from mmdlm.codec import Codec, TextLayout
from mmdlm.data import Batches, Columns, Listed, Sample, SampleError, Shuffled, Skip, open_source
from mmdlm.diffusion import Absorbing, Masking, Square
from mmdlm.io import atomic_write_json
from mmdlm.ngrams import NGrams
from mmdlm.pairs import evenly, percent
from mmdlm.pretrained import Settings
from mmdlm.program import find_device
from mmdlm.sampling import Fixed, Peak, Threshold, Unmask
from mmdlm.texts import Excerpt, TextDocuments, WriteTexts, apart, bound, cut, whole_rows
from mmdlm.training import AdamW, Ema, Muon, Run, Validation, WarmupCosine, load_best
from tokenizers_mm import BytePairTokenizer

ORDERS = {"unigram": 1, "trigram": 3}
HOLE = "___"


def recipe(
    *,
    data: Path,
    out: Path = Path("runs/texts"),
    column: str = "text",
    vocabulary: int = 4000,
    room: int = 32,
    whole: float = 0.1,
    length: int = 64,
    documents: int = 64,
    parts: int = 2,
    steps: int = 5000,
    lr: float = 5e-3,
    dim: int = 160,
    depth: int = 4,
    held_out: float = 0.1,
    exam: int = 1000,
    draws: int = 16,
    samples_every: int = 500,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Run]:
    """Tokenizer, transformer on packed texts, exam; the model stands in OUT/model, figures in its card.

    data: .txt (a text a line), .jsonl or .parquet (texts under `column`; those of a row stay together), a
    folder of such files or an imagefolder. held_out: share of the rows, by a hash of their texts, that is not
    trained on; half of it says which weights are best, half is the exam's. vocabulary: tokens at most.
    room: positions of a text, its end included; longer ones are cut into several. whole: share of the texts
    that are trained with all of this room behind them, as a text is generated, and not just with their end.
    documents: texts a step, packed into rows of at most `length` positions; worked on in `parts`, on a CPU at
    once. lr: of Muon. exam: texts held out that the exam takes, and texts that are generated for it. draws:
    of the bound, for each text.
    """
    if parts < 1 or documents < 1 or documents % parts:
        raise ValueError(f"documents={documents}: wanted a multiple of parts={parts}")
    if room < 2 or length <= room:
        raise ValueError(f"length={length}: wanted more than room={room}, and room at least 2")
    if exam < 1 or draws < 2:
        raise ValueError(f"exam={exam} and draws={draws}: wanted at least 1 and 2")
    place = find_device(device, option="device=")
    groups = apart(read(data, column), held_out)
    known, chosen, unseen = ([text for sample in group for text in sample.texts] for group in groups)
    tokenizer = BytePairTokenizer.train(known, size=vocabulary)
    layout = TextLayout.build(num_text=tokenizer.size, room=room)
    torch.manual_seed(seed)  # the first weights
    writing = Unmask(Fixed(1), order=Peak(), rule=Threshold(0.9))  # several at once only where certain
    settings = {task: Settings(steps=room, policy=writing) for task in ("text", "infill")}
    pipe = Pipeline.untrained(Codec(tokenizer, None, layout), dim=dim, depth=depth, settings=settings)
    pieces, deciding = cut(known, tokenizer, room), evenly(cut(chosen, tokenizer, room), exam)
    collate = TextDocuments(layout, whole)
    packed = Packed(collate, length)
    statistics = describe(groups, pieces, {"packed": packed, "padded": collate}, documents // parts)
    print("\n".join(f"{name}: {value}" for name, value in statistics.items()))
    folder = out / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "data.json", statistics)
    yield Run(
        module=pipe.transformer.to(place),
        objective=Masking(Absorbing(layout.vocab.mask), Square()),
        batches=Batches(
            Listed(pieces.__getitem__, len(pieces), order=Shuffled(seed)),
            documents // parts,
            collate=packed,
            seed=seed,
            prefetch=2,
        ),
        accumulate=parts,
        threads=parts if place.type == "cpu" else 1,
        steps=steps,
        folder=folder,
        optimizer=Muon(lr=lr, weight_decay=0.05, rest=AdamW(lr=2e-3, weight_decay=0.05)),
        learning_rate=WarmupCosine(warmup=100, floor=0.02),
        ema=Ema(decay=0.998),
        validation=Validation(every=samples_every, batches=whole_rows(layout, deciding)),
        keep_best="validation/text",
        hooks=((samples_every, WriteTexts(pipe)),),
        checkpoint_every=samples_every,
        seed=seed,
        progress=progress,
    )
    best = load_best(folder, pipe.transformer.eval())
    told, figures = report(pipe, known, evenly(unseen, exam), draws, seed)
    told = f"{told} The weights are those of step {best:,} of {steps:,}, the best for yet other texts."
    print(told)
    (out / "scores.json").write_text(json.dumps(statistics | figures, indent=2) + "\n", "utf-8")
    pipe.save_pretrained(out / "model", card=f"# {out.name}\n\n{told}\n")


def read(data: Path, column: str) -> list[Sample]:
    """The rows that have a text; what cannot be read, be it a picture beside it, is left out and named.

    Raises ValueError when there is none.
    """
    skip, samples = Skip(), []
    for sample in open_source(data, columns=Columns(texts=(column,)), on_error=skip):
        texts = tuple(text for text in sample.texts if text.strip())
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            skip(SampleError(sample.name, f"a text is no Unicode ({error.reason})"))
            continue
        if texts:
            samples.append(Sample(name=sample.name, texts=texts))
    if skip.count:
        print(f"left out {skip.count} rows: {skip.failures}")
    if not samples:
        raise ValueError(f"{data}: not one text could be read")
    return samples


def describe(
    groups: Sequence[Sequence[Sample]],
    pieces: Sequence[Excerpt],
    ways: Mapping[str, Callable[[list[Excerpt], np.random.Generator], Canvas]],
    batch: int,
) -> dict[str, object]:
    """What the data are, and how full each of the `ways` has the rows of `batch` documents."""
    names = ("training", "validation", "exam")
    texts = [[text for sample in group for text in sample.texts] for group in groups]
    sizes, some = sorted(len(piece.ids) for piece in pieces), evenly(pieces, 20 * batch)
    batches = [some[start : start + batch] for start in range(0, len(some), batch)]
    full = {
        name: sum(efficiency(collate(items, np.random.default_rng(0))) for items in batches) / len(batches)
        for name, collate in ways.items()
    }
    return {
        **{f"rows for {name}": len(group) for name, group in zip(names, groups, strict=True)},
        **{f"texts for {name}": len(group) for name, group in zip(names, texts, strict=True)},
        "training texts that differ": len(set(texts[0])),
        "bytes a text": round(sum(len(text.encode()) for text in texts[0]) / len(texts[0]), 2),
        "documents": f"{len(pieces)} of {sizes[0]} to {sizes[-1]} tokens, mean {sum(sizes) / len(sizes):.2f}",
        **{f"share of rows that is no padding, {name}": f"{share:.1%}" for name, share in full.items()},
    }


def report(
    pipe: Pipeline, known: list[str], unseen: list[str], draws: int, seed: int
) -> tuple[str, dict[str, object]]:
    """What the model knows of texts that it has not seen, and what it writes: in words and in figures."""
    num, trained = len(unseen), set(known)
    learnt, asked = ids_of(pipe, known), ids_of(pipe, unseen)
    size = pipe.layout.vocab.num_text
    grams = {name: NGrams(learnt, order=order, size=size) for name, order in ORDERS.items()}
    nats = {name: sum(map(model.nats, asked)) for name, model in grams.items()}
    nats["model"], error = bound(pipe, unseen, draws=draws, seed=seed)
    num_bytes = sum(len(text.encode()) for text in unseen)
    num_words, num_tokens = (sum(map(len, them)) for them in ([text.split() for text in unseen], asked))
    bits = {name: value / math.log(2) / num_bytes for name, value in nats.items()}
    made = pipe.text(num_samples=num, seed=seed, progress=False).texts
    again = {"generated": ids_of(pipe, made), "held out": asked}
    strange = {
        name: math.exp(sum(map(grams["trigram"].nats, some)) / sum(len(ids) + 1 for ids in some))
        for name, some in again.items()
    }
    both = {"generated": made, "held out": unseen}
    words = {name: sum(len(text.split()) for text in some) / num for name, some in both.items()}
    copied = {name: sum(text in trained for text in some) for name, some in both.items()}
    guessed, trials = guess(pipe, grams["trigram"], known, unseen, seed)
    figures = {
        "exam": num,
        "bits a byte": bits,
        "standard error of the model's, from its draws": error / math.log(2) / num_bytes,
        "nats a word": {name: value / num_words for name, value in nats.items()},
        "nats a token": {name: value / (num_tokens + len(asked)) for name, value in nats.items()},
        "generated that differ": len(set(made)) / num,
        "stands in the training texts": {name: count / num for name, count in copied.items()},
        "words a text": words,
        "perplexity under the trigram": strange,
        "a hidden word guessed": {name: count / max(trials, 1) for name, count in guessed.items()},
        "hidden words": trials,
    }
    hits = {name: percent(count, trials) for name, count in guessed.items()}
    told = (
        f"Trained by train/recipes/texts.py on {len(known):,} texts. For {num:,} texts held out it needs at "
        f"most {bits['model']:.3f} bits a byte (a bound; ends and lengths included); an interpolated "
        f"Kneser-Ney trigram of the same tokens needs {bits['trigram']:.3f}, a unigram "
        f"{bits['unigram']:.3f}. Of {num:,} texts that it writes {len(set(made)) / num:.1%} differ and "
        f"{copied['generated'] / num:.1%} stand in the training texts (of those held out "
        f"{copied['held out'] / num:.1%} do). They have {words['generated']:.1f} words (those held out "
        f"{words['held out']:.1f}) and a perplexity of {strange['generated']:.1f} under the trigram (those "
        f"held out {strange['held out']:.1f}). Of {trials:,} words of one token, hidden in texts held out, "
        f"it guesses {hits['model']}; the trigram, which weighs both sides, {hits['trigram']}; the commonest "
        f"word is {hits['commonest']}."
    )
    return told, figures


def ids_of(pipe: Pipeline, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Documents as ids, one after the other."""
    return [piece.ids for piece in cut(texts, pipe.text_tokenizer, pipe.layout.caption)]


def guess(
    pipe: Pipeline, grams: NGrams, known: Sequence[str], texts: Sequence[str], seed: int
) -> tuple[dict[str, int], int]:
    """How many of the hidden words, one of each text, are guessed, and how many there are.

    Words of one token, letters only. The trigram says with which of all tokens the whole text is most
    probable.
    """
    rng, encode = np.random.default_rng(seed), pipe.text_tokenizer.encode
    commonest = Counter(word for text in known for word in text.split()).most_common(1)[0][0]
    holed, whole, guessed = [], [], Counter[str](model=0, trigram=0, commonest=0)
    for text in texts:
        words, ids = text.split(" "), encode(text)
        likely = [n for n, word in enumerate(words) if word.isalpha() and len(encode(word)) == 1]
        if not likely or len(ids) >= pipe.layout.caption:
            continue
        number = int(rng.choice(likely))
        place, hidden = len(encode(" ".join(words[:number]))) if number else 0, encode(words[number])
        hole = " ".join([*words[:number], HOLE, *words[number + 1 :]])
        seen: list[int | None] = [*ids[:place], None, *ids[place + 1 :]]
        if ids[place : place + 1] != hidden or pipe.codec.ids_with_holes(hole, HOLE) != seen:
            continue  # inside the text its tokens, or its neighbours', are others
        holed.append(hole)
        whole.append(text)
        guessed["trigram"] += int(grams.between(ids[:place], ids[place + 1 :]).argmin()) == hidden[0]
        guessed["commonest"] += words[number] == commonest
    if holed:
        sure = Unmask(temperature=0.0)
        filled = pipe.infill(holed, steps=1, policy=sure, progress=False).texts
        guessed["model"] = sum(text == true for text, true in zip(filled, whole, strict=True))
    return dict(guessed), len(holed)
