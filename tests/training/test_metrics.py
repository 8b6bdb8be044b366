import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.training.metrics import validation_line
from simplest_vit.training.step import classification_sums


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_equals_float64_numpy(label_smoothing):
    rng = np.random.default_rng(0)
    logits, label, weight = rng.normal(size=(5, 7)) * 10, rng.dirichlet(np.ones(7), size=5), rng.random(5)
    target = (1 - label_smoothing) * label + label_smoothing / 7
    expected = weight @ (np.log(np.exp(logits).sum(axis=1)) - (target * logits).sum(axis=1))
    actual = classification_sums(jnp.float32(logits), jnp.float32(label), jnp.float32(weight), label_smoothing)
    np.testing.assert_allclose(actual["loss"], expected, rtol=1e-5)


def test_padding_counts_for_nothing():
    logits = jnp.array([[5.0, 0.0], [0.0, 5.0], [9.0, 0.0]])
    label = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    sums = classification_sums(logits, label, jnp.array([1.0, 1.0, 0.0]))
    assert (sums["correct"], sums["count"]) == (1.0, 2.0)
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(-5)) + np.log1p(np.exp(5)), rtol=1e-6)


def test_a_mixed_label_counts_as_its_largest_class():
    sums = classification_sums(jnp.array([[0.0, 1.0]]), jnp.array([[0.4, 0.6]]), jnp.ones(1))
    assert sums["correct"] == 1.0


def test_the_line_of_an_evaluation_has_its_own_numbers_and_the_best():
    line = validation_line(7, {"validation_loss": 0.25, "validation_accuracy": 0.5}, 0.75)
    assert all(part in line for part in ("step 7 ", "loss 0.2500", "accuracy 50.00%", "best 75.00%"))
