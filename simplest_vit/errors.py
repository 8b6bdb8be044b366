"""How a run ends when it cannot go on: one line, no traceback, and an exit code."""

import os
import sys


class UserError(ValueError):
    """A mistake in a config, flag, file or environment, told in one line.

    The message names what was wrong, what was expected and what to do. `main.py` prints it without a
    traceback and exits with code 2.
    """

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that must stop, told in one line: what happened, what is safe, what to do.

    `main.py` prints it without a traceback and exits with code 3.
    """

    exit_code = 3


class DivergenceError(TrainingError):
    """A loss or gradient that is no longer finite."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read, perhaps by this process alone of several."""


class Interrupted(KeyboardInterrupt):
    """A run or program that was told to stop by SIGTERM or SIGINT; the same command goes on with it.

    `main.py` prints the message and exits with code 75 (EX_TEMPFAIL).
    """

    exit_code = os.EX_TEMPFAIL


def not_installed(error: ModuleNotFoundError) -> UserError:
    """What to say where a program misses a library."""
    remedy = 'pip install "simplest-vit[train]", or in a clone: pip install -r requirements.txt'
    return UserError(f"{error}; install what the programs need: {remedy}")


def print_error(error: UserError | TrainingError | Interrupted) -> int:
    """Print the line of an error; its exit code."""
    print(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", file=sys.stderr, flush=True)
    return error.exit_code
