"""clu's metric writers without TensorFlow.

`clu.metric_writers` imports TensorFlow for one class, its `SummaryWriter` (CommonLoopUtils issue 358). If TensorFlow is
not installed, a writer that needs only the `tensorboard` package replaces that class before the first import, and the
rest of clu works as it is. Import `metric_writers` from here, never from clu.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import socket
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from simplest_vit.data.decode import encode_png

log = logging.getLogger("simplest_vit")


class SummaryWriter:
    """The part of clu's `MetricWriter` that training uses, for a TensorBoard event file; clu calls it from a thread.

    A file that cannot be written is reported once, and the rest is dropped: that is no reason to end a run.
    """

    def __init__(self, logdir: str):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = pathlib.Path(logdir, name)
        self._file: BinaryIO | None = None
        with self._reported():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb")
            self._add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

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

    def _add(self, event: event_pb2.Event) -> None:
        if self._file:
            with self._reported():
                RecordWriter(self._file).write(event.SerializeToString())
                self._file.flush()

    def _write(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers, or arrays of one element."""
        value = summary_pb2.Summary.Value
        self._write(step, [value(tag=tag, simple_value=float(scalar)) for tag, scalar in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images, uint8 [H, W, C], C = 1 or 3."""
        values = []
        for tag, pixels in images.items():
            height, width, channels = pixels.shape
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=encode_png(pixels)
            )
            values.append(summary_pb2.Summary.Value(tag=tag, image=image))
        self._write(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the hyperparameters of the run, a flat mapping."""
        simple = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in hparams.items()
        }
        self._add(event_pb2.Event(wall_time=time.time(), summary=summary_v2.hparams_pb(simple)))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Close the event file."""
        if self._file:
            self._file.close()


if importlib.util.find_spec("tensorflow") is None:
    _substitute = types.ModuleType("clu.metric_writers.summary_writer")
    _substitute.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    sys.modules.setdefault(_substitute.__name__, _substitute)

from clu import metric_writers  # noqa: E402

__all__ = ["SummaryWriter", "metric_writers"]
