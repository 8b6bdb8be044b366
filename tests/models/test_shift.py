"""The isometric network: offsets of heads, the matrices they give, and orthogonality of the whole in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from simplest_vit.models import initializers, layers, mlp, shift
from simplest_vit.models.attention_kinds import KINDS
from tests.models import tiny

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(grid=GRIDS, depth=st.integers(1, 30), in_place=st.sampled_from([0.01, 0.25, 0.5, 0.8, 0.9, 1.0]), data=st.data())
def test_some_heads_stay_and_the_others_look_at_the_nearest_tokens(grid, depth, in_place, data):
    rows, columns = grid
    num_heads = data.draw(st.integers(1, rows * columns))
    share = min((1 - in_place) * num_heads, rows * columns - 1)
    offsets = shift.head_offsets(num_heads, grid, depth, in_place)
    assert offsets.shape == (depth, num_heads, 2)
    moves = offsets.any(axis=-1)
    assert (np.diff(moves.astype(int), axis=1) >= 0).all()  # the last heads of a block
    moving = moves.sum(axis=1)
    assert (abs(np.cumsum(moving) - share * np.arange(1, depth + 1)) < 1).all()  # evenly over the blocks
    assert moving.max() - moving.min() <= 1
    if not moving.any():
        return
    torus = sorted(min(y, rows - y) ** 2 + min(x, columns - x) ** 2 for y in range(rows) for x in range(columns))
    farthest = torus[moving.max()]
    for block, number in zip(offsets, moving, strict=True):
        assert len({(y % rows, x % columns) for y, x in block} - {(0, 0)}) == number
        assert np.square(block).sum(axis=1).max() <= farthest
    counts = np.unique(offsets[moves], axis=0, return_counts=True)[1]
    as_near = sum(distance <= farthest for distance in torus) - 1
    assert len(counts) == min(as_near, moving.sum())
    assert counts.max() - counts.min() <= 1  # in turn


def test_the_offsets_of_few_heads():
    left, right, up, down = (0, -1), (0, 1), (-1, 0), (1, 0)
    four = [left, right, up, down]
    one, two, three = (shift.head_offsets(4 * n, (8, 8), 4)[:, 3 * n :].tolist() for n in (1, 2, 3))
    assert [tuple(offset) for (offset,) in one] == four
    assert [[tuple(offset) for offset in block] for block in two[:2]] == [four[:2], four[2:]]
    assert [[tuple(offset) for offset in block] for block in three[:2]] == [[left, right, up], [down, left, right]]
    assert shift.head_offsets(3, (8, 8), 5)[:, 2].tolist() == [[0, 0], [0, -1], [0, 1], [-1, 0], [0, 0]]
    for num_heads in (8, 16, 24):  # opposite ones are in the same block
        assert not shift.head_offsets(num_heads, (8, 8), 4).sum(axis=1).any()


@given(grid=GRIDS, eps=st.floats(0.001, 0.9), data=st.data())
def test_every_head_looks_its_offset_away(grid, eps, data):
    rows, columns = grid
    num_heads = data.draw(st.integers(1, min(rows * columns, 9)))
    offsets = shift.head_offsets(num_heads, grid, 3)
    matrices = shift.attention_matrices(shift.sources(offsets, grid), eps)
    bias = KINDS["shift"](uniform_fraction=eps).constants(grid, 3, num_heads)["attention_bias"]
    np.testing.assert_allclose(softmax(bias, axis=-1), matrices, atol=1e-14)
    x = np.random.default_rng(0).normal(size=(rows, columns))
    for block, block_offsets in zip(matrices, offsets, strict=True):
        for matrix, (dy, dx) in zip(block, block_offsets, strict=True):
            moved = [[x[(i + dy) % rows, (j + dx) % columns] for j in range(columns)] for i in range(rows)]
            expected = (1 - eps) * np.asarray(moved) + eps * x.mean()
            np.testing.assert_allclose((matrix @ x.ravel()).reshape(grid), expected, atol=1e-12)


def test_each_block_of_the_model_has_its_own_offsets():
    """Two heads, one of which moves in every second block: right in the fourth, up in the sixth."""
    model = tiny.vit("isometric_vit", uniform_fraction=0.2, depth=6)
    bias = np.asarray(model.blocks.attention.attention_bias[...])
    assert bias.shape == (6, 2, 6, 6)
    looked_at = bias.argmax(axis=-1)  # tokens 0 1 2 / 3 4 5
    np.testing.assert_array_equal(looked_at[:, 0], np.tile(np.arange(6), (6, 1)))
    np.testing.assert_array_equal(looked_at[3, 1], [1, 2, 0, 4, 5, 3])
    np.testing.assert_array_equal(looked_at[5, 1], [3, 4, 5, 0, 1, 2])


def jacobian(depth, eps, activation, name="isometric_vit"):
    """Of the blocks at random tokens, in float64 [T D, T D]."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(
            initializers,
            "_orthogonal",
            lambda key, shape, dtype, scale: jax.nn.initializers.orthogonal(scale)(key, shape, jnp.float64),
        )

        @jax.jit
        def compute():
            model = tiny.vit(
                name,
                uniform_fraction=eps,
                activation=activation,
                depth=depth,
                width=8,
                mlp_dim=16,
                num_heads=4,
                dtype=jnp.float64,
            )
            x = 3 * jax.random.normal(jax.random.key(5), (1, 6, 8), jnp.float64)
            return jax.jacobian(lambda x: layers.scan(model.blocks, x))(x).reshape(48, 48)

        return np.asarray(compute())


