"""Samples and where they come from: pictures, texts, sources, loader, and the built-in scenes."""

from mmdlm.data.census import Census
from mmdlm.data.encode import ShardPlan, encode_shards
from mmdlm.data.encoded import Encode, Encoded, OnlineEncoded
from mmdlm.data.found import data_digest, open_source
from mmdlm.data.images import (
    CentreCrop,
    ImageError,
    Letterbox,
    OnError,
    Skip,
    Stop,
    decode,
    fit,
    to_array,
    to_rgb,
)
from mmdlm.data.indexed import Endless, Grouped, Indexed, InOrder, Listed, Order, Shuffled
from mmdlm.data.jsonlines import JsonLines
from mmdlm.data.loader import Batches
from mmdlm.data.mapped import Dataset, FromPairs, FromRows, Mapped
from mmdlm.data.mixture import Mixture
from mmdlm.data.parquet import Parquet
from mmdlm.data.rows import Columns
from mmdlm.data.sample import Sample, SampleError
from mmdlm.data.scene import Description, Look, Object, Relation, Scene, agree
from mmdlm.data.scene_entropy import caption_entropy, caption_law
from mmdlm.data.scene_language import captions, num_captions, read_caption
from mmdlm.data.scene_reader import read_image, read_images
from mmdlm.data.scenes import Scenes, Split, around, hole, split_of
from mmdlm.data.shards import Shard, Shards
from mmdlm.data.sources import ImageFolder, Source
from mmdlm.data.texts import Chunks, Documents, Line, Lines, Paragraphs, Piece, Pieces, TextFiles
from mmdlm.data.webdataset import WebDataset

__all__ = [
    "Batches",
    "Census",
    "CentreCrop",
    "Chunks",
    "Columns",
    "Dataset",
    "Description",
    "Documents",
    "Encode",
    "Encoded",
    "Endless",
    "FromPairs",
    "FromRows",
    "Grouped",
    "ImageError",
    "ImageFolder",
    "InOrder",
    "Indexed",
    "JsonLines",
    "Letterbox",
    "Line",
    "Lines",
    "Listed",
    "Look",
    "Mapped",
    "Mixture",
    "Object",
    "OnError",
    "OnlineEncoded",
    "Order",
    "Paragraphs",
    "Parquet",
    "Piece",
    "Pieces",
    "Relation",
    "Sample",
    "SampleError",
    "Scene",
    "Scenes",
    "Shard",
    "ShardPlan",
    "Shards",
    "Shuffled",
    "Skip",
    "Source",
    "Split",
    "Stop",
    "TextFiles",
    "WebDataset",
    "agree",
    "around",
    "caption_entropy",
    "caption_law",
    "captions",
    "data_digest",
    "decode",
    "encode_shards",
    "fit",
    "hole",
    "num_captions",
    "open_source",
    "read_caption",
    "read_image",
    "read_images",
    "split_of",
    "to_array",
    "to_rgb",
]
