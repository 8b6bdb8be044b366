"""clu's metric writers and periodic actions without TensorFlow.

`clu.metric_writers` imports TensorFlow for one class, its `SummaryWriter` (CommonLoopUtils issue 358). Where TensorFlow
is not installed, a writer that needs only the `tensorboard` package takes that class's place before the first import,
and the rest of clu works as it is. Import `metric_writers` from here, never from clu.
"""

import contextlib
import importlib.util
import io
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
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams import summary_v2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger("simplest_vit")


class SummaryWriter:
    """clu's `MetricWriter` interface over a TensorBoard event file; clu calls it from a thread of its own.

    Where the file cannot be written, that is reported once, and what follows is dropped: no reason to end a run.
    """

    def __init__(self, logdir: str):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = pathlib.Path(logdir, name)
        self._file: BinaryIO | None = None
        with self._told():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb")
            self._add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written (%s): the run goes on without it", self._path, error.strerror)
            file, self._file = self._file, None
            if file:
                with contextlib.suppress(OSError):
                    file.close()

    def _add(self, event: event_pb2.Event) -> None:
        if self._file:
            with self._told():
                RecordWriter(self._file).write(event.SerializeToString())
                self._file.flush()

    def _write(self, step: int, values: list[summary_pb2.Summary.Value]) -> None:
        self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers, or arrays of one element."""
        value = summary_pb2.Summary.Value
        self._write(step, [value(tag=tag, simple_value=float(scalar)) for tag, scalar in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write images [N, H, W, C] or [H, W, C], uint8 or floats in [0, 1], C = 1 or 3."""
        values = []
        for tag, batch in images.items():
            batch = np.asarray(batch)
            if np.issubdtype(batch.dtype, np.floating):
                batch = np.rint(255 * batch.clip(0, 1))
            batch = batch.astype(np.uint8).reshape(-1, *batch.shape[-3:])
            values += [
                summary_pb2.Summary.Value(tag=f"{tag}/{i}" if len(batch) > 1 else tag, image=_encode(pixels))
                for i, pixels in enumerate(batch)
            ]
        self._write(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts; TensorBoard renders them as Markdown."""
        metadata = text_metadata.create_summary_metadata(None, "")
        self._write(
            step,
            [
                summary_pb2.Summary.Value(
                    tag=tag,
                    metadata=metadata,
                    tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()]),
                )
                for tag, text in texts.items()
            ],
        )

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Write histograms of arrays of any shape."""
        values = []
        for tag, array in arrays.items():
            array = np.asarray(array, np.float64).ravel()
            counts, edges = np.histogram(array, (num_buckets or {}).get(tag) or 30)
            histogram = summary_pb2.HistogramProto(
                min=array.min(),
                max=array.max(),
                num=array.size,
                sum=array.sum(),
                sum_squares=(array**2).sum(),
                bucket_limit=edges[1:],
                bucket=counts,
            )
            values.append(summary_pb2.Summary.Value(tag=tag, histo=histogram))
        self._write(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write the hyperparameters of the run, a flat mapping."""
        simple = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in hparams.items()
        }
        self._add(event_pb2.Event(wall_time=time.time(), summary=summary_v2.hparams_pb(simple)))

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None:
        """Part of clu's interface; raw tensors are not supported."""
        raise NotImplementedError("raw tensor summaries need TensorFlow")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Part of clu's interface; videos are not supported."""
        raise NotImplementedError("videos need TensorFlow")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Part of clu's interface; audio is not supported."""
        raise NotImplementedError("audio needs TensorFlow")

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Close the event file."""
        if self._file:
            self._file.close()


def _encode(pixels: np.ndarray) -> summary_pb2.Summary.Image:
    height, width, channels = pixels.shape
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "PNG")
    return summary_pb2.Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue()
    )


if importlib.util.find_spec("tensorflow") is None:
    _substitute = types.ModuleType("clu.metric_writers.summary_writer")
    _substitute.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    sys.modules.setdefault(_substitute.__name__, _substitute)

from clu import metric_writers  # noqa: E402

__all__ = ["SummaryWriter", "metric_writers"]
