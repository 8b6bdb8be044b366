"""The tokens' kernels at initialization: samples of the network against the recursion of its infinitely wide limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplest_vit.models import espa, tat
from simplest_vit.models.attention import Attention
from simplest_vit.models.attention_kinds import KINDS
from simplest_vit.models.initializers import INITS
from tests.models import tiny


def kernel(x):
    """Mean products of tokens [..., T, D]: float64 [T, T], averaged over leading axes."""
    x = np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
    return np.einsum("btd,bsd->ts", x, x) / (x.shape[0] * x.shape[2])


def attention_matrices(grid, depth, form):
    """What the layers' constants make of attention: A_l, but for `espa_reference`."""
    row_scale, attention_bias = espa.shaped_attention(grid, depth, form=form)
    weights = np.exp(attention_bias)
    return row_scale[..., None] * weights / weights.sum(axis=-1, keepdims=True)


def recursion(first, matrices, slope):
    """Kernels after each block: K -> q * C(C(corr(A_l K A_l^T)))."""
    kernels = [first]
    for matrix in matrices:
        k = matrix @ kernels[-1] @ matrix.T
        scale = np.sqrt(np.outer(k.diagonal(), k.diagonal()))
        kernels.append(scale * tat.composed_c_map(k / scale, slope, 2))
    return kernels


@pytest.mark.parametrize("form", ["espa", "espa_2d"])
def test_attention_alone_gives_the_chosen_kernels(form):
    """From orthogonal tokens, over 64 seeds: the mean of K_l is Sigma_l, its error about sqrt(l / (64 * 128))."""
    grid, depth, width = (3, 4), 4, 128
    row_scale, bias = (jnp.float32(x) for x in espa.shaped_attention(grid, depth, form=form))

    @jax.jit
    @jax.vmap
    def tokens(key):
        x = jnp.eye(12, width)[None] * np.sqrt(width)
        outputs = []
        for layer in range(depth):
            rngs = nnx.Rngs(jax.random.fold_in(key, layer))
            constants = {"attention_bias": bias[layer], "row_scale": row_scale[layer]}
            attention = Attention(
                KINDS[form](),
                constants,
                width,
                4,
                init=INITS["espa_tat"],
                norm="none",
                output_projection=False,
                dtype=jnp.float32,
                rngs=rngs,
            )
            x = attention(x)
            outputs.append(x[0])
        return outputs

    expected = espa.kernel_matrices(grid, depth, form=form)[1:]
    for layer, output in enumerate(tokens(jax.random.split(jax.random.key(0), 64)), start=1):
        np.testing.assert_allclose(kernel(output), expected[layer - 1], atol=5 * np.sqrt(layer / (64 * width)))


def blocks_in_and_out(model, image):
    """Tokens before the first block and after each block."""
    x = model.embed(image)
    graphdef, state = nnx.split(model.blocks)

    def body(x, layer):
        x = nnx.merge(graphdef, layer)(x)
        return x, x

    return x, jax.lax.scan(body, x, nnx.as_pure(state))[1]


def test_network_follows_the_kernel_recursion():
    """At width 1024, for one image and one draw: correlations to 0.06, mean squares to 20 %, at every depth."""
    grid, depth = (3, 4), 3

    @jax.jit
    def tokens():
        model = tiny.vit(image_shape=(12, 16, 3), width=1024, mlp_dim=1024, depth=depth, rngs=nnx.Rngs(1))
        return blocks_in_and_out(model, jax.random.normal(jax.random.key(3), (1, 12, 16, 3)))

    first, outputs = tokens()
    slope = tat.solve_negative_slope(2 * depth, 0.5)
    expected = recursion(kernel(first), attention_matrices(grid, depth, "espa"), slope)
    for layer in range(1, depth + 1):
        sampled = kernel(outputs[layer - 1])
        q, expected_q = sampled.diagonal(), expected[layer].diagonal()
        np.testing.assert_allclose(q, expected_q, rtol=0.2)
        np.testing.assert_allclose(
            sampled / np.sqrt(np.outer(q, q)), expected[layer] / np.sqrt(np.outer(expected_q, expected_q)), atol=0.06
        )


def test_with_the_mlps_the_kernel_is_not_the_chosen_one():
    """T = 64, depth 12: the recursion ends at q = 7.9, 6.9 away from Sigma_L."""
    last = recursion(np.eye(64), attention_matrices((8, 8), 12, "espa"), tat.solve_negative_slope(24))[-1]
    assert last.diagonal().max() == pytest.approx(7.9, abs=0.01)
    assert np.abs(last - espa.kernel_matrices((8, 8), 12)[-1]).max() == pytest.approx(6.9, abs=0.05)


def test_the_reference_initialization_changes_the_size_of_the_signal_as_its_gains_say():
    """The MLP's two wrong scales cancel after the block, not between its layers; the head's does not."""

    @jax.jit
    def mean_squares():
        x = jax.random.normal(jax.random.key(0), (1, 512, 64))
        result = []
        for init in ("espa_tat", "reference"):
            model = tiny.vit(width=64, mlp_dim=256, num_classes=16, depth=2, c_val_0_target=0.4, init=init)
            graphdef, state = nnx.split(model.blocks)
            mlp = nnx.merge(graphdef, jax.tree.map(lambda array: array[0], state)).mlp
            hidden = mlp.dense1(x)
            result.append([jnp.mean(y**2) for y in (hidden, mlp.dense2(hidden), model.head(x))])
        return result

    paper, reference = np.array(mean_squares())
    np.testing.assert_allclose(paper, 1.0, rtol=0.1)
    np.testing.assert_allclose(reference / paper, [0.25, 1.0, 4.0], rtol=0.1)
