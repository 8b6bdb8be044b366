r"""Import a checkpoint of the PyTorch reference as a run that you can evaluate, predict with or train further.

    simplest-vit import_reference --config configs/cifar10.py --workdir runs/reference \
        --config.model.attention=espa_reference --config.model.init=reference --checkpoint model1000.pth

Sizes, heads and eta come from the config and must match the checkpoint. PyTorch is not needed.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit import cli
from simplest_vit.data import input_pipeline
from simplest_vit.errors import UserError
from simplest_vit.interop import PthFile, from_reference
from simplest_vit.training.checkpoint import Checkpoints, has_checkpoint
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import build
from simplest_vit.training.state import RunProgress
from simplest_vit.training.workdir import check_workdir, lock_workdir

log = logging.getLogger("simplest_vit")

# A run that has a checkpoint has made at least one step; training continues with the second.
_STEP = 1


def import_reference(config: Any, workdir: str, path: str) -> None:
    """Write the model of a `.pth` file to `workdir` as a checkpoint, with a fresh optimizer.

    Args:
      workdir: A folder without a run, or with an interrupted import of this file.

    Raises:
      UserError: If the config does not fit, the file does not hold this model, or the folder holds a run; nothing is
        written then.
    """
    folder = check_workdir(workdir, config.to_dict())
    checkpoint = PthFile(path)
    run = build(config, input_pipeline.load(config.data).info)
    params, constants = from_reference(run, checkpoint)
    if has_checkpoint(folder):
        saved = restore_best(workdir)[1]
        if not jax.tree.all(jax.tree.map(np.array_equal, (saved.params, saved.constants), (params, constants))):
            raise UserError(f"--workdir={workdir} already holds another run; choose another folder")
        return  # an import that was stopped after its last step
    state = run.create_state(jax.device_put(params))
    if not jax.tree.all(jax.tree.map(functools.partial(np.allclose, atol=1e-3), state.constants, constants)):
        log.warning(
            "%s: the constants of its attention, which are used, are not those of config.model.attention with its "
            "gamma_max_depth or rho_max_depth; in a new --workdir, set these to what it was trained with",
            path,
        )
    state = dataclasses.replace(state, step=jnp.int32(_STEP), constants=jax.device_put(constants))
    # Not evaluated yet: any later checkpoint of this run counts as better.
    progress = RunProgress(last_evaluation=_STEP)
    with lock_workdir(folder, config.to_dict(), run.data), Checkpoints(folder, create=True) as checkpoints:
        checkpoints.save(state, progress, _STEP)


def main() -> None:
    """Run the command."""
    source = cli.define_path("checkpoint", None, "The .pth file of the PyTorch reference.")

    def program() -> None:
        import_reference(cli.CONFIG.value, str(cli.WORKDIR.value), str(source.value))
        print(f"{cli.WORKDIR.value}: imported; `simplest-vit evaluate` reports its accuracy")

    usage = "simplest-vit import_reference --config FILE --workdir FOLDER --checkpoint FILE.pth"
    cli.run(program, usage, required=("config", "workdir", "checkpoint"))
