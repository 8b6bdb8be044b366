"""Every field of `config.model` is read, passed on, and changes the network as documented."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplest_vit.config import default
from simplest_vit.models import VARIANTS, create_model, espa, tat
from simplest_vit.models.attention_kinds import KINDS
from simplest_vit.models.layers import create_norm
from tests.models import numpy_vit, tiny
from tests.models.test_models import primitives

# Field -> network, other fields, a value that is not the default.
CHANGES = {
    "name": ("simplest_vit", {}, "simple_vit"),
    "variant": ("simplest_vit", dict.fromkeys(("depth", "width", "num_heads", "mlp_dim")), "B"),
    "depth": ("simplest_vit", {}, 4),
    "width": ("simplest_vit", {}, 48),
    "num_heads": ("simplest_vit", {}, 1),
    "mlp_dim": ("simplest_vit", {}, 80),
    "patch_size": ("simplest_vit", {}, 2),
    "dropout": ("simplest_vit", {}, 0.1),
    "remat": ("simplest_vit", {}, True),
    "attention_kernel": ("simplest_vit", {}, "fused"),
    "attention": ("simplest_vit", {}, "softmax"),
    "gamma_max_depth": ("simplest_vit", {}, 0.5),
    "rho_max_depth": ("simplest_vit", {"attention": "uspa"}, 0.3),
    "uniform_fraction": ("shift_mlp", {}, 0.3),
    "identity_head_fraction": ("isometric_vit", {}, 0.25),
    "mlp": ("isometric_vit", {}, "plain"),
    "activation": ("isometric_vit", {}, "silu"),
    "c_val_0_target": ("simplest_vit", {}, 0.3),
    "init": ("isometric_vit", {}, "espa_tat"),
    "norm": ("isometric_vit", {}, "layer_norm"),
    "skip": ("isometric_vit", {}, "scaled"),
}
SIZES = {"image_shape": (16, 16, 3), "num_classes": 5, "depth": 3, "width": 32, "num_heads": 2, "mlp_dim": 64}


@functools.cache
def known_programs(**given):
    return programs(**given)


def programs(name, **fields):
    """How parameters and constants are made, and logits computed: two programs and their constants, none is run."""
    arguments = {"name": name, **SIZES, "c_val_0_target": 0.5, **fields}

    def create(key):
        return create_model(rngs=nnx.Rngs(key), **arguments)

    def parts(key):
        _, *trees = tiny.split(create(key))
        return trees

    key = jax.random.key(0)
    graphdef = nnx.graphdef(nnx.eval_shape(functools.partial(create, key)))
    image = jnp.zeros((2, *SIZES["image_shape"]))
    trees = jax.eval_shape(parts, key)
    apply = jax.make_jaxpr(lambda trees, key: nnx.merge(graphdef, *trees)(image, dropout_key=key))(trees, key)
    init = jax.make_jaxpr(parts)(key)
    constants = [np.asarray(c).tobytes() for c in init.consts if not jnp.issubdtype(c.dtype, jax.dtypes.prng_key)]
    return re.sub(r" at 0x\w+", "", f"{init.jaxpr}{apply.jaxpr}"), constants


def test_every_field_has_a_row():
    assert CHANGES.keys() == set(default().model)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_network(field):
    name, fields, value = CHANGES[field]
    base = {"name": name, **fields}
    assert known_programs(**base) != programs(**base | {field: value})


@pytest.mark.parametrize("base", {str(row[:2]): row[:2] for row in CHANGES.values()}.values(), ids=str)
def test_the_same_fields_make_the_same_network(base):
    """Otherwise any two would differ, and the test above would see nothing."""
    name, fields = base
    assert known_programs(name=name, **fields) == programs(name, **fields)


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_remat_recomputes_the_blocks(name):
    def recomputed(remat):
        model = nnx.eval_shape(lambda: tiny.vit(name, remat=remat))
        graphdef, params, constants = tiny.split(model)
        apply = lambda params, constants: nnx.merge(graphdef, params, constants)(jnp.zeros((1, 8, 12, 3)))  # noqa: E731
        scans = [e for e in primitives(jax.make_jaxpr(apply)(params, constants).jaxpr) if e.primitive.name == "scan"]
        (body,) = (e.params["jaxpr"].jaxpr for e in scans)
        return len(body.eqns) == 1 and "policy" in body.eqns[0].params

    assert recomputed(True)
    assert not recomputed(False)


def test_the_usual_sizes():
    """Those of ViT (arXiv 2010.11929, table 1) and DeiT (arXiv 2012.12877, table 1): heads are 64 wide."""
    sizes = {"Ti": (12, 192), "S": (12, 384), "B": (12, 768), "L": (24, 1024)}
    assert {
        name: {"depth": depth, "width": width, "num_heads": width // 64, "mlp_dim": 4 * width}
        for name, (depth, width) in sizes.items()
    } == VARIANTS


NETWORKS = {
    "simplest_vit": {},
    "simplest_vit + all": {"norm": "layer_norm", "skip": "residual"},
    "isometric_vit": {"activation": "silu"},
    "shift_mlp": {"activation": "relu"},
    "simple_vit": {},
    "isometric_vit + all": {"norm": "layer_norm", "skip": "scaled"},
    "simple_vit + shifts": {"attention": "fixed_shift", "init": "orthogonal"},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_are_those_of_the_same_network_in_numpy(network):
    """Off the initialization; to 1e-5 of the largest logit."""
    name, fields = network.split(" ")[0], NETWORKS[network]
    model = tiny.vit(name, **fields)
    graphdef, params, constants = tiny.split(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape)), params)
    image = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    row_scale, bias = np.ones((3, 6)), np.zeros((3, 1, 6, 6))
    if name == "simplest_vit":
        row_scale, bias = espa.shaped_attention((2, 3), 3)
        bias = bias[:, None]
    elif "shift" in model.blocks.attention.kind.__class__.__name__.lower():
        bias = KINDS["shift"]().constants((2, 3), 3, 2)["attention_bias"]
    expected = numpy_vit.logits(
        params,
        image,
        bias,
        row_scale,
        patch_size=4,
        num_heads=2,
        skip=fields.get("skip", "residual" if name == "simple_vit" else "none"),
        mlp="tat" if name == "simplest_vit" else "plain",
        activation=fields.get("activation", "gelu"),
        slope=tat.solve_negative_slope(6, 0.5),
    )
    found = jax.jit(lambda params: nnx.merge(graphdef, params, constants)(image))(params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_layer_norm_has_the_epsilon_of_pytorch():
    x = 1e-3 * np.random.default_rng(0).normal(size=(5, 16))
    expected = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    norm = create_norm("layer_norm", 16, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_pooling_norm_and_head_are_float32_under_bfloat16(name):
    model = tiny.vit(name, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16)).astype(jnp.bfloat16)
    pooled = np.float64(x.astype(jnp.float32)).mean(axis=1)
    if name == "simple_vit":
        pooled = (pooled - pooled.mean(axis=1, keepdims=True)) / np.sqrt(pooled.var(axis=1, keepdims=True) + 1e-5)
    expected = pooled @ np.float64(model.head.kernel[...]) + np.float64(model.head.bias[...])
    np.testing.assert_allclose(model.head(model.pool(x)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["isometric_vit", "simple_vit"])
def test_dropout_needs_a_key_and_is_on_the_tokens(name):
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    model, plain = tiny.vit(name, dropout=0.5), tiny.vit(name)
    np.testing.assert_array_equal(model(image), plain(image))
    assert not np.allclose(model(image, dropout_key=jax.random.key(2)), plain(image))
    features = model.features(image, dropout_key=jax.random.key(2))
    assert (features == 0).mean() < 0.1, "a mean of tokens is not dropped"
    tokens = jax.random.normal(jax.random.key(3), (2, 6, 16))
    kept = model.dropout(tokens, deterministic=False, rngs=jax.random.key(2)) / tokens
    assert set(np.unique(kept)) == {0, 2}


def test_the_isometric_network_starts_orthogonal():
    _, params, _ = tiny.split(tiny.vit("isometric_vit", width=96, mlp_dim=192, image_shape=(32, 32, 3)))
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    for kernel, scale in ((params["patch_embedding"]["kernel"], 2**0.5), (attention["value"]["kernel"], 1.0)):
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), scale, rtol=1e-5)
    keys = np.linalg.svd(attention["key"]["kernel"], compute_uv=False)
    assert keys.min() < 0.2 < 1.5 < keys.max(), "Gaussian"
    first, second = mlp["dense1"]["kernel"][0], mlp["dense2"]["kernel"][0]
    np.testing.assert_array_equal(first[:, 96:], -first[:, :96])
    np.testing.assert_array_equal(second[96:], -second[:96])
    mapped = first[:, :96] @ second[:96]  # what the MLP does, which is not what its first layer does
    np.testing.assert_allclose(np.linalg.svd(mapped, compute_uv=False), 1.0, rtol=1e-5)
    assert np.abs(mapped - first[:, :96]).max() > 0.1


def test_simple_vit_starts_as_pytorch_does():
    _, params, _ = tiny.split(tiny.vit("simple_vit", width=96, mlp_dim=192, image_shape=(32, 32, 3), num_classes=50))
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    assert all(set(attention[name]) == {"kernel"} for name in ("query", "key", "value", "out"))
    for layer, fan_in in (
        (params["patch_embedding"], 48),
        (mlp["dense1"], 96),
        (mlp["dense2"], 192),
        (params["head"], 96),
    ):
        for array in layer.values():
            assert np.abs(array).max() <= fan_in**-0.5
            assert np.std(array) == pytest.approx((3 * fan_in) ** -0.5, rel=0.2)
