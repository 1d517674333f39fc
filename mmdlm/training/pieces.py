"""Tensors that several ranks hold in parts, written and read by all of them at once. Knows no run.

`torch.distributed.checkpoint` does the work: every rank writes what it holds into a safetensors file of its
own, and reads what it is to hold, whatever the number of ranks that wrote it. Tensors are named `GROUP/NAME`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.training.ranks import Ranks

Groups = Mapping[str, Mapping[str, Tensor]]


def write_pieces(folder: Path, tensors: Groups, ranks: Ranks) -> list[str]:
    """Writes named tensors by group; called by all ranks. The names of the files that this rank wrote.

    What a rank holds a part of is a `DTensor`; of other tensors, which are the same everywhere, one rank
    writes each. Raises OSError at all ranks when one of them cannot write.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = {
        f"{group}/{name}": value.detach().contiguous()
        for group, named in tensors.items()
        for name, value in named.items()
    }
    number = {group: at for at, group in enumerate(tensors, start=1)}
    files = {name: number[name.partition("/")[0]] for name in flat}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _plain_errors():
        save(flat, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world == 1)
    return sorted(path.name for path in folder.glob(f"shard-{ranks.rank + 1:05d}-*"))


def pieces(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What lies in `folder`, by group and name: tensors of that shape and dtype on the meta device."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found: dict[str, dict[str, Tensor]] = {}
    for key, kind in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(kind, TensorStorageMetadata)
        group, _, name = key.partition("/")
        made = torch.empty(kind.size, dtype=kind.properties.dtype, device="meta")
        found.setdefault(group, {})[name] = made
    return found


def read_pieces(folder: Path, group: str, into: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fills the tensors `into`, named as those of the group, in place; called by all ranks.

    A `DTensor` gets what this rank holds of it, and nothing else is read for it. Raises OSError at all ranks
    when one of them cannot read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    flat = {f"{group}/{name}": value for name, value in into.items()}
    with _plain_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: just so
        load(flat, storage_reader=reader, process_group=ranks.group, no_dist=ranks.world == 1)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What torch raises when a rank fails is no `Exception` and names the ranks; inside, it is an OSError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {cause}") from error
