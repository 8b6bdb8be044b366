import jax
import numpy as np
import pytest
from flax import nnx

from simplest_vit.models import create_model, initializers


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


def test_mimetic_products_are_noisy_identities():
    """The definition of arXiv 2305.09828, by float64 NumPy, from the kernels of a network."""
    attention = create_model(
        "simple_vit", init="mimetic", image_shape=(8, 8, 3), num_classes=2, variant="Ti/4", depth=2, rngs=nnx.Rngs(0)
    ).blocks.attention
    value, out, query, key = (
        np.asarray(layer.kernel[...], np.float64)
        for layer in (attention.value, attention.out, attention.query, attention.key)
    )
    noise = value @ out / 0.4 + np.eye(192)  # Z of both blocks
    np.testing.assert_allclose(noise.std(axis=(1, 2)), 192**-0.5, rtol=0.03)
    assert np.abs(np.trace(noise, axis1=1, axis2=2)).max() < 4  # the sum of 192 entries has a deviation of 1

    heads = [kernel.reshape(2, 192, 3, 64) for kernel in (query, key)]
    products = np.einsum("lihr,ljhr->lhij", *heads).reshape(6, 192, 192)
    # Of 0.7 (Z + I), 64 of 192 singular values remain: those of another such matrix, up to fluctuations.
    another = np.random.default_rng(0).normal(size=(192, 192)) / 192**0.5 + np.eye(192)
    expected = 0.7 * np.linalg.svd(another, compute_uv=False)[:64]
    for product in products:
        scales = np.linalg.svd(product, compute_uv=False)
        np.testing.assert_allclose(scales[:64], expected, rtol=0.06)
        assert scales[64] < 1e-5
        assert np.trace(product) > 0.3 * np.sum(scales)  # near the identity, not its opposite or a random matrix
    correlations = np.corrcoef([*products.reshape(6, -1), *noise.reshape(2, -1)])
    assert np.abs(correlations[np.triu_indices(8, 1)]).max() < 0.5  # heads and blocks differ
