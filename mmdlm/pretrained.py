"""A pipeline's parts and the model folder: which class stands behind a name, what is written and read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mmdlm import __version__, sampling
from mmdlm.canvas import MODALITIES, Layout
from mmdlm.codec import TextLayout
from mmdlm.diffusion import Cosine, Linear, LogLinear, Polynomial
from mmdlm.io import (
    Component,
    Label,
    ModelFolder,
    StoredComponent,
    from_json,
    read_folder,
    resolve,
    to_json,
    write_folder,
)
from mmdlm.model import Predictor, Transformer, TransformerConfig, lora_layers
from mmdlm.sampling import Policy, Unmask
from tokenizers_mm import (
    Autoencoder,
    AutoencoderConfig,
    BytePairTokenizer,
    ImageTokenizer,
    TextTokenizer,
    Vocab,
)

T = TypeVar("T")

__all__ = ["BUILT_IN", "Parts", "Settings", "fingerprint", "load_parts", "save_parts"]

BUILT_IN = {"scenes": Path(__file__).parent / "models" / "scenes"}

# Class names in saved JSON resolve here and nowhere else.
_SETTINGS = (
    sampling.Ancestral,
    sampling.Blocks,
    sampling.Bounded,
    sampling.ByModality,
    sampling.Capped,
    sampling.Constant,
    sampling.Doubtful,
    sampling.Drawn,
    sampling.During,
    sampling.Edited,
    sampling.Ended,
    sampling.EntropyBelow,
    sampling.Even,
    sampling.Factor,
    sampling.Fixed,
    sampling.ForwardBackward,
    sampling.Halton,
    sampling.LeftToRight,
    sampling.Loop,
    sampling.Margin,
    sampling.NegativeEntropy,
    sampling.Path,
    sampling.Peak,
    sampling.Planned,
    sampling.Proportional,
    sampling.Ramp,
    sampling.Random,
    sampling.Rescaled,
    sampling.Scheduled,
    sampling.Settled,
    sampling.Stable,
    sampling.Threshold,
    sampling.Unmask,
    Cosine,
    Linear,
    LogLinear,
    Polynomial,
)
_CLASSES: dict[str, type] = {
    known.__name__: known for known in (*_SETTINGS, TransformerConfig, AutoencoderConfig)
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is sampled unless the caller says otherwise; saved in generation_config.json."""

    steps: int = 16
    guidance: Mapping[str, float] = field(default_factory=dict)  # modality -> scale w of (1 + w) c - w u
    policy: Policy = field(default_factory=Unmask)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        unknown = sorted(set(self.guidance) - set(MODALITIES))
        if unknown:
            raise ValueError(
                f"guidance for {unknown}; it is a number, or a mapping from text and image to numbers"
            )
        if not all(math.isfinite(scale) for scale in self.guidance.values()):
            raise ValueError(f"guidance must be finite, got {dict(self.guidance)}")


