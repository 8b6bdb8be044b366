"""The recipes, by name: `--config cifar10`, or `from simplest_vit.recipes import cifar10; cifar10.get_config()`.

`simplest_vit/recipes` is a link to `configs/`, so that the wheel holds them.
"""

import importlib
import os
import pathlib

from ml_collections import ConfigDict

from simplest_vit.errors import UserError

NAMES = sorted({path.stem for path in pathlib.Path(__file__).parent.glob("*.py")} - {"__init__", "common"})


def find(text: str, flag: str) -> ConfigDict | None:
    """Return the config of a recipe by its name, such as "cifar10:model=simple_vit".

    Args:
      text: The name of a recipe, or the path of a file, with its arguments after a colon.
      flag: The name of the flag, for errors.

    Returns:
      The config, or None for the path of a file.

    Raises:
      UserError: If the text is neither the name of a recipe nor the path of a file.
    """
    name, _, arguments = text.partition(":")
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name}").get_config(arguments)
    if os.path.exists(name):
        return None
    kind = "file" if name.endswith(".py") else "recipe"
    choices = ", ".join(NAMES)
    raise UserError(f"--{flag}={name}: there is no such {kind}; expected {choices}, or the path of a config file")
