"""Samples and where they come from: pictures, texts, sources, loader, and the built-in scenes."""

from mmdlm.data.encoded import Encoded, EncodedFolder, write_encoded
from mmdlm.data.images import CentreCrop, ImageError, Letterbox, Skip, Stop, decode, fit, to_array, to_rgb
from mmdlm.data.indexed import Endless, Indexed, InOrder, Listed, Order, Shuffled
from mmdlm.data.loader import Batches
from mmdlm.data.sample import Sample
from mmdlm.data.scene import Description, Look, Object, Relation, Scene, agree
from mmdlm.data.scene_entropy import caption_entropy, caption_law
from mmdlm.data.scene_language import captions, num_captions, read_caption
from mmdlm.data.scene_reader import read_image, read_images
from mmdlm.data.scenes import Scenes, Split, around, hole, split_of
from mmdlm.data.sources import Chunks, Columns, ImageFolder, Lines, Paragraphs, Source, TextFiles

__all__ = [
    "Batches",
    "CentreCrop",
    "Chunks",
    "Columns",
    "Description",
    "Encoded",
    "EncodedFolder",
    "Endless",
    "ImageError",
    "ImageFolder",
    "InOrder",
    "Indexed",
    "Letterbox",
    "Lines",
    "Listed",
    "Look",
    "Object",
    "Order",
    "Paragraphs",
    "Relation",
    "Sample",
    "Scene",
    "Scenes",
    "Shuffled",
    "Skip",
    "Source",
    "Split",
    "Stop",
    "TextFiles",
    "agree",
    "around",
    "caption_entropy",
    "caption_law",
    "captions",
    "decode",
    "fit",
    "hole",
    "num_captions",
    "read_caption",
    "read_image",
    "read_images",
    "split_of",
    "to_array",
    "to_rgb",
    "write_encoded",
]
