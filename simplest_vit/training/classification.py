"""How good a classifier is: accuracy by class, confusion, and calibration, from sums over batches."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # of confidence, of equal width


@dataclasses.dataclass(frozen=True)
class Classification:
    """Sums over the images of a split, float64.

    Attributes:
      confusion: Images by their class and the predicted class, [K, K].
      in_top5: Images whose class is among the five most probable.
      bin_confidence: Sum of the predicted classes' probabilities by bin, [BINS].
      bin_correct: Correct predictions by bin, [BINS].
      bin_count: Images by bin, [BINS].
    """

    confusion: np.ndarray
    in_top5: float
    bin_confidence: np.ndarray
    bin_correct: np.ndarray
    bin_count: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of images whose class is predicted."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    @property
    def top5_accuracy(self) -> float:
        """The share of images whose class is among the five most probable."""
        return float(self.in_top5 / self.confusion.sum())

    @property
    def class_accuracy(self) -> np.ndarray:
        """Accuracy by class, [K]; NaN for a class without images."""
        images = self.confusion.sum(axis=1)
        return np.divide(np.diag(self.confusion), images, out=np.full(len(images), np.nan), where=images > 0)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (Guo et al., arXiv 1706.04599, equation 3)."""
        return float(np.abs(self.bin_correct - self.bin_confidence).sum() / self.bin_count.sum())


def confusion_sums(logits: jax.Array, label: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Compute the fields of `Classification` for one batch, in float32.

    Args:
      logits: float32 [B, K].
      label: One-hot, float32 [B, K].
      weight: float32 [B], 0 for padding.
    """
    target, predicted = label.argmax(axis=1), logits.argmax(axis=1)
    probability = jax.nn.softmax(logits).max(axis=1)
    # Classes tied with the true one do not push it out of the five.
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


def classification(sums: Sequence[Mapping[str, Any]]) -> Classification:
    """Add up the `confusion_sums` of all batches of a split, which may hold other sums as well."""
    total: dict[str, Any] = {
        field.name: np.sum([np.asarray(part[field.name], np.float64) for part in sums], axis=0)
        for field in dataclasses.fields(Classification)
    }
    return Classification(**total)
