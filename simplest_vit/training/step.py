"""The two jitted functions of a run: a training step and an evaluation step. Pure, one trace each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from simplest_vit.data.augment import Batch
from simplest_vit.optimizers.sam import sam
from simplest_vit.optimizers.shampoo import shampoo_metrics
from simplest_vit.training.metrics import Sums, classification_sums
from simplest_vit.training.sharding import replicated
from simplest_vit.training.state import TrainState, apply_model

# Sets dropout's keys apart from those of augmentation, which are the seed's by the step: no step has this number.
_DROPOUT = 2**32 - 1


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: Any, shardings: Any = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Compile-once training step.

    Args:
      graphdef: The model.
      tx: The optimizer.
      config: Reads `seed`, `label_smoothing`, `accumulation_steps`, `sam` and `ema`.
      shardings: From `state_shardings`, so that a state comes out as it went in; None on one device.

    Returns:
      A jitted function of the state, which it consumes, and a batch. It returns the new state and metrics: the sums of
      `classification_sums` over the batch, `grad_norm` before clipping, the state's counts of skipped steps, and the
      metrics of Shampoo or SOAP. Where loss or gradient are not finite, the step is skipped: the sums are 0, and of the
      state only `step` and the counts change.
    """
    mesh = None if shardings is None else shardings.step.mesh

    def loss(params: Any, constants: Any, batch: Batch, dropout_key: jax.Array) -> tuple[jax.Array, Sums]:
        logits = apply_model(graphdef, params, constants, batch["image"], dropout_key, mesh=mesh)
        sums = classification_sums(logits, batch["label"], batch["weight"], config.label_smoothing)
        return sums["loss"], sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        dropout_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _DROPOUT), state.step)

        def gradient(params: Any) -> tuple[Sums, Any]:
            """Sums over the batch and the gradient of the mean loss."""

            def of_part(part: Batch, key: jax.Array) -> tuple[Sums, Any]:
                gradient, sums = jax.grad(loss, has_aux=True)(params, state.constants, part, key)
                return sums, gradient

            if config.accumulation_steps == 1:
                sums, total = of_part(batch, dropout_key)
            else:
                parts = _split(batch, config.accumulation_steps)
                keys = jax.random.split(dropout_key, config.accumulation_steps)
                first = jax.tree.map(lambda x: x[0], (parts, keys))
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, *first))

                def add(carry: Any, part: Any) -> tuple[Any, None]:
                    return jax.tree.map(jnp.add, carry, of_part(*part)), None

                (sums, total), _ = jax.lax.scan(add, zeros, (parts, keys))
            return sums, jax.tree.map(lambda g: g / sums["count"], total)

        if config.sam.rho:
            sums, updates = sam(gradient, config.sam.rho, config.sam.every, state.step)(state.params)
        else:
            sums, updates = gradient(state.params)
        grad_norm = optax.tree.norm(updates)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(updates, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        ema_params = state.ema_params
        if ema_params is not None:
            rate = jnp.where(step % config.ema.every == 0, 1.0 - config.ema.decay, 0.0)
            ema_params = optax.incremental_update(params, ema_params, rate)
        # Loss and gradient are sums over all devices, so all decide alike; XLA fuses the choice into the update.
        params, opt_state, ema_params = optax.tree.where(
            finite, (params, opt_state, ema_params), (state.params, state.opt_state, state.ema_params)
        )
        new_state = TrainState(
            step=step,
            params=params,
            constants=state.constants,
            opt_state=opt_state,
            ema_params=ema_params,
            skipped_steps=state.skipped_steps + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            **jax.tree.map(lambda x: jnp.where(finite, x, 0.0), sums),
            "grad_norm": grad_norm,
            "skipped_steps": new_state.skipped_steps,
            "skipped_in_a_row": new_state.skipped_in_a_row,
            **shampoo_metrics(opt_state),
        }
        return new_state, metrics

    # Metrics are whole on every device, so that each process can read them.
    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def _split(batch: Batch, parts: int) -> Batch:
    """Reshape [B, ...] to [parts, B / parts, ...]; every device splits its own share of the batch."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> Callable[[Any, Any, Batch], Sums]:
    """Jitted function of parameters, constants and a batch that returns `classification_sums`, without smoothing.

    Args:
      graphdef: The model.
      mesh: The devices; None for one.

    Returns:
      The function.
    """

    def eval_step(params: Any, constants: Any, batch: Batch) -> Sums:
        logits = apply_model(graphdef, params, constants, batch["image"], mesh=mesh)
        return classification_sums(logits, batch["label"], batch["weight"])

    return jax.jit(eval_step, out_shardings=None if mesh is None else replicated(mesh))
