import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from simplest_vit.models import PRESETS, attention, initializers, layers, mlp
from tests.models import attention_oracle as oracle
from tests.models import tiny
from tests.models.test_models import primitives


def test_patchify_takes_patches_and_pixels_in_raster_order():
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(layers.patchify(jnp.asarray(image), 2))
    assert patches.shape == (2, 6, 12)
    for token in range(6):
        row, column = divmod(token, 3)
        expected = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 12)
        np.testing.assert_array_equal(patches[:, token], expected)


def test_position_embedding_is_sin_cos_of_column_then_row():
    table = layers.sincos_position_embedding((2, 3), 16)
    assert table.shape == (6, 16)
    assert table.dtype == np.float32
    omega = np.array([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    row, column = 1, 2
    expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(expected), rtol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("bias", [None, 1, 3])
def test_attend_and_its_gradients_are_those_of_the_closed_form(bias, scaled):
    (query, key, value, gradient), bias, scale = oracle.inputs(0, 2, 5, 3, 4, bias=bias, scaled=scaled)
    expected = oracle.attention(query, key, value, 3, bias, scale, gradient)

    def attend(*qkv):
        return attention.attend(*qkv, 3, attention_bias=bias, row_scale=scale)

    result, pullback = jax.vjp(attend, *(jnp.float32(x) for x in (query, key, value)))
    for ours, theirs in zip((result, *pullback(jnp.float32(gradient))), (expected[0], *expected[1]), strict=True):
        assert oracle.relative_error(ours, theirs) < 1e-6


def test_the_backward_pass_of_bfloat16_attention_has_no_product_of_float32_operands():
    qkv = jnp.ones((3, 2, 5, 12), jnp.bfloat16)
    bias, scale = jnp.zeros((5, 5)), jnp.ones(5)
    jaxpr = jax.make_jaxpr(jax.grad(lambda qkv: attention.attend(*qkv, 3, bias, scale).sum().astype(jnp.float32)))(qkv)
    products = [e for e in primitives(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 6
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}


def test_masked_keys_get_no_weight_and_no_gradient():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.float32(x) for x in rng.normal(size=(3, 1, 4, 8)))
    bias = jnp.where(np.tri(4, dtype=bool), 0.0, -jnp.inf)

    def first_token(key, value):
        return attention.attend(query, key, value, 2, attention_bias=bias, row_scale=jnp.ones(4))[0, 0].sum()

    for gradient in jax.grad(first_token, argnums=(0, 1))(key, value):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[0, 1:] == 0).all()


def compiled_products(function, *arguments):
    """Return the instructions of the compiled program that are products."""
    program = jax.jit(function).lower(*arguments).compile().as_text()
    return [line for line in program.splitlines() if " dot(" in line]


def test_sums_over_queries_are_products_that_cpus_compute_fast():
    qkv = jnp.ones((3, 2, 16, 32))
    gradients = jax.value_and_grad(lambda qkv: jnp.square(attention.attend(*qkv, 4)).sum())
    batched = [line for line in compiled_products(gradients, qkv) if "_batch_dims={0,1}" in line]
    assert len(batched) == 6
    assert not any("lhs_contracting_dims={2}" in line for line in batched)


def test_the_gradient_of_a_tall_kernel_is_a_wide_product():
    x, kernel, gradient = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(9, 7), (7, 4), (9, 4)])
    )

    def dense(kernel, x):
        return layers.tall_dot_general(x, kernel, (((1,), (0,)), ((), ())))

    result, pullback = jax.vjp(dense, kernel, x)
    np.testing.assert_allclose(result, np.float64(x) @ np.float64(kernel), atol=1e-5)
    for found, expected in zip(pullback(gradient), [x.T @ gradient, gradient @ kernel.T], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    (product,) = compiled_products(
        lambda *arguments: jax.vjp(dense, *arguments[:2])[1](arguments[2])[0], kernel, x, gradient
    )
    assert " f32[4,7]" in product


def test_the_second_kernel_of_an_mlp_is_such_a_tall_one():
    settings = {"norm": "none", "negative_slope": 0.0, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    layer = mlp.PlainMLP(4, 6, "gelu", init=initializers.INITS["orthogonal"], **settings)
    graphdef, state = nnx.split(layer)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, jnp.ones((2, 5, 4)))
    assert str(program).count("= optimization_barrier") == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_exact(dtype):
    x = jnp.linspace(-8, 8, 2001).astype(dtype)
    result, pullback = jax.vjp(layers.gelu, x)
    assert result.dtype == dtype
    z = np.float64(x)
    rounding = jnp.finfo(dtype).eps / 2
    expected = z * norm.cdf(z)
    np.testing.assert_allclose(np.float64(result), expected, rtol=rounding, atol=1e-6)
    slope = norm.cdf(z) + z * norm.pdf(z)
    np.testing.assert_allclose(np.float64(pullback(jnp.ones_like(x))[0]), slope, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_activated_layer_keeps_its_product_alone(dtype):
    dense = nnx.Linear(4, 7, bias_init=nnx.initializers.normal(), dtype=dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    result, pullback = jax.vjp(lambda x: layers.dense_activation(x, dense, layers.gelu), x)
    assert result.dtype == dtype
    z = np.float64(x) @ np.float64(dense.kernel[...]) + np.float64(dense.bias[...])
    np.testing.assert_allclose(np.float64(result), z * norm.cdf(z), atol=3e-6 if dtype == jnp.float32 else 0.02)
    slope = norm.cdf(z) + z * norm.pdf(z)
    gradient = np.float64(pullback(jnp.ones_like(result))[0])
    np.testing.assert_allclose(
        gradient, slope @ np.float64(dense.kernel[...]).T, atol=3e-6 if dtype == jnp.float32 else 0.05
    )
    assert [leaf.dtype for leaf in jax.tree.leaves(pullback) if leaf.shape == (5, 7)] == [dtype]


@pytest.mark.parametrize("name", PRESETS)
def test_scan_equals_a_loop_over_the_blocks(name):
    blocks = tiny.vit(name).blocks
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    graphdef, state = nnx.split(blocks)
    apply = jax.jit(lambda layer, x: nnx.merge(graphdef, layer)(x))
    looped = x
    for layer in range(3):
        looped = apply(jax.tree.map(lambda array, layer=layer: array[layer], state), looped)
    np.testing.assert_allclose(layers.scan(blocks, x), looped, rtol=2e-5, atol=1e-6)


def test_layers_of_a_stack_differ():
    kernel = np.asarray(tiny.vit().blocks.mlp.dense1.kernel[...])
    assert kernel.shape == (3, 16, 32)
    assert not np.allclose(kernel[0], kernel[1])
