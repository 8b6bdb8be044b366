"""Singular values by Lanczos' method against the Jacobian itself, decomposed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplest_vit.analysis.jacobian import jacobian_spectrum, merge_spectra
from simplest_vit.models import layers
from tests.models import tiny

IMAGE = jax.random.normal(jax.random.key(1), (1, 8, 12, 3))


def exact(model):
    graphdef, state = nnx.split(model)

    @jax.jit
    def jacobian(state):
        model = nnx.merge(graphdef, state)
        return jax.jacrev(lambda x: layers.scan(model.blocks, x))(model.embed(IMAGE))

    return np.asarray(jacobian(state), np.float64).reshape(96, 96)


def test_moments_of_the_spectrum_are_those_of_the_jacobian():
    """The quadrature is exact for its starts v: moments v^T (J^T J)^k v; and so is the greatest singular value."""
    model = tiny.vit("simple_vit")
    values, weights = jacobian_spectrum(model, IMAGE, seed=3)
    jacobian = exact(model)
    starts = np.stack([jax.random.normal(key, (96,)) for key in jax.random.split(jax.random.key(3), 4)], axis=1)
    starts = starts / np.linalg.norm(starts, axis=0)
    for power in range(4):
        moment = np.mean(np.sum(starts * (np.linalg.matrix_power(jacobian.T @ jacobian, power) @ starts), axis=0))
        assert (weights * values ** (2 * power)).sum() == pytest.approx(moment, rel=1e-3)
    np.testing.assert_array_equal(values, np.sort(values))
    assert values[-1] == pytest.approx(np.linalg.norm(jacobian, 2), rel=1e-3)


def test_an_isometry_has_all_its_weight_at_one_and_at_its_decay():
    """1 for the mean over the 6 tokens, a sixth of directions; (1 - eps)^3 for the rest."""
    values, weights = jacobian_spectrum(tiny.vit("isometric_vit", uniform_fraction=0.2), IMAGE)
    seen = weights > 1e-6
    near = np.minimum(np.abs(values - 1), np.abs(values - 0.8**3))
    assert near[seen].max() < 1e-4
    assert weights[np.abs(values - 1) < 1e-3].sum() == pytest.approx(1 / 6, abs=0.1)
    assert jnp.isfinite(values).all()


def test_spectra_are_pooled_by_equal_weight():
    values, weights = merge_spectra([(np.array([1.0, 3.0]), np.array([0.5, 0.5])), (np.array([2.0]), np.array([1.0]))])
    np.testing.assert_array_equal(values, [1, 2, 3])
    np.testing.assert_array_equal(weights, [0.25, 0.5, 0.25])
