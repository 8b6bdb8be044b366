"""E-SPA against its defining equations, in float64 NumPy that shares no code with the module."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simplest_vit.models import espa

CONSISTENT_FORMS = ("espa", "espa_2d", "uspa")


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def realized(grid, depth, form="espa"):
    """The attention matrices that the layer's constants give in exact arithmetic."""
    row_scale, attention_bias = espa.shaped_attention(grid, depth, form=form)
    return row_scale[..., None] * softmax(attention_bias)


def exponential_kernels(num_tokens, depth, gamma_max_depth):
    alpha = np.sqrt(1 - np.exp(-2 * gamma_max_depth))
    distance = np.abs(np.subtract.outer(np.arange(num_tokens), np.arange(num_tokens)))
    gammas = [-0.5 * np.log(1 - alpha ** (2 * layer / depth)) for layer in range(1, depth + 1)]
    return np.stack([np.eye(num_tokens), *(np.exp(-gamma * distance) for gamma in gammas)])


def test_gamma_schedule_ends_at_the_target_and_shrinks_the_cholesky_diagonal_evenly():
    gamma = espa.gamma_schedule(12, 0.005)
    assert gamma[-1] == pytest.approx(0.005, rel=1e-12)
    assert (np.diff(gamma) < 0).all()
    diagonal = np.sqrt(1 - np.exp(-2 * gamma))
    np.testing.assert_allclose(diagonal[1:] / diagonal[:-1], diagonal[0], rtol=1e-12)


@pytest.mark.parametrize("gamma_max_depth", [1e-3, 0.005, 0.5])
def test_kernels_are_exponential(gamma_max_depth):
    kernels = espa.kernel_matrices((2, 5), 7, gamma_max_depth)
    np.testing.assert_allclose(kernels, exponential_kernels(10, 7, gamma_max_depth), rtol=1e-12)


@pytest.mark.parametrize("form", CONSISTENT_FORMS)
@pytest.mark.parametrize(("grid", "depth"), [((4, 4), 64), ((8, 8), 12), ((14, 14), 1), ((3, 7), 6)])
def test_attention_maps_each_kernel_to_the_next(grid, depth, form):
    matrices = espa.attention_matrices(grid, depth, form=form)
    kernels = espa.kernel_matrices(grid, depth, form=form)
    assert matrices.dtype == np.float64
    mapped = matrices @ kernels[:-1] @ matrices.swapaxes(1, 2)
    np.testing.assert_allclose(mapped, kernels[1:], atol=1e-11)


@pytest.mark.parametrize("form", CONSISTENT_FORMS)
@pytest.mark.parametrize(("grid", "depth"), [((4, 4), 1), ((4, 4), 64), ((8, 8), 12), ((14, 14), 12), ((16, 16), 64)])
def test_layer_constants_give_the_attention_matrix_in_float32(grid, depth, form):
    row_scale, attention_bias = (x.astype(np.float32) for x in espa.shaped_attention(grid, depth, form=form))
    result = row_scale[..., None] * np.asarray(jax.nn.softmax(attention_bias, axis=-1))
    assert np.abs(result - espa.attention_matrices(grid, depth, form=form)).max() <= 1e-6


@settings(max_examples=25)
@given(
    grid=st.tuples(st.integers(4, 8), st.integers(4, 8)),
    depth=st.integers(1, 64),
    gamma_max_depth=st.floats(1e-4, 10.0),
    form=st.sampled_from(CONSISTENT_FORMS),
)
def test_any_shape_depth_and_decay(grid, depth, gamma_max_depth, form):
    gamma_max_depth = 0.8 if form == "uspa" else gamma_max_depth
    row_scale, attention_bias = espa.shaped_attention(grid, depth, gamma_max_depth, form)
    result = row_scale[..., None] * softmax(attention_bias)
    kernels = espa.kernel_matrices(grid, depth, gamma_max_depth, form)
    np.testing.assert_allclose(result @ kernels[:-1] @ result.swapaxes(1, 2), kernels[1:], atol=1e-6)
    assert (row_scale > 0).all()


def test_2d_form_is_the_kronecker_product_of_rows_and_columns():
    rows, columns = 3, 5
    row, column = np.divmod(np.arange(rows * columns), columns)
    distance = np.abs(np.subtract.outer(row, row)) + np.abs(np.subtract.outer(column, column))
    gamma = espa.gamma_schedule(12, 0.005)
    kernels = espa.kernel_matrices((rows, columns), 12, form="espa_2d")
    np.testing.assert_allclose(kernels[1:], np.exp(-gamma[:, None, None] * distance), rtol=1e-12)
    matrices = espa.attention_matrices((rows, columns), 12, form="espa_2d")
    factors = [espa.attention_matrices((1, n), 12) for n in (rows, columns)]
    np.testing.assert_allclose(matrices, [np.kron(a, b) for a, b in zip(*factors, strict=True)], rtol=1e-12)
    assert (matrices > 0).all()


def test_uspa_closed_form():
    """1 1^T / T and its complement are the eigenspaces of every uniform kernel, so A_l = a I + (b - a) 1 1^T / T."""
    t, depth = 16, 12
    rho = np.concatenate([[0.0], espa.rho_schedule(depth, 0.8)])
    assert rho[-1] == pytest.approx(0.8)
    np.testing.assert_allclose((1 - rho[1:]) / (1 - rho[:-1]), 0.2 ** (1 / depth), rtol=1e-12)
    a = np.sqrt((1 - rho[1:]) / (1 - rho[:-1]))
    b = np.sqrt((1 - rho[1:] + t * rho[1:]) / (1 - rho[:-1] + t * rho[:-1]))
    expected = a[:, None, None] * np.eye(t) + ((b - a) / t)[:, None, None]
    np.testing.assert_allclose(espa.attention_matrices((4, 4), depth, 0.8, "uspa"), expected, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "depth", "deviation"), [(64, 12, 0.0575), (196, 12, 0.0575), (16, 6, 0.089)])
def test_the_reference_misses_the_attention_matrix_by_the_measured_amount(num_tokens, depth, deviation):
    missed = realized((1, num_tokens), depth, "espa_reference") - espa.attention_matrices((1, num_tokens), depth)
    assert np.abs(missed).max() == pytest.approx(deviation, rel=0.01)


def test_floor_bounds_the_bias():
    _, attention_bias = espa.shaped_attention((16, 16), 4)
    assert attention_bias.min() == pytest.approx(np.log(1e-12))


def test_result_is_cached_and_read_only():
    first, second = espa.shaped_attention((4, 4), 3), espa.shaped_attention((4, 4), 3)
    assert first[0] is second[0]
    assert not first[0].flags.writeable
    assert not first[1].flags.writeable
