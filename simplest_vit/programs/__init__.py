"""The program `simplest-vit`, or `python -m simplest_vit` where it is not installed: a module here for each command."""

import importlib
import sys

from simplest_vit.errors import UserError, not_installed, tell

COMMANDS = {
    "train": "train a model, or go on with the run in --workdir",
    "evaluate": "evaluate the checkpoints of a run",
    "predict": "classify images with the best checkpoint of a run",
    "prepare": "prepare a data set ahead of time",
    "preview": "draw augmented training images",
    "sweep": "train a grid of configs over seeds",
    "report": "set finished runs beside the reference's results",
}
USAGE = "simplest-vit COMMAND --flags; simplest-vit COMMAND --help tells them"


def main() -> None:
    """Run the command that is named first on the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("help", "--help", "-h"):
        print(f"{USAGE}\n\n" + "\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items()))
        return
    if name not in COMMANDS:
        problem = f"command {name!r} is unknown" if name else "a command is missing"
        sys.exit(tell(UserError(f"{problem}; expected one of {', '.join(COMMANDS)}; usage: {USAGE}")))
    sys.argv[:2] = [f"simplest-vit {name}"]
    try:
        program = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        sys.exit(tell(not_installed(error)))
    program.main()
