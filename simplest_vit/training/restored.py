"""The model of a finished or running training, as its best checkpoint has it."""

from typing import Any

import jax
import optax
from flax import nnx

from simplest_vit.data.pipeline import Dataset
from simplest_vit.errors import UserError
from simplest_vit.models.factory import model_arguments
from simplest_vit.models.simple_vit import SimpleViT
from simplest_vit.models.simplest_vit import SimplestViT
from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.state import TrainState, abstract_state, state_initializer
from simplest_vit.training.workdir import check_workdir


def describe_state(config: Any, dataset: Dataset) -> tuple[nnx.GraphDef, TrainState]:
    """The model, computing in float32, and the shapes of a run's state, on one device; nothing is computed.

    Args:
      config: The run's config.
      dataset: Its data set.

    Returns:
      The model's graph definition and the abstract state.

    Raises:
      UserError: If the config does not fit.
    """
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    config.model.attention_kernel = "xla"  # on any device
    model_arguments(config.model, dataset.image_shape)
    tx = create_optimizer(config, optax.constant_schedule(0.0))  # the state has the same structure for any schedule
    graphdef, initialize = state_initializer(
        config, image_shape=dataset.image_shape, num_classes=dataset.num_classes, tx=tx
    )
    return graphdef, abstract_state(initialize, create_mesh(devices=jax.local_devices()[:1]))


def restore_best(config: Any, workdir: str, dataset: Dataset) -> tuple[SimplestViT | SimpleViT, TrainState]:
    """Load the checkpoint with the highest validation accuracy.

    Args:
      config: The run's config.
      workdir: The run's folder; nothing is written to it.
      dataset: The run's data set.

    Returns:
      The model with the parameters to evaluate (the average where there is one), and the whole state.

    Raises:
      UserError: If the folder holds no checkpoint, or one of another config.
    """
    path = check_workdir(workdir, config.to_dict())
    graphdef, abstract = describe_state(config, dataset)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir} holds no checkpoint; train there first, or name another folder")
    with Checkpoints(path, create=False) as checkpoints:
        step = checkpoints.best()
        if step is None:
            raise UserError(f"--workdir={workdir} holds no finished checkpoint; go on training there first")
        state, _ = checkpoints.restore(abstract, step)
    return nnx.merge(graphdef, state.eval_params, state.constants), state
