"""Errors that end a program: one line on standard error, no traceback, and an exit code."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in a config, flag, file or environment. The program exits with code 2.

    The message is one line: what is wrong, what was expected, what to do.
    """

    exit_code = 2


class TrainingError(RuntimeError):
    """A run that must stop. The program exits with code 3.

    The message is one line: what happened, what is safe, what to do.
    """

    exit_code = 3


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read, perhaps by only one of several processes."""


class Interrupted(KeyboardInterrupt):
    """A program that was asked to stop by a signal. It exits with code 75 (EX_TEMPFAIL); rerun it to resume."""

    exit_code = 75


def not_installed(error: ModuleNotFoundError) -> UserError:
    """Describe a missing library and how to install it."""
    if sys.platform == "win32" and error.name == "array_record":
        return UserError(f"{error}; it is not available for Windows; prepare data and train in WSL")
    remedy = 'pip install "simplest-vit[train]", or in a clone: pip install -r requirements.txt'
    return UserError(f"{error}; install what the commands need: {remedy}")


def did_you_mean(name: str, known: Iterable[str], otherwise: str, show: Callable[[str], str] = str) -> str:
    """Return "did you mean NAME?" for the most similar of the known names, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {show(near[0])}?" if near else otherwise


def one_line(text: object) -> str:
    r"""Escape what would break a line or a terminal: "a\nb" -> "a\\nb", a byte that is not UTF-8 -> "\\udcff"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(error: UserError | TrainingError | Interrupted) -> int:
    """Print the line of an error and return its exit code."""
    print(
        f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {one_line(error)}",
        file=sys.stderr,
        flush=True,
    )
    return error.exit_code
