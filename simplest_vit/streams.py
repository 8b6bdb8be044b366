"""The standard streams and the log of a command; no error of a reader or a disk in them ends a run."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

from simplest_vit.errors import one_line


class StdoutError(Exception):
    """Standard output cannot be written; the cause is an OSError."""


def install() -> None:
    """Replace the standard streams, and log to standard error. Call it before any file is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`; the next file would get its number, and XLA's messages
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # A log line must not end a run, so it is dropped if it cannot be written.
    sys.stdout, sys.stderr = _Stream(sys.stdout, raises=True), _Stream(sys.stderr, raises=False)
    # Libraries log only errors; this project also logs its progress.
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Orbax also logs every error that it raises, with a traceback for each of its threads (tests/faults/test_disk.py
    # checks that these are hidden).
    absl_logging.get_absl_logger().addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = _report_thread
    sys.unraisablehook = _report_unraisable
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
    log = logging.getLogger("simplest_vit")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def print_saved(text: str) -> None:
    """Print text that is also saved on disk, so that a failure to print is only logged."""
    try:
        print(text, flush=True)
    except StdoutError as error:
        logging.getLogger("simplest_vit").warning("standard output cannot be written (%s)", error)


class _Stream:
    """A standard stream that escapes names that are not UTF-8; a system error raises StdoutError or is dropped."""

    def __init__(self, stream: Any, *, raises: bool) -> None:
        stream.reconfigure(errors="backslashreplace")
        self._stream, self._raises = stream, raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., object], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # so that the flush at exit does not fail
            if self._raises:
                raise StdoutError(error.strerror) from error


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(one_line, super().format(record).split("\n")))


def _report_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
    """Print a traceback, except for errors in TensorStore's callbacks after Orbax has failed."""
    if str(arguments.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(arguments)


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for system errors, which Orbax raises again in the main thread."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)
