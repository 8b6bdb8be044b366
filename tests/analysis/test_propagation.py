"""Signal propagation: measurement against the models, theory against samples, the reference's deviations in numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import softmax

from simplest_vit.analysis import propagation
from simplest_vit.commands.signal_propagation import initial_models
from simplest_vit.models import espa, tat
from simplest_vit.models.attention_kinds import KINDS
from simplest_vit.models.layers import Constant
from simplest_vit.training.run import build
from tests.models import tiny
from tests.models.test_signal_propagation import attention_matrices, recursion
from tests.tiny import DIGITS, tiny_config

IMAGE = jax.random.normal(jax.random.key(1), (3, 8, 12, 3))
LABEL = jax.nn.one_hot(jnp.array([1, 4, 0]), 5)
TARGET = espa.attention_matrices((2, 3), 3)[:, None]  # one for all heads


def create(name="simplest_vit", **overrides):
    """A tiny model, initialized in one compiled function."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: tiny.vit(name, **overrides)))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.to_pure_dict(nnx.state(tiny.vit(name, **overrides))))())


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_a_measurement_is_of_the_model_itself(name):
    """Norms of gradients against the model applied as a whole, off its initialization."""
    graphdef, params, rest = nnx.split(create(name), nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.float32(0.1) * rng.normal(size=x.shape).astype(np.float32), params)
    measured = propagation.measure_propagation(nnx.merge(graphdef, params, rest), IMAGE, LABEL, TARGET)

    @jax.jit
    def whole(params):
        def loss(params):
            return optax.softmax_cross_entropy(nnx.merge(graphdef, params, rest)(IMAGE), LABEL).mean()

        return nnx.to_pure_dict(jax.grad(loss)(params)), nnx.merge(graphdef, params, rest).embed(IMAGE)

    gradient, x = whole(params)
    np.testing.assert_allclose(measured["kernel"][0], propagation.token_kernel(np.asarray(x)), rtol=1e-4, atol=1e-5)
    squares = [np.sum(np.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradient["blocks"])]
    np.testing.assert_allclose(measured["parameter_gradient"], np.sqrt(sum(squares)), rtol=1e-4)
    # The embedding's bias is added to all 18 tokens: its gradient is the sum of theirs.
    bias_gradient = np.linalg.norm(gradient["patch_embedding"]["bias"])
    assert 0 < bias_gradient <= np.sqrt(18) * measured["token_gradient"][0]

    @jax.jit
    @jax.grad
    def by_tokens(moved):
        """By what would be added to the tokens before each block, and after the last one."""
        model = nnx.merge(graphdef, params, rest)
        block, state = nnx.split(model.blocks)
        tokens = x + moved[0]
        for layer in range(3):
            this = jax.tree.map(lambda a, layer=layer: a[layer], state)
            tokens = nnx.merge(block, this)(tokens) + moved[layer + 1]
        return optax.softmax_cross_entropy(model.head(model.pool(tokens)), LABEL).mean()

    gradients = np.reshape(by_tokens(jnp.zeros((4, *x.shape))), (4, -1))
    np.testing.assert_allclose(measured["token_gradient"], np.linalg.norm(gradients, axis=1), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("simplest_vit", kind) for kind in ("espa", "fixed_shift")),
        *(("simple_vit", kind) for kind in ("espa_2d", "uspa", "shift", "fixed_shift", "value_skipinit", "softmax")),
    ],
)
def test_the_attention_matrix_gives_the_output_of_the_layer(name, kind):
    """Off the initialization, with normalization and output projection and without."""
    x = jax.random.normal(jax.random.key(0), (3, 6, 16))

    @jax.jit
    def outputs(x):
        blocks = tiny.vit(name, attention=kind, depth=1, c_val_0_target=0.1).blocks
        graphdef, params, constants = tiny.split(blocks.attention)
        params = jax.tree.map(lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), params)
        attention = nnx.merge(graphdef, *jax.tree.map(lambda a: a[0], (params, constants)))
        values = attention.value(attention.norm(x)).reshape(3, 6, 2, 8)
        mixed = jnp.einsum("bhts,bshd->bthd", attention.matrix(x), values).reshape(3, 6, 16)
        return attention(x), mixed if attention.out is None else attention.out(mixed)

    whole, by_matrix = outputs(x)
    np.testing.assert_allclose(by_matrix, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_at_initialization_is_the_one_that_attention_starts_with(kind):
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))

    @jax.jit
    def computed():
        """Of attention alone: what else a model has is not even initialized."""
        model = tiny.vit(attention=kind)
        graphdef, state = nnx.split(model.blocks.attention)
        matrices = jax.vmap(lambda state: nnx.merge(graphdef, state).matrix(x))(state)
        return matrices[:, 0], nnx.to_pure_dict(nnx.state(model, Constant))

    matrices, constants = computed()
    model = nnx.eval_shape(lambda: tiny.vit(attention=kind))
    nnx.update(model, nnx.State(constants))
    initial = model.initial_attention()
    if initial is None:
        assert kind == "softmax"
    else:
        np.testing.assert_allclose(matrices, np.broadcast_to(initial, matrices.shape), atol=1e-6)