_CLASSES["Settings"] = Settings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a pipeline is made of."""

    transformer: Predictor
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer | None  # None: a model of text alone
    layout: Layout
    settings: Mapping[str, Settings]
    training: Mapping[str, Any] = field(default_factory=dict)  # what its makers say of it, plain JSON values


def save_parts(folder: Path | str, parts: Parts, *, card: str = "") -> None:
    """Write a model folder, whole or not at all.

    Raises ValueError for tokenizers of others' classes, and for low-rank updates that are not merged.
    """
    text, image = parts.text_tokenizer, parts.image_tokenizer
    if not isinstance(text, BytePairTokenizer) or not isinstance(image, Autoencoder | None):
        wanted = f"{BytePairTokenizer.__name__} and {Autoencoder.__name__}"
        raise ValueError(
            f"tokenizers {type(text).__name__} and {type(image).__name__} cannot be saved; wanted {wanted}"
        )
    network, layout = parts.transformer.network, parts.layout
    if lora_layers(network):
        raise ValueError("the transformer has low-rank updates: merge_lora it first, or save_lora them alone")
    config = {
        "network": to_json(network.config, _CLASSES),
        "vocab": layout.vocab.to_json(),
        "layout": {name: getattr(layout, name) for name in ("caption", "question", "answer")}
        | {"grid": list(layout.grid)},
    } | ({"training": dict(parts.training)} if parts.training else {})
    components = {
        "transformer": Component(class_name="Predictor", config=config, tensors=network.state_dict()),
        "text_tokenizer": Component(class_name="BytePairTokenizer", write=text.save),
    }
    if image is not None:
        components["image_tokenizer"] = Component(
            class_name="Autoencoder", config=to_json(image.config, _CLASSES), tensors=image.state_dict()
        )
    generation = {task: to_json(settings, _CLASSES) for task, settings in parts.settings.items()}
    label = Label(kind="Pipeline", version=__version__, card=card)
    write_folder(folder, components, label=label, generation=generation)


def load_parts(name_or_path: Path | str) -> Parts:
    """Read a model folder; weights arrive on the CPU in float32. Raises ValueError naming what is wrong."""
    folder = read_folder(resolve(name_or_path, BUILT_IN))
    stored = _component(folder, "transformer", "Predictor")
    missing = sorted({"network", "vocab", "layout"} - set(stored.config))
    if missing:
        raise ValueError(f"{stored.path}/config.json lacks {', '.join(missing)}")
    place = f"{stored.path}/config.json"
    network = Transformer(_read(stored.config["network"], TransformerConfig, place))
    _fill(network, stored.tensors(), stored.path)
    layout = _layout(stored.config, place)
    training = stored.config.get("training", {})
    if not isinstance(training, dict):
        raise ValueError(f"{place}: training is {training!r}, wanted an object")
    vocab = layout.vocab
    image = _image_tokenizer(folder) if vocab.num_codes or "image_tokenizer" in folder.components else None
    text = BytePairTokenizer.load(_component(folder, "text_tokenizer", "BytePairTokenizer").path)
    place = f"{folder.path}/generation_config.json"
    settings = {task: _read(value, Settings, f"{place}: {task}") for task, value in folder.generation.items()}
    num_codes = 0 if image is None else image.size
    if (text.size, num_codes) != (vocab.num_text, vocab.num_codes):
        raise ValueError(
            f"{folder.path}: tokenizers of {text.size} text ids and {num_codes} codes do not fit the "
            f"{vocab.num_text} and {vocab.num_codes} of its vocabulary"
        )
    predictor = Predictor(network, vocab.text, vocab.image, vocab.mask)
    return Parts(
        transformer=predictor,
        text_tokenizer=text,
        image_tokenizer=image,
        layout=layout,
        settings=settings,
        training=training,
    )


def fingerprint(*modules: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over names, shapes and bytes of the modules' weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _component(folder: ModelFolder, name: str, known: str) -> StoredComponent:
    stored = folder.component(name)
    if stored.class_name != known:
        found = stored.class_name
        raise ValueError(f"{folder.path}: component {name} is a {found!r}; this version reads {known!r}")
    return stored


def _image_tokenizer(folder: ModelFolder) -> Autoencoder:
    stored = _component(folder, "image_tokenizer", "Autoencoder")
    image = Autoencoder(_read(stored.config, AutoencoderConfig, f"{stored.path}/config.json"))
    _fill(image, stored.tensors(), stored.path)
    return image.eval()


def _read(value: Any, known: type[T], place: str) -> T:
    made = from_json(value, _CLASSES, place=place)
    if not isinstance(made, known):
        raise ValueError(f"{place}: wanted a {known.__name__}, got a {type(made).__name__}")
    return made


def _layout(config: Mapping[str, Any], place: str) -> Layout:
    try:
        height, width = map(int, config["layout"]["grid"])
        room = {name: int(config["layout"][name]) for name in ("caption", "question", "answer")}
        vocab = Vocab.from_json(config["vocab"])
        kind = Layout if vocab.num_codes else TextLayout
        return kind(vocab=vocab, grid=(height, width), **room)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: its vocab and layout cannot be read ({error!r})") from error


def _fill(module: nn.Module, tensors: Mapping, place: Path) -> None:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"the weights in {place} do not fit its config.json: {error}") from error
