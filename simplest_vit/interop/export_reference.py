"""Writes the best checkpoint of a run as a `.pth` file that the PyTorch reference loads.

python -m simplest_vit.interop.export_reference --workdir runs/cifar10 --output model.pth
"""

import collections
import importlib.util
import os
import pathlib
from typing import Any

from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.interop.convert import to_reference
from simplest_vit.training.evaluate import restore_best


def export_reference(workdir: str, output: str, config: Any = None) -> None:
    """Write a file with the reference's `model_state_dict`: the parameters to evaluate and E-SPA's constants.

    Args:
      workdir: The run's folder, which is all that is needed.
      output: Replaced if it exists.
      config: None for the run's own; another is refused.

    Raises:
      UserError: If the config does not fit, the run has no checkpoint, the reference has no such model, PyTorch is
        missing, or the file cannot be written.
    """
    path = pathlib.Path(output)
    if path.is_dir():
        raise UserError(f"--output={output} is a folder; name a file")
    run, state = restore_best(workdir, config)
    if importlib.util.find_spec("torch") is None:
        raise UserError("writing a .pth file needs PyTorch; install it: pip install 'simplest-vit[torch]'")
    import torch

    arrays = to_reference(run.config.model, state)
    tensors = collections.OrderedDict((name, torch.from_numpy(array.copy())) for name, array in arrays.items())
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"step": int(state.step), "model_state_dict": tensors}, file)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}); choose another place") from error


def main() -> None:
    """Run as a program."""
    output = cli.define_path("output", None, "The .pth file to write.")

    def program(arguments: list[str]) -> None:
        del arguments
        export_reference(str(cli.WORKDIR.value), str(output.value), cli.CONFIG.value)
        print(output.value)

    usage = "python -m simplest_vit.interop.export_reference --workdir FOLDER --output FILE.pth"
    cli.run(program, usage, required=("workdir", "output"), optional=("config",))


if __name__ == "__main__":
    main()
