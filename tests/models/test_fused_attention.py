"""The fused attention kernel, interpreted, against closed forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from simplest_vit.errors import UserError
from simplest_vit.models import attention, espa, fused_attention, layers
from simplest_vit.training.sharding import batch_sharding, create_mesh
from tests.models import attention_oracle as oracle
from tests.models import tiny


def run(function, arguments, gradient):
    """The function's output and its gradients, compiled."""

    @jax.jit
    def both(arguments, gradient):
        output, pullback = jax.vjp(function, *arguments)
        return output, *pullback(gradient)

    return both(arguments, gradient)


def fused(arrays, num_heads, bias, scale, dtype, projection_bias=None):
    """Output and gradients [B, T, D] by query, key and value (and the bias of the projections), by the kernel."""
    query, key, value, gradient = (jnp.asarray(x, dtype) for x in arrays)

    def attend(qkv, *projection_bias):
        return fused_attention.fused(qkv, *(projection_bias or (None,)), num_heads, bias, scale, interpret=True)

    biases = () if projection_bias is None else (jnp.asarray(projection_bias, dtype),)
    output, dqkv, *dbias = run(attend, (jnp.concatenate([query, key, value], axis=-1), *biases), gradient)
    return output, *jnp.split(dqkv, 3, axis=-1), *dbias


def plain(arrays, num_heads, bias, scale, dtype):
    """The same by `attention.attend`."""
    *qkv, gradient = (jnp.asarray(x, dtype) for x in arrays)
    return run(lambda *qkv: attention.attend(*qkv, num_heads, bias, scale), qkv, gradient)


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 100),
        "t": st.one_of(st.sampled_from([16, 64]), st.integers(16, 64)),
        "num_heads": st.integers(1, 3),
        "d_head": st.one_of(st.sampled_from([16, 32, 64, 128]), st.integers(16, 128)),
        "bias": st.sampled_from([None, "shared", "of heads"]),
        "masked": st.booleans(),
        "scaled": st.booleans(),
    }
)


def draw(case):
    case = dict(case)
    case["bias"] = {None: None, "shared": 1, "of heads": max(2, case["num_heads"])}[case["bias"]]
    if case["bias"] not in (None, 1):
        case["num_heads"] = case["bias"]
    return case["num_heads"], *oracle.inputs(b=2, **case)


@settings(max_examples=6)
@given(case=CASES)
def test_float32_is_exact(case):
    num_heads, arrays, bias, scale = draw(case)
    rounded = np.float32(arrays)
    output, gradients = oracle.attention(*rounded[:3], num_heads, bias, scale, rounded[3])
    for ours, exact in zip(fused(arrays, num_heads, bias, scale, jnp.float32), (output, *gradients), strict=True):
        assert oracle.relative_error(ours, exact) < 1e-6


@settings(max_examples=4)
@given(case=CASES)
def test_bfloat16_is_as_near_as_the_plain_form(case):
    num_heads, arrays, bias, scale = draw(case)
    rounded = np.float64(np.asarray(jnp.asarray(arrays, jnp.bfloat16), np.float32))
    output, gradients = oracle.attention(*rounded[:3], num_heads, bias, scale, rounded[3])
    ours = fused(arrays, num_heads, bias, scale, jnp.bfloat16)
    theirs = plain(arrays, num_heads, bias, scale, jnp.bfloat16)
    for by_kernel, by_xla, exact in zip(ours, theirs, (output, *gradients), strict=True):
        assert oracle.relative_error(by_kernel, exact) <= 1.2 * oracle.relative_error(by_xla, exact)


@pytest.mark.parametrize("t", [16, 49])
def test_biases_of_the_projections_are_added_and_their_gradients_summed(t):
    arrays, bias, scale = oracle.inputs(0, 3, t, 2, 24, bias=1, scaled=True)
    projection_bias = np.random.default_rng(1).normal(size=(3, 48))
    shifted = arrays[:3] + projection_bias[:, None, None]
    output, gradients = oracle.attention(*shifted, 2, bias, scale, arrays[3])
    sums = np.concatenate([gradient.sum((0, 1)) for gradient in gradients])
    ours = fused(arrays, 2, bias, scale, jnp.float32, projection_bias.reshape(-1))
    for result, exact in zip(ours, (output, *gradients, sums), strict=True):
        assert oracle.relative_error(result, exact) < 2e-6  # the sum of projection and bias is rounded


