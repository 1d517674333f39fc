"""`Pipeline`: what a user holds. Words and pictures in, words and pictures out; everything below speaks in ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdlm import __version__ as VERSION
from mmdlm.canvas import IMAGE, MODALITIES, TEXT, Canvas, Frame, Layout
from mmdlm.data import fit, to_rgb
from mmdlm.diffusion import Absorbing, conditional, marginal, nelbo
from mmdlm.model import Predictor
from mmdlm.output import Moment, Output, Record, Score
from mmdlm.pretrained import Parts, Settings, fingerprint, load_parts, save_parts
from mmdlm.sampling import Counted, Guided, Policy, State, denoise
from tokenizers_mm import ImageTokenizer, TextTokenizer

TASKS = ("text_to_image", "caption", "answer", "joint", "text", "infill", "inpaint")
Guidance = float | Mapping[str, float]
Picture = Image.Image


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A generation ready to run: the canvas with its holes, and where the results stand."""

    task: str
    canvas: Canvas
    frame: Frame
    prompts: Sequence[str]
    text: int | None = None  # the span whose text is the result
    image: int | None = None  # the span whose image is the result


class Pipeline:
    """One model for pictures from prompts, captions, answers, pairs, text, infilling and inpainting.

    Every generating method takes `steps` (passes of the sampler), `guidance` (scale w of (1 + w) conditional - w
    unconditional logits; one number for whatever is generated, or {"text": ..., "image": ...}), `seed`, `policy` (the
    sampler itself) and `progress` (a bar on stderr); what is left out comes from the model's generation_config.json.
    A sample depends on (seed, its place in the call) alone, not on the batch size nor on its neighbours.
    """

    def __init__(
        self,
        *,
        transformer: Predictor,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        layout: Layout,
        settings: Mapping[str, Settings] | None = None,
        batch_size: int = 64,
    ) -> None:
        given = {} if settings is None else settings
        unknown = sorted(set(given) - set(TASKS))
        if unknown:
            raise ValueError(f"settings for unknown tasks {unknown}; the tasks are {', '.join(TASKS)}")
        self.transformer = transformer
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.layout = layout
        self.settings = {task: given[task] if task in given else Settings() for task in TASKS}
        self.batch_size = batch_size

    # generation

    def text_to_image(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """One picture for each prompt. Raises ValueError for a prompt longer than the model's captions."""
        return self._output(self._text_to_image(prompts), steps, guidance, seed, policy, progress)

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """One caption for each picture; pictures of another size are scaled and cropped to the model's."""
        return self._output(self._caption(images), steps, guidance, seed, policy, progress)

    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """One answer for each picture and its question; a single question is asked of every picture."""
        pictures, asked = _pictures(images), _texts(questions)
        if len(asked) == 1:
            asked = asked * len(pictures)
        canvas = self.layout.answering(self.encode_images(pictures), self._ids(asked))
        job = _Job(task="answer", canvas=canvas, frame=self.layout.question_frame, prompts=asked, text=2)
        return self._output(job, steps, guidance, seed, policy, progress)

    def joint(
        self,
        prefixes: str | Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """Pairs of caption and picture, denoised together. A prefix gives the beginning of a caption; each prefix is used
        `num_samples` times."""
        return self._output(self._joint(prefixes, num_samples), steps, guidance, seed, policy, progress)

    def text(
        self,
        prefixes: str | Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        steps: int | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """Texts without a picture; a prefix gives the beginning."""
        prompts = _repeated(prefixes, num_samples)
        canvas = self.layout.writing(self._ids(prompts))
        job = _Job(task="text", canvas=canvas, frame=self.layout.text_frame, prompts=prompts, text=0)
        return self._output(job, steps, None, seed, policy, progress)

    def infill(
        self,
        texts: str | Sequence[str],
        images: Picture | Sequence[Picture] | None = None,
        *,
        hole: str = "___",
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """Texts whose holes are filled, with a picture to look at or without. Each `hole` in a text stands for one token."""
        listed = _texts(texts)
        codes = None if images is None else self.encode_images(_pictures(images))
        canvas = self.layout.infilling([self._with_holes(text, hole) for text in listed], codes)
        frame = self.layout.text_frame if codes is None else self.layout.pair_frame
        job = _Job(task="infill", canvas=canvas, frame=frame, prompts=listed, text=0)
        return self._output(job, steps, guidance, seed, policy, progress)

    def inpaint(
        self,
        images: Picture | Sequence[Picture],
        masks: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        progress: bool = True,
    ) -> Output:
        """Pictures whose masked part (mask pixel not 0) is drawn anew from the prompt.

        The masked pixels are blanked before the picture is encoded, every code whose patch touches the mask is
        generated, and every other code stays as it is. Raises ValueError where a mask and its picture differ in size.
        """
        return self._output(self._inpaint(images, masks, prompts), steps, guidance, seed, policy, progress)

    # generation, watched: to cancel, stop iterating

    def stream_text_to_image(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`text_to_image`, a `Moment` a step; the first shows the holes, the last the result."""
        return self._stream(self._text_to_image(prompts), steps, guidance, seed, policy)

    def stream_caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`caption`, a `Moment` a step."""
        return self._stream(self._caption(images), steps, guidance, seed, policy)

    def stream_joint(
        self,
        prefixes: str | Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`joint`, a `Moment` a step."""
        return self._stream(self._joint(prefixes, num_samples), steps, guidance, seed, policy)

    def stream_inpaint(
        self,
        images: Picture | Sequence[Picture],
        masks: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`inpaint`, a `Moment` a step."""
        return self._stream(self._inpaint(images, masks, prompts), steps, guidance, seed, policy)

    # likelihood

    def score(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        *,
        draws: int = 32,
        seed: int = 0,
    ) -> Score:
        """Lower bounds on the log-likelihood of pairs, in nats: joint, each side given the other, each side alone, PMI.

        `draws` noise levels a pair and bound, stratified; the same seed gives the same noise.
        """
        pictures, captions = _pictures(images), _texts(texts)
        if len(pictures) != len(captions):
            raise ValueError(
                f"{len(pictures)} pictures and {len(captions)} texts; wanted one text for each picture"
            )
        whole = self.layout.pairs(self._ids(captions), self.encode_images(pictures))
        process = Absorbing(self.layout.vocab.mask)
        views = {
            "joint": whole,
            "text_given_image": conditional(whole, TEXT),
            "image_given_text": conditional(whole, IMAGE),
            "text": marginal(whole, TEXT, process),
            "image": marginal(whole, IMAGE, process),
        }
        values, errors = {}, {}
        for name, view in views.items():
            rng = torch.Generator().manual_seed(seed)
            bound = nelbo(self.transformer, view.to(self.device), process, num_draws=draws, rng=rng)
            values[name] = tuple((-bound.nats).tolist())
            errors[name] = tuple(bound.error.tolist())
        sides = zip(values["joint"], values["text"], values["image"], strict=True)
        return Score(**values, pmi=tuple(joint - text - image for joint, text, image in sides), error=errors)

    # words and pictures as ids, and back

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures this model reads and draws."""
        return self.layout.grid[0] * self.image_tokenizer.downsample

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """Pictures scaled and cropped to the model's size, (B, 3, H, W) float32 in [-1, 1]."""
        stacked = np.stack([np.asarray(fit(to_rgb(image), self.image_size)) for image in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def _covered(self, masks: Sequence[Picture]) -> Tensor:
        """Which pixels of the model's size any masked pixel reaches, (B, H, W) bool."""
        whole = [Image.fromarray(np.asarray(mask.convert("L")) > 0).convert("RGB") for mask in masks]
        scaled = [fit(mask, self.image_size, resample=Image.Resampling.BOX) for mask in whole]
        return torch.from_numpy(np.stack([np.asarray(mask)[..., 0] > 0 for mask in scaled]))

    def encode_images(self, images: Sequence[Picture]) -> Tensor:
        """Image codes, (B, h, w) long."""
        return self._encode(self.pixels(images))

    def decode_images(self, codes: Tensor) -> tuple[Picture, ...]:
        """Pictures of image codes (B, h, w) long."""
        images = torch.cat([self.image_tokenizer.decode(part) for part in codes.split(self.batch_size)])
        pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return tuple(Image.fromarray(image) for image in pixels.cpu().numpy())

    def _encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.image_tokenizer.encode(part) for part in pixels.split(self.batch_size)])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.text_tokenizer.encode(text) for text in texts]

    def _with_holes(self, text: str, hole: str) -> list[int | None]:
        """Ids of the pieces between the holes. A token brings its own leading space, so that of a hole is dropped."""
        pieces = text.split(hole)
        ids: list[int | None] = []
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            ids += self.text_tokenizer.encode(piece if last else piece.rstrip(" "))
            ids += [] if last else [None]
        return ids

    # jobs

    def _text_to_image(self, prompts: str | Sequence[str]) -> _Job:
        listed = _texts(prompts)
        canvas = self.layout.text_to_image(self._ids(listed))
        return _Job(
            task="text_to_image", canvas=canvas, frame=self.layout.pair_frame, prompts=listed, image=1
        )

    def _caption(self, images: Picture | Sequence[Picture]) -> _Job:
        listed = _pictures(images)
        canvas = self.layout.captioning(self.encode_images(listed))
        prompts = [""] * len(listed)
        return _Job(task="caption", canvas=canvas, frame=self.layout.pair_frame, prompts=prompts, text=0)

    def _joint(self, prefixes: str | Sequence[str] | None, num_samples: int) -> _Job:
        prompts = _repeated(prefixes, num_samples)
        canvas = self.layout.joint(self._ids(prompts))
        return _Job(
            task="joint", canvas=canvas, frame=self.layout.pair_frame, prompts=prompts, text=0, image=1
        )

    def _inpaint(
        self,
        images: Picture | Sequence[Picture],
        masks: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
    ) -> _Job:
        pictures, covers, listed = _pictures(images), _pictures(masks), _texts(prompts)
        if not len(pictures) == len(covers) == len(listed):
            raise ValueError(
                f"{len(pictures)} pictures, {len(covers)} masks and {len(listed)} prompts; wanted one of each"
            )
        for number, (picture, cover) in enumerate(zip(pictures, covers, strict=True)):
            if picture.size != cover.size:
                raise ValueError(
                    f"mask {number} is {cover.size} pixels, its picture {picture.size}; wanted the same"
                )
        covered = self._covered(covers)
        pixels = self.pixels(pictures).masked_fill(covered[:, None], 0.0)
        height, width = self.layout.grid
        holes = covered.unflatten(1, (height, -1)).unflatten(3, (width, -1)).any(4).any(2)
        canvas = self.layout.inpainting(self._encode(pixels), holes, self._ids(listed))
        return _Job(task="inpaint", canvas=canvas, frame=self.layout.pair_frame, prompts=listed, image=1)

    # running them

    def _output(
        self,
        job: _Job,
        steps: int | None,
        guidance: Guidance | None,
        seed: int,
        policy: Policy | None,
        progress: bool,
    ) -> Output:
        chosen = self._settings(job.task, steps, guidance, policy)
        texts: list[str] = []
        images: list[Picture] = []
        forwards, batch = 0, job.canvas.shape[0]
        starts = range(0, batch, self.batch_size)
        with tqdm(total=chosen.steps * len(starts), desc=job.task, disable=not progress) as bar:
            for start in starts:
                samples = torch.arange(start, min(start + self.batch_size, batch))
                counted = Counted(self.transformer)
                state = None
                for state in self._denoise(counted, job.canvas.select(samples), chosen, seed, samples):
                    bar.update(int(state.step.max()) > 0)
                assert state is not None
                forwards += counted.forwards
                new_texts, new_images = self._read(job, state.canvas)
                texts += new_texts
                images += new_images
        model = self.fingerprint
        records = tuple(self._record(job, chosen, seed, sample, model) for sample in range(batch))
        return Output(texts=tuple(texts), images=tuple(images), records=records, forwards=forwards)

    def _stream(
        self, job: _Job, steps: int | None, guidance: Guidance | None, seed: int, policy: Policy | None
    ) -> Iterator[Moment]:
        chosen = self._settings(job.task, steps, guidance, policy)
        samples = torch.arange(job.canvas.shape[0])
        for step, state in enumerate(
            self._denoise(Counted(self.transformer), job.canvas, chosen, seed, samples)
        ):
            texts, images = self._read(job, state.canvas)
            levels = {name: _share(state.canvas, modality) for name, modality in MODALITIES.items()}
            yield Moment(
                step=step, steps=chosen.steps, levels=levels, texts=tuple(texts), images=tuple(images)
            )

    def _settings(
        self, task: str, steps: int | None, guidance: Guidance | None, policy: Policy | None
    ) -> Settings:
        """The task's own settings where the caller gave none."""
        own = self.settings[task]
        if guidance is None:
            scales = own.guidance
        elif isinstance(guidance, Mapping):
            unknown = sorted(set(guidance) - set(MODALITIES))
            if unknown:
                raise ValueError(
                    f"guidance for {unknown}; it is a number, or a mapping from text and image to numbers"
                )
            scales = dict(guidance)
        else:
            scales = dict.fromkeys(MODALITIES, float(guidance))
        return Settings(
            steps=own.steps if steps is None else steps,
            guidance=scales,
            policy=own.policy if policy is None else policy,
        )

    def _denoise(
        self, counted: Counted, canvas: Canvas, chosen: Settings, seed: int, samples: Tensor
    ) -> Iterator[State]:
        mask = self.layout.vocab.mask
        scales = {name: chosen.guidance.get(name, 0.0) for name in MODALITIES}
        guided = Guided(counted, **scales, mask=mask)
        return denoise(
            guided,
            canvas.to(self.device),
            policy=chosen.policy,
            steps=chosen.steps,
            seeds=seed,
            samples=samples,
            mask=mask,
        )

    def _read(self, job: _Job, canvas: Canvas) -> tuple[list[str], list[Picture]]:
        """What stands in the result spans; while it is still being made, holes are `_` and grey tiles."""
        canvas = canvas.to("cpu")
        texts: list[str] = []
        images: list[Picture] = []
        if job.text is not None:
            texts = [
                self._read_text(ids, holes) for ids, holes in self._text_rows(job.frame, canvas, job.text)
            ]
        if job.image is not None:
            holes = canvas.masked[:, job.frame.places[job.image]].unflatten(1, self.layout.grid)
            codes = self.layout.read_codes(job.frame, canvas, job.image).masked_fill(holes, 0)
            images = list(self.decode_images(codes))
            if bool(holes.any()):
                images = [_greyed(image, hole.numpy()) for image, hole in zip(images, holes, strict=True)]
        return texts, images

    def _text_rows(self, frame: Frame, canvas: Canvas, span: int) -> Iterator[tuple[list[int], list[bool]]]:
        place = frame.places[span]
        yield from zip(canvas.tokens[:, place].tolist(), canvas.masked[:, place].tolist(), strict=True)

    def _read_text(self, ids: list[int], holes: list[bool]) -> str:
        """The text up to its first `end`; each hole before it is ` _`."""
        end = self.layout.vocab.specials["end"]
        length = next(
            (i for i, (id, hole) in enumerate(zip(ids, holes, strict=True)) if id == end and not hole),
            len(ids),
        )
        text, known = "", []
        for i in range(length):
            if holes[i]:
                text, known = text + self.text_tokenizer.decode(known) + " _", []
            else:
                known.append(ids[i])
        return text + self.text_tokenizer.decode(known)

    def _record(self, job: _Job, chosen: Settings, seed: int, sample: int, model: str) -> Record:
        return Record(
            task=job.task,
            prompt=job.prompts[sample],
            seed=seed,
            sample=sample,
            steps=chosen.steps,
            guidance=dict(chosen.guidance),
            policy=repr(chosen.policy),
            model=model,
            software=f"mmdlm {VERSION}",
        )

    # the model folder

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the transformer's weights."""
        return fingerprint(self.transformer)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str | torch.device = "cpu") -> Pipeline:
        """A built-in name ("scenes"), a local folder, or a hub repository id "owner/name" (the one case that asks the network).

        Raises ValueError when there is no such model, or its files do not fit together.
        """
        parts = load_parts(name_or_path)
        return cls(
            transformer=parts.transformer.to(device).eval(),
            text_tokenizer=parts.text_tokenizer,
            image_tokenizer=parts.image_tokenizer,
            layout=parts.layout,
            settings=parts.settings,
        )

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Write the model folder (model_index.json, transformer/, text_tokenizer/, image_tokenizer/, generation_config.json),
        whole or not at all; `card` becomes its README.md. Raises ValueError where a tokenizer is not one of ours."""
        parts = Parts(
            transformer=self.transformer,
            text_tokenizer=self.text_tokenizer,
            image_tokenizer=self.image_tokenizer,
            layout=self.layout,
            settings=self.settings,
        )
        save_parts(folder, parts, card=card)


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _pictures(value: Picture | Sequence[Picture]) -> list[Picture]:
    return [value] if isinstance(value, Picture) else list(value)


def _repeated(prefixes: str | Sequence[str] | None, num_samples: int) -> list[str]:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    return [prefix for prefix in _texts("" if prefixes is None else prefixes) for _ in range(num_samples)]


def _share(canvas: Canvas, modality: int) -> float:
    """The share of a modality's span positions that are holes; 0 where it has none."""
    assert canvas.span is not None
    where = (canvas.modality == modality) & (canvas.span >= 0)
    return float((canvas.masked & where).sum() / where.sum().clamp_min(1))


def _greyed(image: Picture, holes: np.ndarray) -> Picture:
    """The picture with the patches of `holes` (h, w) bool in one grey."""
    pixels = np.array(image)
    factor = pixels.shape[0] // holes.shape[0]
    pixels[holes.repeat(factor, 0).repeat(factor, 1)] = 128
    return Image.fromarray(pixels)
