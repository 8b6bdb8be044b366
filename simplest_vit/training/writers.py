"""Write the metrics of a run to `metrics.jsonl`, TensorBoard files and, if configured, Weights & Biases.

TensorBoard files are written by clu's writers without TensorFlow.

`clu.metric_writers` imports TensorFlow for one class, its `SummaryWriter` (CommonLoopUtils issue 358). A writer that
needs only the `tensorboard` package replaces that class before the first import, and the rest of clu works unchanged.
Import `metric_writers` from here, never from clu.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import socket
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from simplest_vit.data.decode import encode_png
from simplest_vit.errors import UserError, first_line
from simplest_vit.files import write_file
from simplest_vit.primary import is_primary
from simplest_vit.training.workdir import METRICS, read_metrics

log = logging.getLogger("simplest_vit")


class _Writer:
    """The part of clu's `MetricWriter` that training uses, for a file.

    A file that cannot be written is reported once and then dropped, because that must not end a run.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: BinaryIO | None = None

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written (%s): the run continues without it", self._path, error.strerror)
            file, self._file = self._file, None
            if file:
                with contextlib.suppress(OSError):
                    file.close()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images, uint8 [H, W, C], C = 1 or 3."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the hyperparameters of the run, a flat mapping."""

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class MetricsWriter(_Writer):
    """Writes `metrics.jsonl`: a line for each step, with all that is written for it; null if it is not finite."""

    def __init__(self, folder: pathlib.Path, last_step: int):
        """Keep the lines up to `last_step`, from which the run resumes; later lines will be written again."""
        super().__init__(folder / METRICS)
        self._last: dict[str, Any] = {}
        self._start = 0  # of the last line
        with self._reported():
            lines = [line for line in read_metrics(folder) if line["step"] <= last_step]
            write_file(self._path, b"".join(map(_encode, lines)))
            self._file = self._path.open("r+b")
            for self._last in lines[-1:]:
                self._start = self._path.stat().st_size - len(_encode(self._last))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers: into the last line if it has the same step, otherwise into a new line."""
        if self._file:
            with self._reported():
                if self._last.get("step") != step:
                    self._last, self._start = {"step": step}, self._file.seek(0, os.SEEK_END)
                values = {tag: float(value) for tag, value in scalars.items()}
                self._last |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
                self._file.seek(self._start)
                self._file.write(_encode(self._last))
                self._file.truncate()
                self._file.flush()


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


class SummaryWriter(_Writer):
    """Writes a TensorBoard event file; clu calls it from a thread."""

    def __init__(self, logdir: str):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(pathlib.Path(logdir, name))
        with self._reported():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb")
            self._write(file_version="brain.Event:2")

    def _write(self, **fields: Any) -> None:
        if self._file:
            with self._reported():
                RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())
                self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers, or arrays of one element."""
        values = [Summary.Value(tag=tag, simple_value=float(scalar)) for tag, scalar in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images, uint8 [H, W, C], C = 1 or 3."""
        values = []
        for tag, pixels in images.items():
            height, width, channels = pixels.shape
            png = encode_png(pixels)
            image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
            values.append(Summary.Value(tag=tag, image=image))
        self._write(step=step, summary=Summary(value=values))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the hyperparameters of the run, a flat mapping."""
        simple = {name: x if isinstance(x, int | float | str) else str(x) for name, x in hparams.items()}
        self._write(summary=summary_v2.hparams_pb(simple))


class WandbWriter:
    """Logs to Weights & Biases. A resumed run continues there, by the id in `wandb/` of the run's folder."""

    def __init__(self, folder: pathlib.Path, project: str):
        """Start or resume the run; a UserError if that fails."""
        self._wandb = import_wandb()
        try:
            self._run = self._wandb.init(
                project=project,
                name=f"{folder.parent.name}/{folder.name}",
                dir=str(folder),
                resume="auto",
                settings=self._wandb.Settings(console="off"),  # the command wraps its own streams: see `streams`
            )
        except Exception as error:
            raise UserError(
                f"config.wandb={project}: Weights & Biases cannot be started ({first_line(error)}); run `wandb login`, "
                "set WANDB_MODE=offline, or leave config.wandb out"
            ) from error
        # W&B's own step count cannot go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Log numbers."""
        self._run.log({"step": step, **{tag: float(value) for tag, value in scalars.items()}})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Log images, uint8 [H, W, C], C = 1 or 3."""
        self._run.log({"step": step, **{tag: self._wandb.Image(pixels) for tag, pixels in images.items()}})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Record the hyperparameters."""
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> None:
        """Finish the run; mark it as failed if an exception is being raised, so that it can be resumed."""
        self._run.finish(exit_code=0 if sys.exception() is None else 1)


def import_wandb() -> Any:
    """Import Weights & Biases; a UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.wandb needs Weights & Biases; install it: pip install wandb") from error
    return wandb


_substitute = types.ModuleType("clu.metric_writers.summary_writer")
_substitute.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
sys.modules.setdefault(_substitute.__name__, _substitute)

from clu import metric_writers  # noqa: E402


def create_writer(folder: pathlib.Path, first_step: int, wandb: str | None = None) -> metric_writers.MetricWriter:
    """Create the writers of a run that starts from `first_step`; processes other than the primary only log.

    The run is also logged to the project `wandb` of Weights & Biases, if there is one.
    """
    if not is_primary():
        return metric_writers.create_default_writer(just_logging=True)
    # Weights & Biases comes first, because it may fail after the others have opened files.
    others = [WandbWriter(folder, wandb)] if wandb else []
    return metric_writers.MultiWriter(
        [*others, metric_writers.create_default_writer(folder), MetricsWriter(folder, first_step)]
    )
