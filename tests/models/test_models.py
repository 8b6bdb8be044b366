"""What holds for whole models: counts, shapes, dtypes, depth as a scan, and the contrasts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.extend.core import jaxprs_in_params

from simplest_vit.errors import UserError
from simplest_vit.models import PRESETS, VARIANTS, create_model
from tests.models import tiny

IMAGE = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))


def num_parameters(name, variant, image_size, patch_size, num_classes):
    model = nnx.eval_shape(
        lambda: create_model(
            name,
            variant=variant,
            patch_size=patch_size,
            image_shape=(image_size, image_size, 3),
            num_classes=num_classes,
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    params = nnx.state(model, nnx.Param)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size", "num_classes", "expected"),
    [
        ("simplest_vit", 4, 32, 10, 19_523_722),
        # 12 blocks (q, k, v: 3 * (384^2 + 384); MLP: 2 * 384 * 1536 + 1536 + 384), patches 768 * 384 + 384, head.
        ("simplest_vit", 16, 224, 1000, 12 * (443_520 + 1_181_568) + 295_296 + 385_000),
        # Blocks: two LayerNorms 2 * 768, q, k, v, out 4 * 384^2, the MLP; patches, LayerNorm 768, head.
        ("simple_vit", 4, 32, 10, 12 * (1_536 + 589_824 + 1_181_568) + 18_816 + 768 + 3_850),
        ("simple_vit", 16, 224, 1000, 12 * (1_536 + 589_824 + 1_181_568) + 295_296 + 768 + 385_000),
    ],
)
def test_parameter_counts(name, patch_size, image_size, num_classes, expected):
    assert num_parameters(name, "S", image_size, patch_size, num_classes) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_variant_gives_float32_logits(name, variant):
    def logits():
        model = create_model(
            name,
            variant=variant,
            image_shape=(16, 24, 3),
            num_classes=7,
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
        return model(jnp.zeros((2, 16, 24, 3)))

    result = jax.eval_shape(logits)
    assert (result.shape, result.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("attention", ["espa_2d", "shift", "fixed_shift", "value_skipinit", "softmax"])
def test_attention_computes_finite_logits_and_gradients(attention):
    model = tiny.vit(attention=attention, dtype=jnp.bfloat16, depth=1, c_val_0_target=0.3)
    graphdef, params, constants = tiny.split(model)

    def loss(params):
        logits = nnx.merge(graphdef, params, constants)(IMAGE)
        return (logits**2).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
    for array in jax.tree.leaves((logits, gradients)):
        assert array.dtype == jnp.float32
        assert np.isfinite(array).all()


def test_images_of_other_sizes_channels_and_depths():
    model = tiny.vit(image_shape=(4, 20, 1), patch_size=2, depth=1, c_val_0_target=0.4)
    assert model(jnp.zeros((3, 4, 20, 1))).shape == (3, 5)


@pytest.mark.parametrize("shape", [(2, 20, 4, 1), (2, 4, 20, 3), (2, 4, 4, 1)])
def test_images_of_another_shape_are_refused(shape):
    """The first has as many tokens, so that it would silently get the positions of others."""
    model = tiny.vit(image_shape=(4, 20, 1), patch_size=2, depth=1, c_val_0_target=0.4)
    with pytest.raises(UserError, match=rf"images: {re.escape(str(list(shape)))} must be \[N, 4, 20, 1\], normalized"):
        model(jnp.zeros(shape))


@pytest.mark.parametrize("name", ["simplest_vit", "shift_mlp", "simple_vit"])
def test_bfloat16_stays_near_float32(name):
    exact, rounded = tiny.vit(name)(IMAGE), tiny.vit(name, dtype=jnp.bfloat16)(IMAGE)
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(np.abs(exact).max()))


def primitives(jaxpr):
    """All equations of a jaxpr, those of nested jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def loss_jaxpr(**overrides):
    graphdef, params, constants = tiny.split(nnx.eval_shape(lambda: tiny.vit(**overrides)))

    def loss(params, constants):
        return nnx.merge(graphdef, params, constants)(IMAGE).mean()

    return jax.make_jaxpr(jax.grad(loss))(params, constants).jaxpr


def test_softmax_is_float32_under_bfloat16_compute():
    exponentials = [e for e in primitives(loss_jaxpr(dtype=jnp.bfloat16)) if e.primitive.name == "exp"]
    assert exponentials
    assert all(e.invars[0].aval.dtype == jnp.float32 for e in exponentials)


@pytest.mark.parametrize("remat", [False, True])
def test_depth_64_traces_the_program_of_depth_12(remat):
    counts = [len(list(primitives(loss_jaxpr(depth=depth, remat=remat)))) for depth in (12, 64)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_remat_changes_nothing_but_memory(name):
    def gradient(remat):
        graphdef, params, constants = tiny.split(tiny.vit(name, remat=remat, depth=1, c_val_0_target=0.3))
        return jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p, constants)(IMAGE).mean()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient(False), gradient(True))


def test_the_scan_keeps_one_array_for_each_activation():
    """Kept for the backward pass at the width of the MLP: the activation alone, not its input, a mask or a copy."""
    b, t, depth, mlp_dim = 2, 6, 3, 32
    scans = [e for e in primitives(loss_jaxpr()) if e.primitive.name == "scan"]
    forward = scans[0]
    assert sum(v.aval.size == depth * b * t * mlp_dim for v in forward.outvars) == 1
    # At the model's width: the block's input, q, k, v, what attention gives, and the output.
    assert sum(v.aval.size == depth * b * t * 16 for v in forward.outvars) == 6


def test_constants_are_not_parameters():
    _, params, constants = tiny.split(tiny.vit())
    assert set(constants["blocks"]["attention"]) == {"row_scale", "attention_bias"}
    assert set(params["blocks"]["attention"]) == {"query", "key", "value"}
    assert set(constants) == {"position_embedding", "blocks"}


def test_initialization():
    _, params, _ = tiny.split(tiny.vit(image_shape=(32, 48, 3), width=96, mlp_dim=192, num_classes=40))
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    assert (attention["query"]["kernel"] == 0).all()
    for layer in (attention["key"], attention["value"]):
        assert np.std(layer["kernel"]) == pytest.approx(96**-0.5, rel=0.02)
    assert np.std(params["patch_embedding"]["kernel"]) == pytest.approx(48**-0.5, rel=0.05)
    for kernel, scale in (
        (mlp["dense1"]["kernel"], 2**0.5),
        (mlp["dense2"]["kernel"], 1.0),
        (params["head"]["kernel"], 1.0),
    ):
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), scale, rtol=1e-5)
    flat = jax.tree.leaves_with_path(params)
    assert all((array == 0).all() for path, array in flat if path[-1].key == "bias")


def test_simple_vit_starts_as_in_pytorch():
    """Kernel and bias of a linear layer are uniform up to 1 / sqrt(inputs)."""
    _, params, _ = tiny.split(tiny.vit("simple_vit", num_classes=40))
    flat = traverse_util.flatten_dict(params)
    kernels = [path for path in flat if path[-1] == "kernel"]
    for path in (*kernels, *(path for path in flat if path[-1] == "bias" and "norm" not in path)):
        inputs = flat[*path[:-1], "kernel"].shape[-2]
        assert 0.9 < np.abs(flat[path]).max() * inputs**0.5 <= 1, path
