"""A training run as one value: what is trained, on what, how long, with what on the way. Knows no loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from mmdlm.diffusion.loss import LossOutput
from mmdlm.training.best import EarlyStop
from mmdlm.training.ema import Ema
from mmdlm.training.metrics import Value
from mmdlm.training.optim import AdamW, Float32, LearningRate, OptimizerSpec, Precision, WarmupCosine
from mmdlm.training.parallel import Parallel
from mmdlm.training.track import Listener

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)


class Objective(Protocol[BatchT_contra]):
    """What is minimised, for any kind of batch. It never normalises: the trainer divides sums by counts.

    It names the same modalities at every call; one without a token has sum 0, with a graph, and count 0.
    The batch comes as the source gave it and `rng` is a CPU generator: the objective moves what must move.
    """

    def __call__(self, module: nn.Module, batch: BatchT_contra, rng: torch.Generator) -> LossOutput: ...


@runtime_checkable
class Divisible(Protocol):
    """An objective whose step may be spread over several micro-batches (`Run.accumulate`)."""

    def part(self, index: int, count: int, step: int) -> Any:
        """The objective for micro-batch `index` of `count`: it draws that part of the step's noise levels."""
        ...

    def counts(self, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        """What a call with an equal generator would return as `.counts`, without a forward pass."""
        ...


class Batches(Protocol[BatchT_co]):
    """A source of batches that knows its place; when it is exhausted it is iterated anew (the next epoch).

    `state_dict` (plain JSON values) is the place right behind the batch given last, however far ahead the
    source has read; a source that loaded it gives what came next.
    """

    def __iter__(self) -> Iterator[BatchT_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@runtime_checkable
class Assignable(Protocol):
    """Batches that need not make what another process works on; others are made by all and left lying."""

    def assign(self, index: int, count: int) -> None:
        """From here on make only every `count`-th batch, the first after `index` others.

        The others come as None, so that the state stays that of the whole stream.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """Batches that can tell what they are made of, for the message about a batch that is no good."""

    def names(self) -> Sequence[str]:
        """Of each sample of the batch given last, what its source calls it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Validation(Generic[BatchT]):
    """Every `every` steps and after the last: the held-out loss by modality, on the averaged weights."""

    every: int
    batches: Iterable[BatchT]  # gives the same batches at every iteration: a list, for instance
    num_batches: int | None = None  # None: all of them
    objective: Objective[BatchT] | None = None  # None: the run's own


@dataclass(frozen=True)
class Moment:
    """What a hook is given. Meanwhile the module holds the averaged weights and is in evaluation mode."""

    step: int  # updates done
    steps: int  # updates in all
    module: nn.Module
    folder: Path  # the run's folder; what a hook writes goes here
    log: Callable[[Mapping[str, Value]], None]  # adds a record to the metrics


Hook = tuple[int, Callable[[Moment], None]]


@dataclass(frozen=True, kw_only=True)
class Run(Generic[BatchT]):
    """All of a training run. `Trainer(run).fit()` carries it out, or takes it up where it was left.

    The module is trained where it lies (device, dtype). The loss of a step is the sum over modalities of
    weight * sum / count, with sums and counts of all of the step's micro-batches.

    `threads` share the processor's cores out among micro-batches, each worked on by fewer cores: small
    networks gain, where most operations are too short for many cores. Results stay those of one thread, up to
    rounding, and are the same each time; the module must not change its buffers in a forward pass.

    Started by `torchrun`, W processes share the micro-batches of every step, so `accumulate` must be a
    multiple of W. Samples, noise and counts are those of one process and results the same up to rounding: a
    run may go on with another number of processes. Every process builds the same run.

    `flops` is called with the module and what it is called with (`mmdlm.model.training_flops`) and gives a
    scalar on any device; the metrics then say how many operations a second are done, and with `peak_flops`
    which share of what all devices could do (model-FLOP utilisation, arXiv:2204.02311).
    """

    module: nn.Module
    objective: Objective[BatchT]
    batches: Batches[BatchT]
    steps: int
    folder: Path
    optimizer: OptimizerSpec = field(default_factory=AdamW)
    learning_rate: LearningRate = field(default_factory=WarmupCosine)
    clip: float | None = 1.0  # largest norm of the gradient
    ema: Ema | None = field(default_factory=Ema)
    precision: Precision = field(default_factory=Float32)
    accumulate: int = (
        1  # micro-batches a step, each one of `batches`; more than one needs a `Divisible` objective
    )
    threads: int = 1  # micro-batches worked on at once; on a CPU, see below
    parallel: Parallel | None = None  # how the processes of `torchrun` hold the module; None: `DDP()`
    weights: Mapping[str, float] = field(default_factory=dict)  # by modality; 1 where none is given
    flops: Callable[..., Tensor] | None = None  # operations of one part of an update, see below
    peak_flops: float | None = None  # operations a second that the device of one process could do
    validation: Validation[BatchT] | None = None
    early_stop: EarlyStop | None = None
    keep_best: str | None = None  # a validation's key: FOLDER/best holds the weights of its lowest value
    hooks: tuple[Hook, ...] = ()  # (every, callable): every so many steps and after the last one
    listeners: tuple[Listener, ...] = ()  # each is called with the step and every record of the metrics
    seed: int = 0  # of the noise; the library never seeds anything else
    checkpoint_every: int | None = None  # None: only at the end and on a signal
    save_in_background: bool = False  # a checkpoint's copy is written while the run goes on
    keep_checkpoints: int = 2
    log_every: int = 50
    progress: bool = True

    def __post_init__(self) -> None:
        rhythms = {"steps": self.steps, "accumulate": self.accumulate, "threads": self.threads}
        rhythms |= {"log_every": self.log_every}
        rhythms |= {"keep_checkpoints": self.keep_checkpoints}
        rhythms |= {f"the rhythm of hook {number}": every for number, (every, _) in enumerate(self.hooks)}
        rhythms |= {} if self.checkpoint_every is None else {"checkpoint_every": self.checkpoint_every}
        rhythms |= {} if self.validation is None else {"validation.every": self.validation.every}
        for name, value in rhythms.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.validation is None and (self.early_stop is not None or self.keep_best is not None):
            raise ValueError("early_stop and keep_best need a validation, the run has none")
        if self.peak_flops is not None and (self.flops is None or not self.peak_flops > 0):
            raise ValueError(f"peak_flops={self.peak_flops}: wanted a number above 0, and flops beside it")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0 (None: no clipping), got {self.clip}")
        if self.threads > self.accumulate:
            raise ValueError(f"threads={self.threads} for accumulate={self.accumulate} micro-batches a step")
        if self.accumulate > 1 and not isinstance(self.objective, Divisible):
            name = type(self.objective).__name__
            raise ValueError(
                f"accumulate={self.accumulate} needs an objective with part and counts, {name} has none"
            )


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator for the place `numbers` (step, micro-batch) of the stream `seed`: no state to save."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
