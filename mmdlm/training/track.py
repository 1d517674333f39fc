"""Trackers that listen to a run's records: TensorBoard, wandb, trackio. Know no loop; none is required."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from mmdlm.training.metrics import Value

# Is handed the step and every record that goes into metrics.jsonl.
Listener = Callable[[int, Mapping[str, Value]], None]


@runtime_checkable
class Closing(Protocol):
    """A listener that is told when the run ends or stops; it may hear of it again if that goes on."""

    def close(self) -> None: ...


class TensorBoard:
    """A listener that writes event files for `tensorboard --logdir`; numbers only.

    A resumed run hides what an earlier process wrote of its steps. Raises ImportError where tensorboard is
    not installed.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` of the event files: one for each run that is compared."""
        _needed("tensorboard", lambda: import_module("tensorboard"))
        self.folder = folder
        self._writer: Any = None

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file; another record begins a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """A listener that sends records to Weights & Biases, or keeps them there with WANDB_MODE=offline.

    The run's configuration is read from FOLDER/run.json. FOLDER/wandb.txt holds the id under which a resumed
    run goes on. Raises ImportError where wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, *, name: str | None = None) -> None:
        """`folder` of the run; `name` of the run there, None: the folder's."""
        self._wandb = _needed("wandb", lambda: import_module("wandb"))
        self.project, self.folder, self.name = project, folder, name or folder.name
        self._run: Any = None

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        if self._run is None:
            self._run = self._wandb.init(
                project=self.project,
                name=self.name,
                id=self._id(),
                resume="allow",
                config=_configuration(self.folder),
                dir=str(self.folder),
                reinit="create_new",  # the stages of one recipe are runs of their own
            )
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        """Sends what is left and ends the run there, which may go on later."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _id(self) -> str:
        path = self.folder / "wandb.txt"
        if not path.exists():
            path.write_text(uuid4().hex[:16], "utf-8")
        return path.read_text("utf-8").strip()


class Trackio:
    """A listener that keeps records in trackio's local database, for `trackio show`.

    The run's configuration is read from FOLDER/run.json; a resumed run goes on under its name. Raises
    ImportError where trackio is not installed.
    """

    def __init__(self, project: str, folder: Path, *, name: str | None = None) -> None:
        """`folder` of the run; `name` of the run there, None: the folder's."""
        self._trackio = _needed("trackio", lambda: import_module("trackio"))
        self.project, self.folder, self.name = project, folder, name or folder.name
        self._run: Any = None

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        if self._run is None:
            self._run = self._trackio.init(
                self.project, name=self.name, config=_configuration(self.folder), resume="allow"
            )
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        """Sends what is left and ends the run there, which may go on later."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Audience:
    """The listeners of one run; what goes wrong in one of them is told once, and never ends the run."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._failed: set[int] = set()

    def hear(self, step: int, values: Mapping[str, Value]) -> None:
        """Hands the record to every listener, a copy each."""
        for number, listener in enumerate(self._listeners):
            with self._forgiven(number, f"at step {step}"):
                listener(step, dict(values))

    def close(self) -> None:
        """Closes the listeners that can be closed."""
        for number, listener in enumerate(self._listeners):
            if isinstance(listener, Closing):
                with self._forgiven(number, "at the end"):
                    listener.close()

    @contextmanager
    def _forgiven(self, number: int, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if number not in self._failed:
                self._failed.add(number)
                kind = type(self._listeners[number]).__name__
                told = f"listener {number} ({kind}) of the run failed {when}, told once: {error!r}"
                warnings.warn(told, stacklevel=4)


def _needed(package: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ImportError as error:
        raise ImportError(f"{package} is not installed: pip install 'mmdlm[{package}]'") from error


def _numbers(values: Mapping[str, Value]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
