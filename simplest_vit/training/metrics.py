"""Loss and accuracy as sums and counts, so that parts add up to the whole whatever their sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# `loss` and `correct` are sums over examples, `count` the sum of their weights; all float32 [].
Sums = dict[str, jax.Array]


def cross_entropy(logits: jax.Array, label: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy to a distribution over classes.

    Args:
      logits: float32 [B, num_classes].
      label: float32 [B, num_classes], rows sum to 1.
      label_smoothing: Share of the label spread over all classes.

    Returns:
      float32 [B].
    """
    label = optax.smooth_labels(label, label_smoothing)
    return optax.softmax_cross_entropy(logits, label)


def classification_sums(logits: jax.Array, label: jax.Array, weight: jax.Array, label_smoothing: float = 0.0) -> Sums:
    """Sum loss, correct predictions and weights over a batch.

    Args:
      logits: float32 [B, num_classes].
      label: float32 [B, num_classes]; a mixed label counts as its largest class.
      weight: float32 [B], 0 for padding.
      label_smoothing: See `cross_entropy`.

    Returns:
      Sums.
    """
    correct = (logits.argmax(axis=-1) == label.argmax(axis=-1)).astype(jnp.float32)
    return {
        "loss": jnp.sum(weight * cross_entropy(logits, label, label_smoothing)),
        "correct": jnp.sum(weight * correct),
        "count": jnp.sum(weight),
    }


def mean_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean `loss` and `accuracy` over all examples of some sums, in float64 on the host."""
    loss, correct, count = (math.fsum(float(part[name]) for part in parts) for name in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count}
