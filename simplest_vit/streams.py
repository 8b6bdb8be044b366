"""The standard streams and the log of a command; no error of a reader or a disk in them ends a run."""

import logging
import os
import sys
import threading
from typing import Any

from absl import logging as absl_logging

from simplest_vit.errors import one_line


def install() -> None:
    """Replace the standard streams, and log to standard error."""
    sys.stdout, sys.stderr = _Stdout(sys.stdout), _Stderr(sys.stderr)
    _configure_logging()


def print_saved(text: str) -> None:
    """Print text that is also saved on disk, so that a failure to print is only logged."""
    try:
        print(text, flush=True)
    except StdoutError as error:
        logging.getLogger("simplest_vit").warning("standard output cannot be written (%s)", error)


class StdoutError(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.errno = error.errno


class _Stream:
    """A standard stream that calls `_fail` on write errors and escapes names that are not UTF-8."""

    def __init__(self, stream: Any) -> None:
        stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # so that the flush at exit does not fail


class _Stderr(_Stream):
    """Drops text that cannot be written, because a log line must not end a run."""


class _Stdout(_Stream):
    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        raise StdoutError(error)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(one_line, super().format(record).split("\n")))


def _configure_logging() -> None:
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


def _report_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
    """Print a traceback, except for errors in TensorStore's callbacks after Orbax has failed."""
    if str(arguments.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(arguments)


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for system errors, which Orbax raises again in the main thread."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)
