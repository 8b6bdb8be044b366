"""How good a classifier is: accuracy by class, confusion, and calibration, from sums over batches."""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit.data.augment import Batch

BINS = 15  # of confidence, of equal width


@dataclasses.dataclass(frozen=True)
class Classification:
    """Sums over the images of a split, float64.

    Attributes:
      confusion: Images by their class and the predicted class, [K, K].
      in_top5: Images whose class is among the five most probable.
      confidence: Sum of the predicted classes' probabilities by bin, [BINS].
      correct: Correct predictions by bin, [BINS].
      count: Images by bin, [BINS].
    """

    confusion: np.ndarray
    in_top5: float
    confidence: np.ndarray
    correct: np.ndarray
    count: np.ndarray

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
        return float(np.abs(self.correct - self.confidence).sum() / self.count.sum())

    def summary(self) -> dict[str, float]:
        """Return accuracy, top-5 accuracy and calibration error by name."""
        return {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "calibration_error": self.calibration_error,
        }


@functools.partial(jax.jit, static_argnames="num_classes")
def batch_sums(logits: jax.Array, label: jax.Array, weight: jax.Array, *, num_classes: int) -> dict[str, jax.Array]:
    """Compute the sums of one batch.

    Args:
      logits: float32 [B, K].
      label: One-hot, float32 [B, K].
      weight: float32 [B], 0 for padding.
      num_classes: K.

    Returns:
      The fields of `Classification` in float32.
    """
    target, predicted = label.argmax(axis=1), logits.argmax(axis=1)
    probability = jax.nn.softmax(logits).max(axis=1)
    # Ties with the true class count against it, as in a sort that places it last.
    rank = jnp.sum(logits > jnp.take_along_axis(logits, target[:, None], axis=1), axis=1)
    bins = jnp.clip(jnp.ceil(probability * BINS).astype(jnp.int32) - 1, 0, BINS - 1)

    def by_bin(values: jax.Array) -> jax.Array:
        return jnp.zeros(BINS).at[bins].add(weight * values)

    return {
        "confusion": jnp.zeros((num_classes, num_classes)).at[target, predicted].add(weight),
        "in_top5": jnp.sum(weight * (rank < 5)),
        "confidence": by_bin(probability),
        "correct": by_bin((target == predicted).astype(jnp.float32)),
        "count": by_bin(jnp.ones_like(probability)),
    }


def classify(logits_of: Any, batches: Iterable[Batch], num_classes: int) -> Classification:
    """Sum over a split.

    Args:
      logits_of: From normalized images [B, H, W, C] to logits [B, K].
      batches: From `eval_batches`.
      num_classes: K.
    """
    total: dict[str, Any] = {}
    for batch in batches:
        sums = batch_sums(logits_of(batch["image"]), batch["label"], batch["weight"], num_classes=num_classes)
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return Classification(**total)


def write_classification(result: Classification, class_names: Sequence[str], folder: pathlib.Path) -> None:
    """Write `classes.csv`, `confusion.csv` and `confusion.png` (with names for up to 50 classes) to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    images = result.confusion.sum(axis=1)
    with (folder / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "accuracy"])
        for name, count, accuracy in zip(class_names, images, result.class_accuracy, strict=True):
            writer.writerow([name, int(count), "" if np.isnan(accuracy) else f"{accuracy:.4f}"])
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class \\ predicted", *class_names])
        writer.writerows([name, *map(int, row)] for name, row in zip(class_names, result.confusion, strict=True))
    _draw_confusion(result, class_names, folder / "confusion")


def _draw_confusion(result: Classification, class_names: Sequence[str], path: pathlib.Path) -> None:
    from simplest_vit.analysis import figures  # imported here because matplotlib takes a second to import

    with figures.style():
        figure = figures.create(height=7.0)
        axes = figure.subplots()
        images = np.maximum(result.confusion.sum(axis=1, keepdims=True), 1)
        shown = axes.imshow(result.confusion / images, vmin=0, vmax=1, cmap="Blues")
        figure.colorbar(shown, ax=axes, label="share of the images of a class", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="class", title=f"accuracy {result.accuracy:.1%}")
        axes.grid(visible=False)
        if len(class_names) <= 50:
            names = [name.replace("$", r"\$") for name in class_names]  # matplotlib takes $...$ for a formula
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        figures.save(figure, path)
