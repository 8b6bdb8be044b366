"""The command that makes a run, found back from its config."""

import importlib
import itertools
import shlex
from typing import Any

from simplest_vit.config import METHODS, flatten

_NOT_TOLD = ("seed", "data.dir", "data.manual_dir")


def command(config: dict[str, Any]) -> str:
    """Name the config file, the arguments and the overrides that give a config.

    Args:
      config: Nested dicts, as in `results.json`.

    Returns:
      A shell command without seed, folders and workdir, or "" where `configs/` has no file for the data set.
    """
    flat = flatten(config)
    data = flat.get("data.name")
    try:
        get_config = importlib.import_module(f"configs.{data}").get_config
    except ImportError:
        return ""
    own = (f"model={flat.get('model.name')}",), (f"optimizer={flat.get('optimizer.name')}",)
    augmentations = ("augmentation=basic", "augmentation=strong", None)
    methods = (None, *(f"method={name}" for name in METHODS))
    choices = itertools.product(augmentations, *own, methods)
    found = []
    for choice in choices:
        arguments = ",".join(filter(None, choice))
        try:
            base = flatten(get_config(arguments).to_dict())
        except ValueError:  # not an argument of this file
            continue
        changed = [name for name in flat if flat[name] != base.get(name) and name not in _NOT_TOLD]
        overrides = [f"--config.{name}={flat[name]}" for name in changed]
        found.append(["python", "main.py", "--config", f"configs/{data}.py:{arguments}", *overrides])
    return min((shlex.join(words) for words in found), key=len, default="")
