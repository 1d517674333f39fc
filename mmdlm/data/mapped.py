"""Any data set with a length and items as a source: torchvision's, Hugging Face's; imports neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from mmdlm.data.images import ImageError, OnError, Stop, decode, to_array, to_rgb
from mmdlm.data.indexed import Indexed, Order, Shuffled
from mmdlm.data.rows import Columns, describe
from mmdlm.data.sample import Sample, SampleError

T_co = TypeVar("T_co", covariant=True)


class Dataset(Protocol[T_co]):
    """Items by index, as `torch.utils.data.Dataset` of known length and `datasets.Dataset` have them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> T_co: ...


class Mapped(Indexed[Sample]):
    """The source of the items of `dataset`, each made a sample by `sample(item, name)`.

    `FromPairs` and `FromRows` are such functions for the two usual shapes. The name is the data set's class
    and the index, as in "FashionMNIST[17]". An error that the data set raises for an item is a SampleError
    of that name; it goes to `on_error` in iteration. Raises ValueError for a data set without items.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sample: Callable[[Any, str], Sample],
        *,
        order: Order = Shuffled(),
        on_error: OnError = Stop(),
    ) -> None:
        super().__init__(order, on_error)
        if len(dataset) < 1:
            raise ValueError(f"{type(dataset).__name__}: a source wants at least one item, it has none")
        self._dataset = dataset
        self._sample = sample

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Item `index` as a sample. Raises SampleError when it cannot be had."""
        at = self._at(index)
        name = f"{type(self._dataset).__name__}[{at}]"
        try:
            item = self._dataset[at]
        except Exception as error:  # what foreign code raises for a broken file is anything
            raise SampleError(name, f"cannot be had ({type(error).__name__}: {error})") from error
        return self._sample(item, name)


@dataclass(frozen=True)
class FromPairs:
    """Items (picture, number of a class), as torchvision has them; the texts are `templates` with the name.

    `names[number]` is the name of a class, and "{}" its place in a template. `image` and `label` are where an
    item holds its two parts: places, or names of columns. `load` makes an RGB picture of the one that stands
    there. `Sample.extra` holds the number as "label". Raises ValueError for a template without "{}".
    """

    names: Sequence[str]
    templates: tuple[str, ...] = ("{}",)
    image: int | str = 0
    label: int | str = 1
    load: Callable[[Image.Image], Image.Image] = to_rgb

    def __post_init__(self) -> None:
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ValueError(f'wanted templates with "{{}}" for the name of the class, got {self.templates}')

    def __call__(self, item: Any, name: str) -> Sample:
        """The sample of an item. Raises SampleError for a number without a name or a bad picture."""
        picture, label = _part(item, self.image, name), _part(item, self.label, name)
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(self.names):
            raise SampleError(name, f"wanted a class of 0 .. {len(self.names) - 1}, got {label!r}")
        texts = tuple(template.replace("{}", self.names[int(label)]) for template in self.templates)
        return Sample(name, _picture(picture, self.load, name), texts, extra={"label": int(label)})


@dataclass(frozen=True)
class FromRows:
    """Items that are mappings of columns, as Hugging Face's `datasets` has them.

    The picture is under `columns.image` (default: "image"): a PIL image, an array, or the bytes of a file,
    alone or as {"bytes", "path"} (`cast_column("image", Image(decode=False))` gives these, and `decode` takes
    more care than what opens them otherwise); None, and no "image" column at all, is text alone. `load` makes
    an RGB picture of the one that stands there. The pictures of a document (`columns.pieces`) are held alike.
    """

    columns: Columns = Columns()
    load: Callable[[Image.Image], Image.Image] = to_rgb

    def __call__(self, item: Any, name: str) -> Sample:
        """The sample of an item. Raises SampleError for a row that is not as said or a bad picture."""
        if not isinstance(item, Mapping):
            raise SampleError(name, f"wanted a mapping of columns, got a {type(item).__name__}")
        row = dict(item)
        if self.columns.pieces is not None:
            said = describe(row, self.columns, name)
            return said.document(name, lambda value, which: _picture(value, self.load, name, f"{which}: "))
        wanted = self.columns.image
        if wanted is not None and wanted not in row:
            raise SampleError(name, f"no column {wanted!r}; there are {', '.join(row) or 'none'}")
        picture = row.pop(wanted or "image", None)
        said = describe(row, self.columns, name)
        image = None if picture is None else _picture(picture, self.load, name)
        return Sample(name, image, said.texts, said.question, said.answer, said.extra)


def _part(item: Any, key: int | str, name: str) -> Any:
    try:
        return item[key]
    except (KeyError, IndexError, TypeError):
        raise SampleError(name, f"has nothing under {key!r}: a {type(item).__name__}") from None


def _picture(
    value: Any, load: Callable[[Image.Image], Image.Image], name: str, which: str = ""
) -> np.ndarray:
    """(H, W, 3) uint8 of whatever a data set has for a picture; `which` is for messages."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    try:
        if isinstance(value, bytes):
            value = decode(value)
        elif isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
            value = Image.fromarray(value)
        if not isinstance(value, Image.Image):
            what = f"{type(value).__name__}; does the data set transform its pictures?"
            raise ImageError(
                name, f"wanted a PIL image, an array of uint8 or the bytes of a file, got {what}"
            )
        return to_array(load(value))
    except ImageError as error:
        raise ImageError(name, which + error.reason) from error
    # a picture that the data set opened is decoded only now; broken files raise anything
    except Exception as error:
        raise ImageError(name, f"{which}cannot be decoded ({type(error).__name__}: {error})") from error