def test_attention_entropy_and_distance_in_closed_form():
    """Queries of zero: softmax attention is uniform, E-SPA's is A_l."""
    model = create(attention="softmax")
    model.blocks.attention.query.kernel[...] = jnp.zeros_like(model.blocks.attention.query.kernel[...])
    measured = propagation.measure_propagation(model, IMAGE, LABEL, np.full((3, 1, 6, 6), 1 / 6))
    np.testing.assert_allclose(measured["attention_entropy"], np.log(6), rtol=1e-5)
    np.testing.assert_allclose(measured["attention_distance"], 0, atol=1e-6)
    measured = propagation.measure_propagation(model, IMAGE, LABEL, TARGET)
    expected = np.linalg.norm(1 / 6 - TARGET[:, 0], axis=(1, 2)) / np.linalg.norm(TARGET[:, 0], axis=(1, 2))
    np.testing.assert_allclose(measured["attention_distance"], expected, rtol=1e-5)

    measured = propagation.measure_propagation(create(), IMAGE, LABEL, TARGET)
    probabilities = TARGET / TARGET.sum(axis=-1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=-1).mean(axis=(-2, -1))
    np.testing.assert_allclose(measured["attention_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(measured["attention_distance"], 0, atol=1e-5)


def test_entropy_is_that_of_rows():
    """A token of a corner attends otherwise than it is attended to: by columns the entropy differs by 6e-4."""
    measured = propagation.measure_propagation(create(attention="espa_2d"), IMAGE, LABEL, None)
    matrices = espa.attention_matrices((2, 3), 3, form="espa_2d")
    rows = matrices / matrices.sum(axis=-1, keepdims=True)
    entropy = -np.sum(rows * np.log(rows), axis=-1)
    np.testing.assert_allclose(measured["attention_entropy"], entropy.mean(axis=-1), rtol=1e-5)
    assert "attention_distance" not in measured


def test_weights_of_zero_add_no_entropy():
    measured = propagation.measure_propagation(create(attention="value_skipinit"), IMAGE, LABEL, None)
    np.testing.assert_allclose(measured["attention_entropy"], 0, atol=1e-6)


def test_cosines_are_those_of_an_image_and_the_next():
    """Three images of different sizes: what is behind an image is not what is before it."""
    tokens = np.random.default_rng(0).normal(size=(3, 4, 8)) * np.array([1.0, 10.0, 0.1])[:, None, None]
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    cosine = propagation.correlation(propagation.token_kernel(tokens))
    for image in range(3):
        np.testing.assert_allclose(cosine[0, image], unit[image] @ unit[image].T, atol=1e-12)
        np.testing.assert_allclose(cosine[1, image], unit[image] @ unit[(image + 1) % 3].T, atol=1e-12)


def test_any_seed_of_a_run_gives_the_models_of_that_run_in_float32():
    _, model = initial_models(tiny_config(compute_dtype="bfloat16"), DIGITS, [0, 2**32 - 1])
    assert jax.eval_shape(model.embed, jnp.zeros((1, 8, 8, 1))).dtype == jnp.float32
    expected = build(tiny_config(seed=2**32 - 1), DIGITS).create_state().params["head"]["kernel"]
    np.testing.assert_array_equal(model.head.kernel[...], expected)


def test_the_theory_of_an_image_is_the_recursion_that_samples_of_the_network_follow():
    """`tests/models/test_signal_propagation.py` compares that recursion with a network of width 1024."""
    kernels = propagation.theoretical_kernels(create(), IMAGE)[:, 0]
    for image in range(3):
        expected = recursion(kernels[0, image], attention_matrices((2, 3), 3, "espa"), tat.solve_negative_slope(6, 0.5))
        np.testing.assert_allclose(kernels[:, image], expected, rtol=1e-5)


def test_the_isometric_network_follows_its_recursion(monkeypatch):
    """One seed at width 256; images of which neighbouring pixels are alike, so that shifts and the mean show.

    A config that names the GPU's kernel is analysed by XLA's form, on any device.
    """
    monkeypatch.setattr(propagation, "jacobian_spectrum", lambda *_: (np.ones(1), np.ones(1)))
    config = tiny_config(
        model__depth=4,
        model__width=256,
        model__mlp_dim=512,
        model__num_heads=4,
        model__name="isometric_vit",
        model__uniform_fraction=0.1,
        model__attention_kernel="fused",
    )
    image = jnp.cumsum(jax.random.normal(jax.random.key(3), (4, 8, 8, 1)), axis=2)
    label = jax.nn.one_hot(jnp.arange(4), 10)
    (model,) = initial_models(config, DIGITS, [config.seed])
    result = propagation.analyse("isometric", [model], image, label)
    tokens = np.asarray(model.embed(image), np.float64)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    theory = propagation.correlation(propagation.theoretical_kernels(model, image))[0, 0]
    error = np.abs(unit @ unit.swapaxes(1, 2) - theory).max()
    np.testing.assert_allclose(result.measured["kernel_error"][0], error, rtol=1e-3)
    np.testing.assert_allclose(result.measured["attention_distance"][1:], 0, atol=1e-6)
    np.testing.assert_allclose(result.measured["mean_square"], result.theory["mean_square"], rtol=0.01)
    assert np.ptp(result.theory["image_cosine"]) > 0.1
    for quantity in ("token_cosine", "image_cosine"):
        np.testing.assert_allclose(result.measured[quantity], result.theory[quantity], atol=0.01)


def two_activations(slope):
    return functools.partial(tat.composed_c_map, negative_slope=slope, compositions=2)


def test_without_attention_and_with_equal_norms_the_recursion_is_the_composed_c_map():
    cosine = np.linspace(-0.9, 0.9, 9)
    slope = tat.solve_negative_slope(24)
    kernel = np.ones((2, 9, 1, 1))  # one token an image; image b with b + 1 has cosine[b]
    kernel[1, :, 0, 0] = cosine
    kernels = propagation.kernel_recursion(kernel, np.ones((12, 1, 1, 1)), two_activations(slope))
    np.testing.assert_allclose(kernels[-1, 0], 1, rtol=1e-12)
    np.testing.assert_allclose(kernels[-1, 1, :, 0, 0], tat.composed_c_map(cosine, slope, 24), rtol=1e-12)


def test_the_recursion_tells_the_reference_bias_apart():
    """T = 64, depth 12, free of noise: the column-normalized bias moves the last kernel by 0.02 to 0.1."""
    slope = tat.solve_negative_slope(24)
    last = {}
    for form in ("espa", "espa_reference"):
        row_scale, attention_bias = espa.shaped_attention((8, 8), 12, form=form)
        attention = row_scale[..., None] * softmax(attention_bias, axis=-1)
        kernel = np.eye(64)[None, None].repeat(2, axis=0)
        last[form] = propagation.kernel_recursion(kernel, attention[:, None], two_activations(slope))[-1, 0, 0]
    assert last["espa"].diagonal().max() == pytest.approx(7.9, abs=0.01)
    assert 0.02 < np.abs(last["espa"] - last["espa_reference"]).max() < 0.1


def test_the_curves_are_means_of_cosines():
    """Two images of two tokens, of different lengths: 0.6 and -0.96 within, 0.8 and -1 between the two."""
    tokens = np.array([[[2.0, 0.0], [0.6, 0.8]], [[0.8, 0.6], [-0.6, -0.8]]])
    tokens[1, 1] *= 3
    within = np.einsum("btd,bsd->bts", tokens, tokens) / 2
    between = np.einsum("btd,bsd->bts", tokens, tokens[::-1]) / 2
    curves = propagation._curves(np.stack([within, between])[None])
    first, second = 0.6, -(0.8 * 0.6 + 0.6 * 0.8)
    np.testing.assert_allclose(curves["token_cosine"], (first + second) / 2)
    np.testing.assert_allclose(curves["image_cosine"], (0.8 - 1.0) / 2)
    np.testing.assert_allclose(curves["mean_square"], (4 + 1 + 1 + 9) / 4 / 2)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("simple_vit", {}),
        ("simplest_vit", {"attention": "softmax"}),
        ("isometric_vit", {"norm": "layer_norm"}),
        ("isometric_vit", {"skip": "scaled"}),
        ("isometric_vit", {"init": "pytorch"}),
        ("isometric_vit", {"mlp": "plain"}),
    ],
)
def test_models_whose_start_has_no_closed_form_have_no_theory(name, fields):
    assert propagation.theoretical_kernels(create(name, **fields), IMAGE) is None


def test_frozen_shifts_have_the_theory_of_the_isometric_network():
    theories = [propagation.theoretical_kernels(create(name), IMAGE) for name in ("isometric_vit", "shift_mlp")]
    np.testing.assert_allclose(*theories, rtol=1e-5)
