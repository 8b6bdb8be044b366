"""A run before its first step: model, optimizer, shapes and shardings of a config, its data and some devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.data.input_pipeline import steps_per_epoch
from simplest_vit.errors import UserError
from simplest_vit.models import attention
from simplest_vit.models.factory import model_arguments
from simplest_vit.models.layers import token_grid
from simplest_vit.models.reference_layout import pytorch_layout
from simplest_vit.models.simple_vit import SimpleViT
from simplest_vit.models.simplest_vit import SimplestViT
from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.optimizers.schedules import WarmupCosine
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.metrics import Sums
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.state import ModelState, TrainState, abstract_state, create_state, state_initializer
from simplest_vit.training.step import Batch, make_eval_step, make_train_step
from simplest_vit.training.workdir import read_run


@dataclasses.dataclass(frozen=True)
class Run:
    """What training, evaluation, prediction, interchange, analysis and benchmarks share; nothing is computed yet.

    Attributes:
      config: The config.
      data: What is known of the data; the examples are not needed.
      mesh: The devices.
      total_steps: Steps of the whole run.
      learning_rate: The schedule.
      tx: The optimizer.
      graphdef: The model.
      initialize: A pure function that makes the state at step 0, of some parameters by module or none.
      abstract: Shapes, dtypes and shardings of the state.
    """

    config: Any
    data: DatasetInfo
    mesh: Mesh
    total_steps: int
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    graphdef: nnx.GraphDef
    initialize: Callable[..., TrainState]
    abstract: TrainState

    def create_state(self, weights: dict[str, Any] | None = None) -> TrainState:
        """Compute the state at step 0 on the devices, with parameters by module (consumed) in place of its own."""
        return create_state(self.initialize, self.abstract, weights)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
        """The jitted training step: see `make_train_step`."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return make_train_step(self.graphdef, self.tx, self.config, shardings)

    @functools.cached_property
    def eval_step(self) -> Callable[[Any, Any, Batch], Sums]:
        """The jitted evaluation step: see `make_eval_step`."""
        return make_eval_step(self.graphdef, self.mesh)

    def model(self, state: ModelState) -> SimplestViT | SimpleViT:
        """The model itself."""
        return nnx.merge(self.graphdef, state.params, state.constants)

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step >= self.total_steps or step % self.config.checkpoint_every == 0

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is due after this step."""
        return self.is_saved(step) or step % self.config.eval_every == 0

    def next_event(self, step: int) -> int:
        """The first step after this one that is reported, evaluated or saved."""
        every = (self.config.log_every, self.config.eval_every, self.config.checkpoint_every)
        return min(self.total_steps, *((step // n + 1) * n for n in every))


def reference_layout(config: Any) -> Callable[[Any], Any]:
    """Return the function from parameters to their layout in PyTorch, which Shampoo's reference preset sees.

    Raises:
      UserError: If that preset is chosen for an attention without such a layout.
    """
    if config.optimizer.get("preset") == "reference" and config.model.attention == "value_skipinit":
        raise UserError(
            "config.optimizer.preset='reference' has no layout for model.attention='value_skipinit'; choose another "
            "of them"
        )
    return functools.partial(pytorch_layout, model=config.model.name, patch_size=config.model.patch_size)


def build(config: Any, data: DatasetInfo, mesh: Mesh | None = None) -> Run:
    """Construct a run; there is no other way to one.

    Args:
      config: A checked config.
      data: What is known of the data.
      mesh: The devices; None for one.

    Returns:
      The run.

    Raises:
      UserError: If the config does not fit the data.
    """
    mesh = create_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    per_epoch = steps_per_epoch(data.train_size, config.batch_size)
    total_steps = config.steps or max(round(config.epochs * per_epoch), 1)
    if config.profile.first_step >= total_steps:
        raise UserError(
            f"config.profile.first_step={config.profile.first_step} must be less than the run's {total_steps} steps"
        )
    learning_rate = WarmupCosine(config.optimizer.learning_rate, config.warmup_steps, total_steps)
    tx = create_optimizer(
        **{**config.optimizer, "learning_rate": learning_rate},
        grad_clip=config.grad_clip,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.decoupled_weight_decay,
        mesh=mesh,
        layout=reference_layout(config),
    )
    settings = config.copy_and_resolve_references()
    sizes = model_arguments(config.model, data.image_shape)
    settings.model.attention_kernel = attention.choose(
        config.model.attention_kernel,
        mesh.devices.flatten().tolist(),
        tokens=math.prod(token_grid(data.image_shape, sizes["patch_size"])),
        head_width=sizes["width"] // sizes["num_heads"],
    )
    graphdef, initialize = state_initializer(
        settings, image_shape=data.image_shape, num_classes=data.num_classes, tx=tx
    )
    return Run(
        config=config,
        data=data,
        mesh=mesh,
        total_steps=total_steps,
        learning_rate=learning_rate,
        tx=tx,
        graphdef=graphdef,
        initialize=initialize,
        abstract=abstract_state(initialize, mesh),
    )


def restore_best(workdir: str, config: Any = None, mesh: Mesh | None = None) -> tuple[Run, ModelState]:
    """Load the checkpoint with the highest validation accuracy, from a run's folder alone.

    Args:
      workdir: The folder; nothing is written to it.
      config: None for the run's own; another is refused.
      mesh: The devices; None for one.

    Returns:
      The run, whose model computes in float32, and what it is made of.

    Raises:
      UserError: If the folder holds no checkpoint, or one of another config.
    """
    path, config, data = read_run(workdir, config)
    config.compute_dtype = "float32"
    config.model.attention_kernel = "xla"  # on any device
    run = build(config, data, mesh)
    with Checkpoints(path, create=False) as checkpoints:
        return run, restore_model(run, checkpoints, checkpoints.best() or 0)


def restore_model(run: Run, checkpoints: Checkpoints, step: int) -> ModelState:
    """Load what a model is made of; what an optimizer left, perhaps of another version, is not read."""
    params = "params" if run.abstract.ema_params is None else "ema_params"
    part = {name: getattr(run.abstract, name) for name in ("step", "constants", params)}
    found, _ = checkpoints.restore(part, step)
    return ModelState(step=found["step"], params=found[params], constants=found["constants"])