@pytest.mark.parametrize("form", ["espa", "espa_2d"])
def test_with_queries_of_zero_it_is_the_matrix_of_e_spa(form):
    scales, biases = espa.shaped_attention((8, 8), 12, form=form)
    matrix = espa.attention_matrices((8, 8), 12, form=form)[5]
    value = np.random.default_rng(0).normal(size=(1, 64, 32)).astype(np.float32)
    qkv = jnp.concatenate([jnp.zeros_like(value), value, value], axis=-1)
    result = fused_attention.fused(qkv, None, 2, jnp.float32(biases[5]), jnp.float32(scales[5]), interpret=True)
    assert oracle.relative_error(result, matrix @ np.float64(value)) < 1e-6


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("simple_vit", {}),
        ("simplest_vit", {"attention": "value_skipinit"}),
        ("simplest_vit", {"attention": "shift", "identity_head_fraction": 0.5}),
        ("simplest_vit", {"remat": True, "depth": 3}),
    ],
)
def test_a_model_computes_the_same_by_the_kernel(monkeypatch, name, overrides):
    monkeypatch.setattr(fused_attention, "fused", functools.partial(fused_attention.fused, interpret=True))
    if overrides.get("remat"):
        monkeypatch.setattr(layers, "_MAX_UNROLLED", 0)  # a loop
    image = np.float32(np.random.default_rng(1).normal(size=(2, 16, 16, 3)))
    sizes = {"image_shape": (16, 16, 3), "depth": 1, "width": 32, "mlp_dim": 64, "c_val_0_target": 0.3, **overrides}
    results = [tiny_gradient(tiny.vit(name, attention_kernel=kernel, **sizes), image) for kernel in ("xla", "fused")]
    # All together, for the gradient of the keys' bias is 0 but for rounding; one that falls over a kink of TReLU shows.
    plain, ours = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(result)]) for result in results)
    assert oracle.relative_error(ours, np.float64(plain)) < 1e-4


def tiny_gradient(model, image):
    graphdef, params, constants = tiny.split(model)
    # Queries, whose kernels start at zero, are moved off it.
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)
    return jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p, constants)(image) ** 2).mean()))(params)


def test_each_device_computes_its_own_images():
    arrays, bias, scale = oracle.inputs(0, 8, 16, 2, 16, bias=2, scaled=True)
    projection_bias = np.random.default_rng(1).normal(size=96)
    expected = fused(arrays, 2, bias, scale, jnp.float32, projection_bias)
    mesh = create_mesh(4)
    images = batch_sharding(mesh)

    @jax.jit
    def gradients(qkv, projection_bias, gradient):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            attend = functools.partial(
                fused_attention.fused, num_heads=2, attention_bias=bias, row_scale=scale, interpret=True
            )
            output, pullback = jax.vjp(attend, qkv, projection_bias)
            return output, *pullback(gradient)

    query, key, value, gradient = (jnp.asarray(x, jnp.float32) for x in arrays)
    qkv = jax.device_put(jnp.concatenate([query, key, value], axis=-1), images)
    arguments = (
        qkv,
        jax.device_put(jnp.float32(projection_bias), NamedSharding(mesh, PartitionSpec())),
        jax.device_put(gradient, images),
    )
    output, dqkv, dbias = gradients(*arguments)
    for result in (output, dqkv):
        assert result.sharding.is_equivalent_to(images, 3)
    assert "all-gather" not in gradients.lower(*arguments).compile().as_text()
    for result, alone in zip((output, *jnp.split(dqkv, 3, axis=-1), dbias), expected, strict=True):
        assert oracle.relative_error(result, np.float64(alone)) < 1e-6


def test_a_cpu_cannot_run_it():
    with pytest.raises(UserError, match=r"attention_kernel='fused' needs NVIDIA GPUs .* not cpu; choose xla"):
        fused_attention.check_devices("fused", jax.devices()[:1])
    fused_attention.check_devices("auto", jax.devices()[:1])


class Gpu:
    platform = "gpu"

    def __init__(self, kind, capability):
        self.device_kind, self.compute_capability = kind, capability


HOPPER, VOLTA, RADEON = Gpu("NVIDIA H100", "9.0"), Gpu("Tesla V100", "7.0"), Gpu("AMD Instinct", "gfx942")


def test_a_gpu_must_be_recent():
    fused_attention.check_devices("fused", [HOPPER, HOPPER])
    with pytest.raises(UserError, match=r"with 7\.0"):
        fused_attention.check_devices("fused", [HOPPER, VOLTA])


@pytest.mark.parametrize(
    ("devices", "tokens", "head_width", "chosen"),
    [
        ([HOPPER], 64, 64, "fused"),
        ([HOPPER], 16, 128, "fused"),
        ([Gpu("NVIDIA B200", "10.0")], 64, 64, "fused"),
        ([HOPPER], 65, 64, "xla"),
        ([HOPPER], 15, 64, "xla"),
        ([HOPPER], 64, 129, "xla"),
        ([HOPPER], 64, 8, "xla"),
        ([HOPPER, HOPPER], 64, 64, "fused"),
        ([HOPPER, VOLTA], 64, 64, "xla"),
        ([RADEON], 64, 64, "xla"),
        (jax.devices()[:1], 64, 64, "xla"),
    ],
)
def test_auto_is_fused_where_it_was_faster(devices, tokens, head_width, chosen):
    assert fused_attention.choose("auto", devices, tokens, head_width) == chosen
    for kernel in ("xla", "fused"):
        assert fused_attention.choose(kernel, devices, tokens, head_width) == kernel
