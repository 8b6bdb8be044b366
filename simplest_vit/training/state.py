"""The state of a run: everything that changes from step to step, as arrays and as plain numbers."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplest_vit.models.layers import Constant, all_gather_params
from simplest_vit.training.sharding import state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """The arrays of a model, for everything but training.

    Attributes:
      step: int32 [], batches seen.
      params: Nested dict of float32 parameters: their average if the run keeps one.
      constants: Nested dict of the model's constants.
    """

    step: jax.Array
    params: Any
    constants: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that training changes.

    Attributes:
      step: int32 [], batches seen.
      params: Nested dict of float32 parameters.
      constants: Nested dict of the model's constants, which are kept so that a checkpoint is a whole model.
      opt_state: State of the optax chain.
      ema_params: Exponential moving average of `params`, or None when it is off.
      skipped_steps: int32 [], steps whose loss or gradient was not finite; they changed nothing but `step`.
      skipped_in_a_row: int32 [], how many of them came after the last update.
    """

    step: jax.Array
    params: Any
    constants: Any
    opt_state: Any
    ema_params: Any
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def model_state(self) -> ModelState:
        """The part that is evaluated."""
        params = self.params if self.ema_params is None else self.ema_params
        return ModelState(self.step, params, self.constants)


@dataclasses.dataclass
class RunProgress:
    """What a resume needs beside the arrays; plain JSON.

    Attributes:
      last_evaluation: Step of the last evaluation that was completed; 0 for none.
      best_validation_accuracy: Over all evaluations; its weights are saved.
      pending_sums: Sums over the steps since the last report, so that an interruption leaves no gap between reports.
      wall_time_s: Of all processes that worked on the run one after the other.
    """

    last_evaluation: int = 0
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    best_validation_accuracy: float = 0.0
    train_loss: float | None = None
    train_accuracy: float | None = None
    pending_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    wall_time_s: float = 0.0

    def record_evaluation(self, step: int, result: dict[str, float]) -> bool:
        """Record an evaluation and return whether it is the best so far."""
        self.last_evaluation = step
        self.validation_loss, self.validation_accuracy = result["validation_loss"], result["validation_accuracy"]
        is_best = self.validation_accuracy >= self.best_validation_accuracy
        self.best_validation_accuracy = max(self.best_validation_accuracy, self.validation_accuracy)
        return is_best

    def record_training(self, scalars: dict[str, float]) -> None:
        """Record a report, which has no loss if every step was skipped."""
        self.train_loss = scalars.get("train_loss", self.train_loss)
        self.train_accuracy = scalars.get("train_accuracy", self.train_accuracy)

    def results(self) -> dict[str, float | None]:
        """Return what `results.json` takes over."""
        own = ("last_evaluation", "pending_sums")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in own}


def state_initializer(
    create: Callable[[nnx.Rngs], nnx.Module], tx: optax.GradientTransformation, *, seed: int, average: bool
) -> tuple[nnx.GraphDef, Callable[..., TrainState]]:
    """Describe model and state without computing anything.

    Args:
      create: Creates the model.
      tx: The optimizer.
      seed: Determines the initialization.
      average: Whether the state has an average of the parameters.

    Returns:
      The model's graph definition, and a pure function that makes the state at step 0. Its arguments are parameters by
      module, or None, which take the place of the model's own, and a seed in place of `seed`.

    Raises:
      UserError: If the arguments of the model do not fit.
    """

    def create_seeded(seed: Any = seed) -> nnx.Module:
        return create(nnx.Rngs(jax.random.key(seed)))

    def initialize(initial_params: dict[str, Any] | None = None, seed: Any = seed) -> TrainState:
        model = create_seeded(seed)
        params, constants = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Constant))
        params |= initial_params or {}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants=constants,
            opt_state=tx.init(params),
            ema_params=params if average else None,
            skipped_steps=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )

    return nnx.graphdef(nnx.eval_shape(create_seeded)), initialize


def abstract_state(initialize: Callable[..., TrainState], mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh."""
    shapes = jax.eval_shape(initialize)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def create_state(
    initialize: Callable[..., TrainState], abstract: TrainState, initial_params: dict[str, Any] | None = None
) -> TrainState:
    """Compute the state at step 0 on the devices that `abstract` names; `initial_params` are consumed."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(initialize, donate_argnums=0, out_shardings=shardings)(initial_params)


def apply_model(
    graphdef: nnx.GraphDef,
    params: Any,
    constants: Any,
    image: jax.Array,
    dropout_key: jax.Array | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Compute the logits of the model with the given parameters.

    Args:
      graphdef: The model.
      params: Its parameters.
      constants: Its constants.
      image: Images [B, H, W, C].
      dropout_key: Turns dropout on.
      mesh: Devices that share out the parameters; None for one.

    Returns:
      float32 [B, num_classes].
    """
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # Those of the blocks are gathered layer by layer.
        params = {name: tree if name == "blocks" else all_gather_params(tree) for name, tree in params.items()}
        return nnx.merge(graphdef, params, constants)(image, dropout_key=dropout_key)
