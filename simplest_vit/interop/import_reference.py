r"""Turns a checkpoint of the PyTorch reference into a run of this project, to evaluate, predict and train on.

    python -m simplest_vit.interop.import_reference --config configs/cifar10.py --workdir runs/reference \
        --config.model.attention=espa_reference --config.model.init=reference --checkpoint model1000.pth

Sizes, heads and eta are those of the config; they must be what the checkpoint was trained with. PyTorch is not needed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplest_vit import cli
from simplest_vit.data import input_pipeline
from simplest_vit.errors import UserError
from simplest_vit.interop.convert import from_reference
from simplest_vit.interop.torch_file import Checkpoint
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.run import build
from simplest_vit.training.state import RunProgress, TrainState
from simplest_vit.training.workdir import check_workdir, lock_workdir

# Steps made, for a run that has a checkpoint has made some: training goes on with the second.
_STEP = 1


def import_reference(config: Any, workdir: str, path: str) -> None:
    """Write the model of a `.pth` file to `workdir` as a checkpoint, with a fresh optimizer.

    Args:
      config: The run's config.
      workdir: A folder without a run.
      path: The file.

    Raises:
      UserError: If the config does not fit, the file does not hold this model, or the folder holds a run; nothing is
        written then.
    """
    folder = check_workdir(workdir, config.to_dict())
    if (folder / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} already holds a run; choose another folder")
    source = Checkpoint(path)
    run = build(config, input_pipeline.load(config.data).info)
    params, constants = from_reference(config.model, run.abstract.model_state, source, run.data.image_shape)
    params, constants = jax.device_put((params, constants))
    state = TrainState(
        step=jnp.int32(_STEP),
        params=params,
        constants=constants,
        opt_state=jax.jit(run.tx.init)(params),
        ema_params=params if config.ema.decay else None,
        skipped_steps=jnp.int32(0),
        skipped_in_a_row=jnp.int32(0),
    )
    # Not evaluated yet: any later checkpoint of this run counts as better.
    progress = RunProgress(last_evaluation=_STEP)
    with lock_workdir(folder, config.to_dict(), run.data), Checkpoints(folder, create=True) as checkpoints:
        checkpoints.save(state, progress, _STEP)


def main() -> None:
    """Run as a program."""
    source = cli.define_path("checkpoint", None, "The .pth file of the PyTorch reference.")

    def program(arguments: list[str]) -> None:
        del arguments
        import_reference(cli.CONFIG.value, str(cli.WORKDIR.value), str(source.value))
        print(f"{cli.WORKDIR.value}: imported; main.py --mode evaluate tells its accuracy")

    usage = "python -m simplest_vit.interop.import_reference --config FILE --workdir FOLDER --checkpoint FILE.pth"
    cli.run(program, usage, required=("config", "workdir", "checkpoint"))


if __name__ == "__main__":
    main()
