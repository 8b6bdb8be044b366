"""The one command line: `simplest-vit`, `python -m simplest_vit` and `main.py`. Each command is a module here."""

import importlib
import os
import sys

from simplest_vit import __version__
from simplest_vit.errors import UserError, not_installed, print_error

COMMANDS = {
    "train": "train a model, or resume the run in --workdir",
    "evaluate": "evaluate the checkpoints of a run",
    "predict": "classify images with the best checkpoint of a run",
    "export": "write the best checkpoint as StableHLO, ONNX, safetensors or for the PyTorch reference",
    "prepare": "prepare a data set ahead of time",
    "preview": "draw augmented training images",
    "sweep": "train a grid of configs over seeds",
    "report": "print a table of finished runs for each data set, with accuracy over seeds",
    "import_reference": "import a checkpoint of the PyTorch reference as a run",
    "signal_propagation": "plot how each block transforms images, in theory and as measured",
}
USAGE = "simplest-vit COMMAND --flags"

# Defaults that make commands fast on few CPU cores; a user's own setting takes precedence. LAPACK's threads would
# compete with XLA's for the cores. Each step touches new memory, and page faults took a quarter of its time. The other
# settings, which glibc reads when a process starts, make it keep its memory, in huge pages.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
_RESTARTED = "SIMPLEST_VIT_RESTARTED"  # once, even if a loader removes these from the environment


def restart() -> None:
    """Restart this program with `ENVIRONMENT`, unless that has been done."""
    if sys.platform == "linux" and _RESTARTED not in os.environ and not ENVIRONMENT.keys() <= os.environ.keys():
        environment = ENVIRONMENT | os.environ | {_RESTARTED: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """Run the command named by the first word of the command line; without one, train."""
    restart()
    arguments = sys.argv[1:]
    if arguments[:1] in (["help"], ["--help"], ["-h"]):
        commands = "\n".join(f"  {name:<18} {meaning}" for name, meaning in COMMANDS.items())
        print(f"{USAGE}\n\n{commands}\n\nsimplest-vit COMMAND --help lists the flags of a command.")
        return
    if arguments[:1] == ["--version"]:
        print(f"simplest-vit {__version__}")
        return
    if arguments and arguments[0].startswith("-"):
        arguments = ["train", *arguments]
    name = "".join(arguments[:1])
    if name not in COMMANDS:
        problem = f"command {name!r} is unknown" if name else "a command is missing"
        sys.exit(print_error(UserError(f"{problem}; expected one of {', '.join(COMMANDS)}; usage: {USAGE}")))
    sys.argv[:] = [f"simplest-vit {name}", *arguments[1:]]
    try:
        command = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        sys.exit(print_error(not_installed(error)))
    command.main()
