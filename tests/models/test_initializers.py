import jax
import numpy as np
import pytest

from simplest_vit.models import initializers


@pytest.mark.parametrize(
    ("shape", "paper", "reference"),
    [((384, 1536), 2.0, 1.0), ((1536, 384), 1.0, 2.0), ((384, 10), 1.0, 38.4**0.5), ((48, 48), 1.0, 1.0)],
)
def test_all_singular_values_are_the_scale(shape, paper, reference):
    for initializer, scale in (
        (initializers.scaled_uniform_orthogonal, paper),
        (initializers.reference_orthogonal, reference),
    ):
        kernel = initializer(jax.random.key(0), shape)
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), scale, rtol=1e-5)


def test_gaussian_fan_in_is_not_truncated():
    kernel = initializers.gaussian_fan_in(jax.random.key(0), (400, 400)) * 20
    assert np.std(kernel) == pytest.approx(1.0, rel=0.01)
    assert np.abs(kernel).max() > 3.5


def test_uniform_fan_in_bounds_kernels_and_biases_alike():
    for shape in ((100, 40), (40,)):
        array = np.asarray(initializers.uniform_fan_in(jax.random.key(0), shape, fan_in=100))
        assert np.abs(array).max() <= 0.1
        assert np.abs(array).max() > 0.08
