"""The two jitted functions of a run, a training and an evaluation step, and the sums that they return. Pure."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplest_vit.data.augment import Batch
from simplest_vit.models.layers import all_gather_params
from simplest_vit.optimizers.shampoo import shampoo_metrics
from simplest_vit.training.state import TrainState

# Separates the random keys of dropout from those of augmentation, which fold the step number into the seed; no step has
# this number.
_DROPOUT = 2**32 - 1
BINS = 15  # of confidence, of equal width

# `loss` and `correct` are sums over examples, `count` the sum of their weights; all float32 [].
Sums = dict[str, jax.Array]


def classification_sums(logits: jax.Array, label: jax.Array, weight: jax.Array, label_smoothing: float = 0.0) -> Sums:
    """Sum loss (softmax cross-entropy), correct predictions and weights over a batch.

    Args:
      logits: float32 [B, num_classes].
      label: float32 [B, num_classes], rows sum to 1; a mixed label counts as its largest class.
      weight: float32 [B], 0 for padding.
      label_smoothing: Share of the label that the loss spreads over all classes.
    """
    correct = (logits.argmax(axis=-1) == label.argmax(axis=-1)).astype(jnp.float32)
    loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(label, label_smoothing))
    return {"loss": jnp.sum(weight * loss), "correct": jnp.sum(weight * correct), "count": jnp.sum(weight)}


def confusion_sums(logits: jax.Array, label: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Compute the sums of an `Evaluation` for one batch, in float32.

    Args:
      logits: float32 [B, K].
      label: One-hot, float32 [B, K].
      weight: float32 [B], 0 for padding.
    """
    target, predicted = label.argmax(axis=1), logits.argmax(axis=1)
    probability = jax.nn.softmax(logits).max(axis=1)
    # Classes tied with the true class do not push it out of the top five.
    rank = jnp.sum(logits > jnp.take_along_axis(logits, target[:, None], axis=1), axis=1)
    bins = jnp.clip(jnp.ceil(probability * BINS).astype(jnp.int32) - 1, 0, BINS - 1)

    def by_bin(values: jax.Array) -> jax.Array:
        return jnp.zeros(BINS).at[bins].add(weight * values)

    return {
        "confusion": jnp.zeros((logits.shape[1], logits.shape[1])).at[target, predicted].add(weight),
        "in_top5": jnp.sum(weight * (rank < 5)),
        "bin_confidence": by_bin(probability),
        "bin_correct": by_bin((target == predicted).astype(jnp.float32)),
        "bin_count": by_bin(jnp.ones_like(probability)),
    }


def _apply_model(
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    params: Any,
    constants: Any,
    image: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Compute the logits of images [B, H, W, C] with the given parameters: float32 [B, num_classes].

    A `dropout_key` turns dropout on; the devices of `mesh` shard the parameters.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # The parameters of the blocks are gathered layer by layer.
        params = {name: tree if name == "blocks" else all_gather_params(tree) for name, tree in params.items()}
        return nnx.merge(graphdef, params, constants)(image, dropout_key=dropout_key)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    label_smoothing: float,
    accumulation_steps: int,
    sam: Any,
    ema: Any,
    shardings: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Create the training step.

    Args:
      seed: Determines the masks of dropout.
      accumulation_steps: Micro-batches in a step.
      sam: `config.sam`; so is `ema`.
      shardings: From `state_shardings`, so that the new state is sharded like the old one.

    Returns:
      A jitted function of the state, which it consumes, and a batch. It returns the new state and metrics: the sums of
      `classification_sums` over the batch, `grad_norm` before clipping, the state's counts of skipped steps, and the
      metrics of Shampoo or SOAP. If the loss or the gradient is not finite, the step is skipped: the sums are 0, and
      only `step` and the counts of the state change.
    """

    def loss(params: Any, constants: Any, batch: Batch, dropout_key: jax.Array) -> tuple[jax.Array, Sums]:
        logits = _apply_model(graphdef, shardings.step.mesh, params, constants, batch["image"], dropout_key)
        sums = classification_sums(logits, batch["label"], batch["weight"], label_smoothing)
        return sums["loss"], sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT), state.step)
        keys = jax.random.split(key, accumulation_steps) if accumulation_steps > 1 else key[None]  # of micro-batches

        # 1. The gradient of the mean loss; with SAM, at the worst point nearby.
        def mean_gradient(params: Any) -> tuple[Sums, Any]:
            def of_part(part: Batch, numbers: jax.Array) -> tuple[Sums, Any]:
                gradient, sums = jax.grad(loss, has_aux=True)(params, state.constants, part, keys[numbers[0]])
                return sums, gradient

            # One micro-batch at a time is in memory. Each takes every n-th example of the batch, so that every device
            # splits its own share.
            size = len(batch["weight"])
            part_size = size // accumulation_steps if accumulation_steps > 1 else None
            sum_of_parts = optax.microbatching.microbatch(of_part, argnums=(0, 1), microbatch_size=part_size)
            sums, total = sum_of_parts(batch, jnp.arange(size) % accumulation_steps)
            return sums, jax.tree.map(lambda g: g / sums["count"], total)

        at_worst_point = functools.partial(_gradient_at_worst_point, mean_gradient, sam.rho)
        if sam.rho and sam.every > 1:
            is_due = state.step % sam.every == 0
            sums, gradients = jax.lax.cond(is_due, at_worst_point, mean_gradient, state.params)
        else:
            sums, gradients = (at_worst_point if sam.rho else mean_gradient)(state.params)
        grad_norm = optax.tree.norm(gradients)

        # 2. The update, and the average of the parameters.
        step = state.step + 1
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            rate = jnp.where(step % ema.every == 0, 1.0 - ema.decay, 0.0)
            ema_params = optax.incremental_update(params, ema_params, rate)

        # 3. Skip the step if loss or gradient is not finite. Both are sums over all devices, so all devices decide
        # alike. XLA fuses the selection into the update.
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
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

    # Metrics are replicated, so that each process can read them.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _gradient_at_worst_point(gradient: Callable[[Any], tuple[Sums, Any]], rho: float, params: Any) -> tuple[Sums, Any]:
    """Take the gradient at params + rho * g / |g|, and the sums at params: SAM (Foret et al., arXiv 2010.01412)."""
    sums, gradients = gradient(params)
    scale = rho / (optax.tree.norm(gradients) + 1e-12)
    return sums, gradient(jax.tree.map(lambda p, g: p + scale * g, params, gradients))[1]


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh, *, detailed: bool = False) -> Callable[[Any, Any, Batch], Sums]:
    """Create a jitted function of parameters, constants and a batch that returns `classification_sums`, unsmoothed.

    If `detailed`, it returns `confusion_sums` as well.
    """

    def eval_step(params: Any, constants: Any, batch: Batch) -> Sums:
        logits = _apply_model(graphdef, mesh, params, constants, batch["image"])
        sums = classification_sums(logits, batch["label"], batch["weight"])
        return sums | confusion_sums(logits, batch["label"], batch["weight"]) if detailed else sums

    return jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))
