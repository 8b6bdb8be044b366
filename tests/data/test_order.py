"""The shuffled order: a permutation, different every epoch, alike on device and host, and random enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simplest_vit.data.order import shuffled


@settings(max_examples=50)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size, seed, epoch):
    order = shuffled(np.arange(size), size, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [1, 10, 1437, 50_000, 1_281_167])
def test_device_and_host_agree(size):
    position = np.arange(min(size, 5000))
    on_host = shuffled(position, size, 3407, 7)
    on_device = shuffled(jnp.asarray(position), size, jnp.uint32(3407), jnp.uint32(7))
    np.testing.assert_array_equal(on_host, on_device)


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [shuffled(np.arange(1000), 1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(first == second) < 0.01
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_pairs_of_neighbours_are_uniform():
    """Chi-squared over all ordered pairs of examples at two adjacent positions, 40 examples, 40,000 epochs."""
    size, epochs = 40, 40_000
    pairs = jax.jit(jax.vmap(lambda epoch: shuffled(jnp.arange(2), size, jnp.uint32(1), epoch)))(jnp.arange(epochs))
    first, second = np.asarray(pairs).T
    counts = np.zeros((size, size))
    np.add.at(counts, (first, second), 1)
    expected = len(first) / (size * (size - 1))
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    chi_squared = np.sum((off_diagonal - expected) ** 2 / expected)
    degrees = size * (size - 1) - 1
    assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)
    assert np.trace(counts) == 0


def test_on_a_gpu_it_is_no_loop():
    traced = jax.jit(lambda position: shuffled(position, 1000, 1, 2)).trace(jnp.arange(8, dtype=jnp.uint32))
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
