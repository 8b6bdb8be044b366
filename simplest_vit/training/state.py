"""The state of a run: everything that changes from step to step, and nothing else."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplest_vit.models.factory import create_model
from simplest_vit.models.layers import Constant, gather
from simplest_vit.training.sharding import state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """What a model is made of, wherever nothing is trained.

    Attributes:
      step: int32 [], batches seen.
      params: Nested dict of float32 parameters: the average where the run has one.
      constants: Nested dict of the model's constants.
    """

    step: jax.Array
    params: Any
    constants: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree of arrays.

    Attributes:
      step: int32 [], batches seen.
      params: Nested dict of float32 parameters.
      constants: Nested dict of the model's constants, which are kept so that a checkpoint is a whole model.
      opt_state: State of the optax chain.
      ema_params: Exponential moving average of `params`, or None when it is off.
      skipped_steps: int32 [], steps whose loss or gradient was not finite, so that they changed nothing but `step`.
      skipped_in_a_row: int32 [], those among them since the last update.
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
        """What of it is evaluated."""
        params = self.params if self.ema_params is None else self.ema_params
        return ModelState(self.step, params, self.constants)


def state_initializer(
    config: Any, *, image_shape: tuple[int, int, int], num_classes: int, tx: optax.GradientTransformation
) -> tuple[nnx.GraphDef, Callable[..., TrainState]]:
    """Describe model and state without computing anything.

    Args:
      config: The run's config; reads `model`, `compute_dtype`, `seed` and `ema`.
      image_shape: Height, width and channels.
      num_classes: Number of classes.
      tx: The optimizer.

    Returns:
      The model's graph definition, and a pure function that makes the state at step 0 out of parameters by module that
      take the place of the model's own, or None, and a seed in place of `config.seed`, if it is given.

    Raises:
      UserError: If `config.model` does not describe a model.
    """

    def create(seed: Any = config.seed) -> Any:
        return create_model(
            config.model,
            image_shape=image_shape,
            num_classes=num_classes,
            dtype=jnp.dtype(config.compute_dtype),
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    def initialize(weights: dict[str, Any] | None = None, seed: Any = config.seed) -> TrainState:
        model = create(seed)
        params, constants = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Constant))
        params |= weights or {}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants=constants,
            opt_state=tx.init(params),
            ema_params=params if config.ema.decay else None,
            skipped_steps=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )

    return nnx.graphdef(nnx.eval_shape(create)), initialize


def abstract_state(initialize: Callable[..., TrainState], mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh."""
    shapes = jax.eval_shape(initialize)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def create_state(
    initialize: Callable[..., TrainState], abstract: TrainState, weights: dict[str, Any] | None = None
) -> TrainState:
    """Compute the state at step 0 on the devices that `abstract` names; `weights` are consumed."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(initialize, donate_argnums=0, out_shardings=shardings)(weights)


def apply_model(
    graphdef: nnx.GraphDef,
    params: Any,
    constants: Any,
    image: jax.Array,
    dropout_key: jax.Array | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Logits of the model with the given parameters.

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
        params = {name: tree if name == "blocks" else gather(tree) for name, tree in params.items()}
        return nnx.merge(graphdef, params, constants)(image, dropout_key=dropout_key)
