"""The recipes, by name: `--config cifar10`, or `simplest_vit.recipes.cifar10.get_config()`.

`simplest_vit/recipes` is a link to `configs/`, so that the wheel holds them.
"""

import os
import pathlib

from simplest_vit.errors import UserError

_FOLDER = pathlib.Path(__file__).parent
NAMES = sorted({path.stem for path in _FOLDER.glob("*.py")} - {"__init__", "common"})


def locate(text: str, flag: str) -> str:
    """Replace the name of a recipe by its file: "cifar10:model=simple_vit" -> "/.../cifar10.py:model=simple_vit".

    Args:
      text: The name of a recipe, or the path of a file, with its arguments after a colon.
      flag: The flag that it was given for, which an error names.

    Raises:
      UserError: If the text is neither a name nor the path of a file.
    """
    name, colon, arguments = text.partition(":")
    if name in NAMES:
        return f"{_FOLDER / name}.py{colon}{arguments}"
    if os.path.exists(name):
        return text
    kind = "file" if name.endswith(".py") else "recipe"
    choices = ", ".join(NAMES)
    raise UserError(f"--{flag}={name}: there is no such {kind}; expected {choices}, or the path of a config file")