@pytest.mark.parametrize(
    ("name", "depth", "activation"),
    [("isometric_vit", 64, "gelu"), ("shift_mlp", 12, "gelu")],
)
def test_without_uniform_attention_the_network_is_an_isometry(name, depth, activation):
    values = np.linalg.svd(jacobian(depth, 1e-12, activation, name), compute_uv=False)  # 0 is refused
    np.testing.assert_allclose(values, 1, atol=1e-5)


def test_uniform_attention_shrinks_all_but_the_mean_over_tokens():
    """Singular values 1, D of them, and (1 - eps)^L."""
    values = np.linalg.svd(jacobian(12, 0.05, "gelu"), compute_uv=False)
    np.testing.assert_allclose(values, [1.0] * 8 + [0.95**12] * 40, atol=1e-5)


@pytest.mark.parametrize("name", mlp.LooksLinearMLP.activations)
def test_the_looks_linear_mlp_is_orthogonal_and_its_units_are_there(name):
    """At initialization linear and orthogonal; off it, the units do what any MLP's do."""
    layer = mlp.LooksLinearMLP(
        8,
        20,
        name,
        init=initializers.INITS["orthogonal"],
        norm="none",
        negative_slope=0.0,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    x = np.random.default_rng(1).normal(size=(1, 50, 8)).astype(np.float32) * 4
    y = np.asarray(layer(jnp.asarray(x)))
    np.testing.assert_allclose(y @ y.swapaxes(1, 2), x @ x.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
    assert abs((x * y).sum()) < 0.7 * (x * x).sum()  # a random orthogonal map, not the identity
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(2 * x))), 2 * y, rtol=1e-4, atol=1e-4)
    layer.dense1.bias[...] = jnp.linspace(-1, 1, 20)
    assert np.abs(np.asarray(layer(jnp.asarray(2 * x))) - 2 * np.asarray(layer(jnp.asarray(x)))).max() > 0.1


def test_unit_and_mirror_part_at_the_first_step():
    model = tiny.vit("isometric_vit")
    graphdef, params, constants = tiny.split(model)
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: nnx.merge(graphdef, p, constants)(image)[:, 0].sum())(params)

    kernel = np.asarray(gradient(params)["blocks"]["mlp"]["dense1"]["kernel"])
    unit, mirror = np.split(kernel, 2, axis=-1)
    assert np.abs(unit + mirror).max() > 0.1 * np.abs(unit).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fixed_shifts_are_their_matrices(dtype):
    """Output and gradient of the translation against products with [T, T] matrices in float64."""
    kind = KINDS["fixed_shift"](uniform_fraction=0.2, identity_head_fraction=0.25)
    source = kind.constants((2, 3), 3, 4)["source"]
    rng = np.random.default_rng(0)
    value, gradient = (jnp.asarray(rng.normal(size=(2, 6, 20)), dtype) for _ in range(2))
    for block, matrices in zip(source, kind.initial_matrix({"source": source}, 6), strict=True):
        output, pullback = jax.vjp(lambda v, block=block: kind.mix(v, None, 4, {"source": jnp.asarray(block)}), value)
        for ours, x, product in (
            (output, value, "hts,bshd->bthd"),
            (pullback(gradient)[0], gradient, "hst,bshd->bthd"),
        ):
            assert ours.dtype == dtype
            expected = np.einsum(product, matrices, np.float64(x).reshape(2, 6, 4, 5)).reshape(2, 6, 20)
            np.testing.assert_allclose(np.float64(ours), expected, atol=8 * float(jnp.finfo(dtype).eps))


def test_a_spatial_shift_is_a_fixed_shift_whose_values_are_the_tokens():
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    values, spatial = (tiny.vit("isometric_vit", attention=kind) for kind in ("fixed_shift", "spatial_shift"))
    params = nnx.to_pure_dict(nnx.state(values, nnx.Param))
    value = params["blocks"]["attention"].pop("value")
    own = nnx.to_pure_dict(nnx.state(spatial, nnx.Param))
    assert jax.tree.structure(own) == jax.tree.structure({**params, "blocks": {"mlp": params["blocks"]["mlp"]}})
    eye = jnp.broadcast_to(jnp.eye(value["kernel"].shape[-1]), value["kernel"].shape)
    identity = {"kernel": eye, "bias": jnp.zeros_like(value["bias"])}
    graphdef, _, constants = tiny.split(values)
    whole = own | {"blocks": own["blocks"] | {"attention": {"value": identity}}}
    np.testing.assert_allclose(nnx.merge(graphdef, whole, constants)(image), spatial(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["isometric_vit", "simple_vit"])
def test_a_fixed_shift_is_a_shift_whose_queries_stay_at_zero(name):
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    free, fixed = (tiny.vit(name, attention=kind, init="orthogonal") for kind in ("shift", "fixed_shift"))
    params = nnx.to_pure_dict(nnx.state(free, nnx.Param))
    for layer in ("query", "key"):
        del params["blocks"]["attention"][layer]
    graphdef, _, constants = tiny.split(fixed)
    np.testing.assert_allclose(nnx.merge(graphdef, params, constants)(image), free(image), rtol=1e-5, atol=1e-5)
