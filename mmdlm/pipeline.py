"""`Pipeline`: what a user holds. Words and pictures in and out; everything below speaks in ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmdlm import __version__ as VERSION
from mmdlm import jobs
from mmdlm.canvas import MODALITIES, Canvas, Layout
from mmdlm.codec import Codec
from mmdlm.jobs import TASKS, Job, Picture
from mmdlm.likelihood import score_pairs
from mmdlm.model import Predictor, Transformer, TransformerConfig
from mmdlm.output import Moment, Output, Record, Score
from mmdlm.pretrained import Parts, Settings, fingerprint, load_parts, save_parts
from mmdlm.sampling import Counted, Guided, Policy, State, Unmask, denoise, partners
from mmdlm.sampling import Path as Walk
from tokenizers_mm import ImageTokenizer, TextTokenizer

__all__ = ["Guidance", "Pipeline"]

Guidance = float | Mapping[str, float]


class Pipeline:
    """One model for pictures from prompts, captions, answers, pairs, text, infilling and inpainting.

    Every generating method takes `steps` (passes of the sampler at most), `guidance` (scale w of (1 + w)
    conditional - w unconditional logits; one number for whatever is generated, or {"text": ..., "image":
    ...}), `seed`, `policy` (the sampler itself) and `progress` (a bar on stderr); what is left out comes from
    the model's generation_config.json. A sample depends on (seed, its place in the call) alone, not on the
    batch size nor on its neighbours.

    A pipeline of text alone has no image tokenizer: it writes and fills in texts (`text`, `infill`), and
    whatever reads or makes a picture is a ValueError.
    """

    def __init__(
        self,
        *,
        transformer: Predictor,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer | None,
        layout: Layout,
        settings: Mapping[str, Settings] | None = None,
        batch_size: int = 64,
    ) -> None:
        given = {} if settings is None else settings
        unknown = sorted(set(given) - set(TASKS))
        if unknown:
            raise ValueError(f"settings for unknown tasks {unknown}; the tasks are {', '.join(TASKS)}")
        if image_tokenizer is None and layout.vocab.num_codes:
            codes = layout.vocab.num_codes
            raise ValueError(f"a layout with {codes} image codes wants an image tokenizer, got None")
        self.transformer = transformer
        self.codec = Codec(text_tokenizer, image_tokenizer, layout)
        self.settings = {task: given[task] if task in given else Settings() for task in TASKS}
        self.batch_size = batch_size
        self.training: dict[str, Any] = {}  # what its makers say of it, such as the law of its data; saved

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
        """One picture for each prompt. Raises ValueError for one longer than the model's captions."""
        return self._output(jobs.draw(self.codec, prompts), steps, guidance, seed, policy, progress)

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
        return self._output(jobs.caption(self.codec, images), steps, guidance, seed, policy, progress)

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
        return self._output(
            jobs.answer(self.codec, images, questions), steps, guidance, seed, policy, progress
        )

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
        """Pairs of caption and picture, denoised together: `num_samples` for each beginning of a caption."""
        return self._output(
            jobs.joint(self.codec, prefixes, num_samples), steps, guidance, seed, policy, progress
        )

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
        return self._output(
            jobs.write(self.codec, prefixes, num_samples), steps, None, seed, policy, progress
        )

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
        """Texts whose holes are filled, with a picture to look at or without; a `hole` is one token."""
        return self._output(
            jobs.infill(self.codec, texts, images, hole), steps, guidance, seed, policy, progress
        )

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

        The masked pixels are blanked before the picture is encoded, every code whose patch touches the mask
        is generated, and every other code stays as it is. Raises ValueError where a mask and its picture
        differ in size.
        """
        return self._output(
            jobs.inpaint(self.codec, images, masks, prompts), steps, guidance, seed, policy, progress
        )

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
        return self._stream(jobs.draw(self.codec, prompts), steps, guidance, seed, policy)

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
        return self._stream(jobs.caption(self.codec, images), steps, guidance, seed, policy)

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
        return self._stream(jobs.joint(self.codec, prefixes, num_samples), steps, guidance, seed, policy)

    def stream_answer(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        steps: int | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`answer`, a `Moment` a step."""
        return self._stream(jobs.answer(self.codec, images, questions), steps, None, seed, policy)

    def stream_text(
        self,
        prefixes: str | Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        steps: int | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`text`, a `Moment` a step."""
        return self._stream(jobs.write(self.codec, prefixes, num_samples), steps, None, seed, policy)

    def stream_infill(
        self,
        texts: str | Sequence[str],
        images: Picture | Sequence[Picture] | None = None,
        *,
        hole: str = "___",
        steps: int | None = None,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> Iterator[Moment]:
        """`infill`, a `Moment` a step."""
        return self._stream(jobs.infill(self.codec, texts, images, hole), steps, None, seed, policy)

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
        return self._stream(jobs.inpaint(self.codec, images, masks, prompts), steps, guidance, seed, policy)

    # likelihood

    def score(
        self,
        images: Picture | Sequence[Picture],
        texts: str | Sequence[str],
        *,
        draws: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> Score:
        """Lower bounds on the log-likelihood of pairs, in nats: joint, conditional, marginal, and PMI.

        `draws` noise levels for each pair and bound, stratified; the same call with the same seed sees the
        same noise.
        """
        pictures, captions = jobs.pictures(images), jobs.listed(texts)
        if len(pictures) != len(captions):
            found = f"{len(pictures)} pictures and {len(captions)} texts"
            raise ValueError(f"{found}; wanted one text for each picture")
        pairs = self.layout.pairs(self.codec.ids(captions, self.layout.caption), self.encode_images(pictures))
        return score_pairs(
            self.transformer, pairs, draws=draws, seed=seed, batch_size=self.batch_size, progress=progress
        )

    # what it is made of

    @property
    def text_tokenizer(self) -> TextTokenizer:
        return self.codec.text_tokenizer

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        """Raises ValueError for a pipeline of text alone."""
        return self.codec.images

    @property
    def layout(self) -> Layout:
        return self.codec.layout

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def encode_images(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Image codes of pictures, scaled and cropped to the model's size: (B, h, w) long."""
        return self.codec.encode(self.codec.pixels(jobs.pictures(images)))

    def decode_images(self, codes: Tensor) -> tuple[Picture, ...]:
        """Pictures of image codes (B, h, w) long."""
        return tuple(self.codec.decode(codes))

    # running them

    def _output(
        self,
        job: Job,
        steps: int | None,
        guidance: Guidance | None,
        seed: int,
        policy: Policy | None,
        progress: bool,
    ) -> Output:
        chosen = self._settings(job, steps, guidance, policy)
        texts: list[str] = []
        images: list[Picture] = []
        forwards, batch = 0, job.canvas.shape[0]
        starts = range(0, batch, self.batch_size)
        with tqdm(total=chosen.steps * len(starts), desc=job.task, disable=not progress) as bar:
            for start in starts:
                samples = torch.arange(start, min(start + self.batch_size, batch))
                counted = Counted(self.transformer)
                states = self._denoise(counted, job.canvas.select(samples), chosen, seed, samples)
                state = next(states)  # before the first step
                for after in states:
                    bar.update()
                    state = after
                bar.update(chosen.steps - int(state.step.max()))  # a policy may need fewer
                forwards += counted.forwards
                new_texts, new_images = job.read(self.codec, state.canvas)
                texts += new_texts
                images += new_images
        model = self.fingerprint
        records = tuple(self._record(job, chosen, seed, sample, model) for sample in range(batch))
        return Output(texts=tuple(texts), images=tuple(images), records=records, forwards=forwards)

    def _stream(
        self, job: Job, steps: int | None, guidance: Guidance | None, seed: int, policy: Policy | None
    ) -> Iterator[Moment]:
        chosen = self._settings(job, steps, guidance, policy)
        samples = torch.arange(job.canvas.shape[0])
        for step, state in enumerate(
            self._denoise(Counted(self.transformer), job.canvas, chosen, seed, samples)
        ):
            texts, images = job.read(self.codec, state.canvas)
            levels = {name: _share(state.canvas, modality) for name, modality in MODALITIES.items()}
            yield Moment(
                step=step, steps=chosen.steps, levels=levels, texts=tuple(texts), images=tuple(images)
            )

    def _settings(
        self, job: Job, steps: int | None, guidance: Guidance | None, policy: Policy | None
    ) -> Settings:
        """The task's own settings where the caller gave none. Raises ValueError for what cannot be made."""
        if job.image is not None and self.codec.image_tokenizer is None:
            raise ValueError(f"{job.task} makes pictures, and this model is one of text alone")
        own = self.settings[job.task]
        if guidance is None:
            scales = own.guidance
        elif isinstance(guidance, Mapping):
            scales = dict(guidance)
        else:
            scales = dict.fromkeys(MODALITIES, float(guidance))
        policy = own.policy if policy is None else policy
        if steps is not None and isinstance(policy, Unmask) and policy.plan == Walk() and not policy.revision:
            layout = self.layout
            most = layout.caption + layout.question + layout.answer + math.prod(layout.grid)
            if steps > most:
                raise ValueError(f"steps={steps}: a step fills one position at least, and a row has {most}")
        number = own.steps if steps is None else steps
        return Settings(steps=number, guidance=scales, policy=policy)

    def _denoise(
        self, counted: Counted, canvas: Canvas, chosen: Settings, seed: int, samples: Tensor
    ) -> Iterator[State]:
        mask = self.layout.vocab.mask
        scales = {name: chosen.guidance.get(name, 0.0) for name in MODALITIES}
        guided = Guided(counted, partners(**scales), mask=mask)
        return denoise(
            guided,
            canvas.to(self.device),
            policy=chosen.policy,
            steps=chosen.steps,
            seeds=seed,
            samples=samples,
            mask=mask,
        )

    def _record(self, job: Job, chosen: Settings, seed: int, sample: int, model: str) -> Record:
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

    # making, loading, saving

    @classmethod
    def untrained(
        cls, codec: Codec, *, dim: int = 192, depth: int = 6, settings: Mapping[str, Settings] | None = None
    ) -> Pipeline:
        """A pipeline around a new transformer of `depth` layers and width `dim`, a multiple of 32 (a head).

        The first weights are drawn from torch's global generator.
        """
        vocab, image = codec.layout.vocab, codec.image_tokenizer
        if dim < 32 or dim % 32 or depth < 1:
            raise ValueError(f"dim must be a multiple of 32 and depth at least 1, got {dim} and {depth}")
        config = TransformerConfig(
            vocab_size=vocab.size,
            text=(vocab.text.start, vocab.text.stop),
            image=(vocab.image.start, vocab.image.stop),
            mask=vocab.mask,
            dim=dim,
            depth=depth,
            num_heads=dim // 32,
            digits=None if image is None else image.digits,
            grid=None if image is None else codec.layout.grid,
        )
        return cls(
            transformer=Predictor(Transformer(config)),
            text_tokenizer=codec.text_tokenizer,
            image_tokenizer=image,
            layout=codec.layout,
            settings=settings,
        )

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the weights of transformer and image tokenizer."""
        image = self.codec.image_tokenizer
        return fingerprint(self.transformer, *([image] if isinstance(image, nn.Module) else []))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str | torch.device = "cpu") -> Pipeline:
        """A built-in name ("scenes"), a local folder, or a hub repository id "owner/name".

        Only the last asks the network. Raises ValueError when there is no such model, or its files do not
        fit together.
        """
        parts = load_parts(name_or_path)
        pipe = cls(
            transformer=parts.transformer.to(device).eval(),
            text_tokenizer=parts.text_tokenizer,
            image_tokenizer=parts.image_tokenizer,
            layout=parts.layout,
            settings=parts.settings,
        )
        pipe.training = dict(parts.training)
        return pipe

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Write the model folder, whole or not at all; `card` becomes its README.md.

        It holds model_index.json, transformer/, text_tokenizer/, image_tokenizer/ (where it has one),
        generation_config.json and manifest.json. Raises ValueError where a tokenizer is not one of ours.
        """
        parts = Parts(
            transformer=self.transformer,
            text_tokenizer=self.text_tokenizer,
            image_tokenizer=self.codec.image_tokenizer,
            layout=self.layout,
            settings=self.settings,
            training=self.training,
        )
        save_parts(folder, parts, card=card)


def _share(canvas: Canvas, modality: int) -> float:
    """The share of a modality's span positions that are holes; 0 where it has none."""
    assert canvas.span is not None
    where = (canvas.modality == modality) & (canvas.span >= 0)
    return float((canvas.masked & where).sum() / where.sum().clamp_min(1))
