"""Training from Python: what `simplest-vit train` does, in a script or a notebook."""

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from simplest_vit.config import check
from simplest_vit.errors import UserError


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Train as the config describes, or resume the run in `workdir`, and log to standard output.

    Args:
      config: From a recipe (`from simplest_vit.recipes import cifar10`, `cifar10.get_config()`), or `default_config`.
      workdir: Folder for checkpoints, metrics, TensorBoard files and `results.json`.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: If the config, the data or the folder does not fit.
      TrainingError: If the run cannot continue; its last checkpoint is intact.
    """
    from simplest_vit.training import train as training

    if hasattr(multiprocessing.current_process(), "_inheriting"):  # as multiprocessing recognizes it, too
        raise UserError(
            "train is called by a process that decodes images, because each of them imports the script; call it after "
            'if __name__ == "__main__":'
        )
    if type(config) is not ConfigDict:  # a frozen one cannot be adapted to the data
        raise UserError(f"config must be a ConfigDict, as default_config() returns, not {type(config).__name__}")
    check(config)
    with _logging():
        return training.train(config, os.fspath(workdir))


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Log to standard output, unless the caller has configured the project's logger."""
    log = logging.getLogger("simplest_vit")
    if log.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
