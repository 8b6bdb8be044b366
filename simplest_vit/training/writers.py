"""Write the metrics of a run to `metrics.jsonl`, TensorBoard files, and Weights & Biases if asked.

clu's writers do the same for TensorBoard, but need TensorFlow (CommonLoopUtils issue 358).
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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from simplest_vit.data.decode import encode_png
from simplest_vit.errors import UserError, first_line
from simplest_vit.files import write_file
from simplest_vit.training.workdir import METRICS, read_metrics

log = logging.getLogger("simplest_vit")


class RunWriter:
    """Writes to several places. One that cannot be written is reported once and left out; the run continues.

    A place has a `path` for messages, `open` and `close`, and those of the methods here that it supports.
    """

    def __init__(self, places: Sequence[Any]):
        self._places = list(places)
        self._call("open")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers, or arrays of one element."""
        self._call("write_scalars", step, {tag: float(value) for tag, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images, uint8 [H, W, C], C = 1 or 3."""
        self._call("write_images", step, images)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the hyperparameters of the run, a flat mapping."""
        self._call("write_hparams", hparams)

    def close(self) -> None:
        """Close all places."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        for place in [place for place in self._places if hasattr(place, method)]:
            try:
                getattr(place, method)(*arguments)
            except OSError as error:
                log.warning("%s cannot be written (%s): the run continues without it", place.path, error.strerror)
                self._places.remove(place)
                with contextlib.suppress(Exception):  # or what is buffered would raise again when it is collected
                    place.close()


class _Metrics:
    """`metrics.jsonl`: a line for each step, with all that is written for it; null if it is not finite."""

    def __init__(self, folder: pathlib.Path, last_step: int):
        self.path, self._folder, self._last_step = folder / METRICS, folder, last_step

    def open(self) -> None:
        """Keep the lines up to the last step, from which the run resumes; what came after will be made again."""
        lines = [line for line in read_metrics(self._folder) if line["step"] <= self._last_step]
        write_file(self.path, b"".join(map(_encode, lines)))
        self._file = self.path.open("r+b")
        self._last: dict[str, Any] = lines[-1] if lines else {}
        self._start = self.path.stat().st_size - (len(_encode(self._last)) if lines else 0)  # of the last line

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write in the last line if that is of the same step, else in a new one."""
        if self._last.get("step") != step:
            self._last, self._start = {"step": step}, self._file.seek(0, os.SEEK_END)
        self._last |= {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._file.seek(self._start)
        self._file.write(_encode(self._last))
        self._file.truncate()
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


class _TensorBoard:
    """A TensorBoard event file."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"

    def open(self) -> None:
        self._file = self.path.open("xb")
        self._add(file_version="brain.Event:2")

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        value = summary_pb2.Summary.Value
        values = [value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()]
        self._add(step=step, summary=summary_pb2.Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        values = []
        for tag, pixels in images.items():
            height, width, channels = pixels.shape
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=encode_png(pixels)
            )
            values.append(summary_pb2.Summary.Value(tag=tag, image=image))
        self._add(step=step, summary=summary_pb2.Summary(value=values))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        simple = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in hparams.items()
        }
        self._add(summary=summary_v2.hparams_pb(simple))

    def _add(self, **fields: Any) -> None:
        RecordWriter(self._file).write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Wandb:
    """Weights & Biases. A resumed run continues there, by the id in `wandb/` of the run's folder."""

    def __init__(self, folder: pathlib.Path, project: str):
        self.path, self._folder, self._project = folder / "wandb", folder, project

    def open(self) -> None:
        """Start or resume the run; a UserError if that fails."""
        self._wandb = import_wandb()
        try:
            self._run = self._wandb.init(
                project=self._project,
                name=f"{self._folder.parent.name}/{self._folder.name}",
                dir=str(self._folder),
                resume="auto",
                settings=self._wandb.Settings(console="off"),  # the streams of a command are ours: see `streams`
            )
        except Exception as error:
            raise UserError(
                f"config.wandb={self._project}: Weights & Biases cannot be started ({first_line(error)}); run "
                "`wandb login`, set WANDB_MODE=offline, or leave config.wandb out"
            ) from error
        # Its own count of steps cannot go back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({"step": step, **{tag: self._wandb.Image(pixels) for tag, pixels in images.items()}})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._run.config.update(dict(hparams), allow_val_change=True)

    def close(self) -> None:
        """Finish the run, as failed if an exception is on its way, so that it can be resumed."""
        self._run.finish(exit_code=0 if sys.exception() is None else 1)


def import_wandb() -> Any:
    """Import Weights & Biases.

    Raises:
      UserError: If it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.wandb needs Weights & Biases; install it: pip install wandb") from error
    return wandb


def create_writer(folder: pathlib.Path, first_step: int, *, primary: bool, wandb: str | None = None) -> RunWriter:
    """Create the writer of a run that starts from `first_step`; only the primary process writes.

    The run is also logged to the project `wandb` of Weights & Biases, if there is one.
    """
    if not primary:
        return RunWriter([])
    # Weights & Biases comes first, because it may fail, and the others open files.
    places = [_Wandb(folder, wandb)] if wandb else []
    return RunWriter([*places, _Metrics(folder, first_step), _TensorBoard(folder)])
