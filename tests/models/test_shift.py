"""The isometric network: offsets of heads, the matrices they give, and orthogonality of the whole in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from simplest_vit.models import initializers, layers, shift, simplest_vit
from tests.models import tiny

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(grid=GRIDS, depth=st.integers(1, 30), data=st.data())
def test_half_of_the_heads_stay_and_the_others_look_at_the_nearest_tokens(grid, depth, data):
    rows, columns = grid
    num_heads = data.draw(st.integers(1, rows * columns))
    moving = num_heads // 2
    offsets = shift.head_offsets(num_heads, grid, depth)
    assert offsets.shape == (depth, num_heads, 2)
    assert not offsets[:, : num_heads - moving].any()
    torus = sorted(min(y, rows - y) ** 2 + min(x, columns - x) ** 2 for y in range(rows) for x in range(columns))
    for block in offsets[:, num_heads - moving :]:
        assert len({(y % rows, x % columns) for y, x in block} - {(0, 0)}) == moving
        distances = np.sort((block**2).sum(axis=1))
        assert not moving or distances[-1] <= torus[moving]  # as near as so many can be, or in turn with those
    if moving:
        counts = np.unique(offsets[:, num_heads - moving :].reshape(-1, 2), axis=0, return_counts=True)[1]
        equally_far = torus.index(torus[moving]) + torus.count(torus[moving]) - 1
        assert len(counts) == min(equally_far, depth * moving)
        assert counts.max() - counts.min() <= 1  # in turn


def test_the_offsets_of_few_heads():
    four = {(0, -1), (0, 1), (-1, 0), (1, 0)}
    one, two, three, eight = (shift.head_offsets(2 * n, (8, 8), 4)[:, n:].tolist() for n in (1, 2, 3, 4))
    assert {tuple(offset) for (offset,) in one} == four
    assert all(np.sum(block, axis=0).tolist() == [0, 0] for block in two)  # opposite ones
    assert np.sum(three, axis=(0, 1)).tolist() == [0, 0]
    assert all({tuple(offset) for offset in block} == four for block in eight)
    with pytest.raises(ValueError, match="num_heads=7 must be at most the number of tokens, 2 x 3"):
        shift.head_offsets(7, (2, 3), 1)


@given(grid=GRIDS, eps=st.floats(0.001, 0.9), data=st.data())
def test_every_head_looks_its_offset_away(grid, eps, data):
    rows, columns = grid
    num_heads = data.draw(st.integers(1, min(rows * columns, 9)))
    matrices = shift.attention_matrices(num_heads, grid, eps, 3)
    np.testing.assert_allclose(softmax(shift.attention_bias(num_heads, grid, eps, 3), axis=-1), matrices, atol=1e-14)
    x = np.random.default_rng(0).normal(size=(rows, columns))
    for block, offsets in zip(matrices, shift.head_offsets(num_heads, grid, 3), strict=True):
        for matrix, (dy, dx) in zip(block, offsets, strict=True):
            moved = [[x[(i + dy) % rows, (j + dx) % columns] for j in range(columns)] for i in range(rows)]
            expected = (1 - eps) * np.asarray(moved) + eps * x.mean()
            np.testing.assert_allclose((matrix @ x.ravel()).reshape(grid), expected, atol=1e-12)


def jacobian(depth, eps, activation):
    """Of the blocks at random tokens, in float64 [T D, T D]."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(
            initializers,
            "_orthogonal",
            lambda key, shape, dtype, scale: jax.nn.initializers.orthogonal(scale)(key, shape, jnp.float64),
        )

        @jax.jit
        def compute():
            model = tiny.simplest_vit(
                attention="shift",
                shift_eps=eps,
                mlp="mirrored",
                activation=activation,
                init="isometric",
                depth=depth,
                width=8,
                mlp_dim=16,
                num_heads=4,
                dtype=jnp.float64,
            )
            x = 3 * jax.random.normal(jax.random.key(5), (1, 6, 8), jnp.float64)
            return jax.jacobian(lambda x: layers.scan(model.blocks, x))(x).reshape(48, 48)

        return np.asarray(compute())


@pytest.mark.parametrize(("depth", "activation"), [(12, "gelu"), (64, "gelu"), (2, "silu"), (2, "relu")])
def test_without_uniform_attention_the_network_is_an_isometry(depth, activation):
    values = np.linalg.svd(jacobian(depth, 0.0, activation), compute_uv=False)
    np.testing.assert_allclose(values, 1, atol=1e-5)


def test_uniform_attention_shrinks_all_but_the_mean_over_tokens():
    """Singular values 1, D of them, and (1 - eps)^L."""
    values = np.linalg.svd(jacobian(12, 0.05, "gelu"), compute_uv=False)
    np.testing.assert_allclose(values, [1.0] * 8 + [0.95**12] * 40, atol=1e-5)


@pytest.mark.parametrize("name", simplest_vit.MLPS["mirrored"])
def test_the_mirrored_mlp_is_orthogonal_and_its_units_are_there(name):
    """At initialization linear and orthogonal; off it, the units do what any MLP's do."""
    mlp = simplest_vit.MirroredMLP(8, 20, simplest_vit._MIRRORED[name], dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(1, 50, 8)).astype(np.float32) * 4
    y = np.asarray(mlp(jnp.asarray(x)))
    np.testing.assert_allclose(y @ y.swapaxes(1, 2), x @ x.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(mlp(jnp.asarray(2 * x))), 2 * y, rtol=1e-4, atol=1e-4)
    mlp.dense1.bias[...] = jnp.linspace(-1, 1, 20)
    assert np.abs(np.asarray(mlp(jnp.asarray(2 * x))) - 2 * np.asarray(mlp(jnp.asarray(x)))).max() > 0.1


def test_unit_and_mirror_part_at_the_first_step():
    model = tiny.simplest_vit(attention="shift", mlp="mirrored", activation="gelu", init="isometric", mlp_dim=32)
    graphdef, params, constants = tiny.split(model)
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: nnx.merge(graphdef, p, constants)(image)[:, 0].sum())(params)

    kernel = np.asarray(gradient(params)["blocks"]["mlp"]["dense1"]["kernel"])
    unit, mirror = np.split(kernel, 2, axis=-1)
    assert np.abs(unit + mirror).max() > 0.1 * np.abs(unit).max()
