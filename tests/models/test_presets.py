"""From the fields of `config.model` to the arguments of a network."""

import inspect

import numpy as np
import pytest
from flax import nnx

from simplest_vit.config import default
from simplest_vit.errors import UserError
from simplest_vit.models import PRESETS, create_model, model_arguments
from simplest_vit.models.attention_kinds import KINDS, settings_of

IMAGE = (32, 48, 3)


def arguments(name="simplest_vit", **fields):
    return model_arguments(name, image_shape=IMAGE, **fields)


def test_variant_gives_way_to_explicit_sizes():
    found = arguments(depth=24, mlp_dim=96)
    assert (found["depth"], found["width"], found["num_heads"], found["mlp_dim"]) == (24, 384, 6, 96)


@pytest.mark.parametrize(
    ("given", "patch_size", "width"),
    [({}, 4, 384), ({"variant": "Ti/8"}, 8, 192), ({"variant": "Ti/8", "patch_size": 16, "width": 96}, 16, 96)],
)
def test_a_variant_may_name_the_patch_size(given, patch_size, width):
    model = nnx.eval_shape(
        lambda: create_model("simple_vit", image_shape=IMAGE, num_classes=5, rngs=nnx.Rngs(0), depth=1, **given)
    )
    assert model.patch_size == patch_size
    assert model.head.kernel.shape == (width, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_shape": (32, 48)},
            r"image_shape=\(32, 48\) must be three positive integers \(height, width, channels\)",
        ),
        ({"image_shape": (32, 48, 0)}, r"image_shape=\(32, 48, 0\) must be three positive integers"),
        ({"num_classes": 0}, "num_classes=0 must be a positive integer"),
        ({"num_classes": 10.0}, r"num_classes=10.0 must be a positive integer"),
    ],
)
def test_sizes_of_images_and_classes_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        create_model("simple_vit", **{"image_shape": IMAGE, "num_classes": 5, "rngs": nnx.Rngs(0)} | fields)


def test_numpy_numbers_are_numbers():
    found = arguments(depth=np.int32(8), width=np.int64(16), num_heads=np.int64(2))
    assert {type(found[field]) for field in ("depth", "width", "num_heads")} == {int}


def test_a_variant_that_does_not_exist_is_refused_with_its_patch_size_too():
    with pytest.raises(UserError, match=r"config.model.variant='XS' is unknown; expected one of Ti, S, B, L"):
        create_model("simple_vit", variant="XS/4", image_shape=IMAGE, num_classes=5, rngs=nnx.Rngs(0))


def test_a_network_takes_what_its_own_choice_reads():
    settings = {"gamma_max_depth": 0.1, "rho_max_depth": 0.2, "uniform_fraction": 0.3, "identity_head_fraction": 0.4}
    for name, choice, expected in (
        ("simplest_vit", {}, {"gamma_max_depth", "c_val_0_target"}),
        ("simplest_vit", {"attention": "uspa", "activation": "relu"}, {"rho_max_depth"}),
        ("isometric_vit", {}, {"uniform_fraction", "identity_head_fraction"}),
        ("simplest_vit", {"attention": "value_skipinit"}, {"c_val_0_target"}),
        ("simple_vit", {}, set()),
    ):
        found = arguments(name, **settings, **choice)
        assert found.keys() & {*settings, "c_val_0_target"} == expected
        assert all(found[field] == settings[field] for field in expected - {"c_val_0_target"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "vit"}, "config.model.name='vit' is unknown; expected one of simplest_vit, isometric_vit, shift_mlp"),
        ({"variant": "XS"}, "config.model.variant='XS' is unknown; expected one of Ti, S, B, L"),
        ({"depth": 0}, "config.model.depth=0 must be an integer from 1 to 1,000"),
        ({"dropout": 1.5}, "config.model.dropout=1.5 must be a number in [0, 1)"),
        ({"patch_size": 0}, "config.model.patch_size=0 must be an integer from 1"),
        ({"uniform_fraction": 0.0}, "config.model.uniform_fraction=0.0 must be a number in (0, 1)"),
        ({"patch_size": 5}, "config.model.patch_size=5 does not divide the image size 32 x 48; choose a divisor"),
        ({"num_heads": 5}, "config.model.width=384 is not divisible by config.model.num_heads=5"),
        ({"width": 6, "num_heads": 2}, "config.model.width=6 must be a multiple of 4 and at least 8"),
        ({"attention": "spa"}, "config.model.attention='spa' is unknown; expected one of espa, "),
        ({"mlp": "shaped"}, "config.model.mlp='shaped' is unknown; expected one of tat, looks_linear, plain"),
        ({"activation": "gelu"}, "config.model.activation='gelu' is unknown; expected one of tailored_relu, relu"),
        ({"init": "torch"}, "config.model.init='torch' is unknown; expected one of espa_tat, reference, orthogonal"),
        ({"norm": "batch"}, "config.model.norm='batch' is unknown; expected one of none, layer_norm"),
        ({"skip": "yes"}, "config.model.skip='yes' is unknown; expected one of none, residual, scaled"),
        (
            {"attention": "shift", "num_heads": 128},
            "config.model.num_heads=128 must be at most the 96 tokens, because each head of shift attention has an",
        ),
        ({"mlp": "looks_linear", "mlp_dim": 769}, "config.model.mlp_dim=769 must be even and at least 768, twice the"),
        ({"mlp": "looks_linear", "mlp_dim": 766}, "config.model.mlp_dim=766 must be even and at least 768, twice the"),
        (
            {"mlp": "looks_linear", "activation": "tailored_relu"},
            "config.model.activation='tailored_relu' is unknown; expected one of gelu, silu, relu",
        ),
        ({"init": "mimetic"}, "config.model.init='mimetic' needs random queries and an output projection; use"),
        ({"depth": 6}, "config.model.c_val_0_target=0.9 is out of reach for depth 6 (12 activations)"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(fields, message):
    with pytest.raises(UserError) as error:
        arguments(**fields)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_describes_the_same_network_as_no_field_at_all(name):
    """Fields that the network reads are in the table of the config, with the same defaults."""
    config = default().model
    config.name = name
    found = model_arguments(**config, image_shape=IMAGE)
    assert {field for kind in KINDS for field in settings_of(kind)} <= set(config)
    plain = arguments(name)
    assert {field: found[field] for field in plain} == plain
    own = {field: value for field, value in found.items() if field not in plain}
    for field, value in own.items():
        assert arguments(name, **{field: value})[field] == value
        assert inspect.signature(KINDS[found["attention"]]).parameters[field].default == value


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"config.model.gama_max_depth is unknown; did you mean gamma_max_depth\?"):
        arguments(gama_max_depth=0.1)


def test_the_kernel_for_attention_is_xla_unless_it_is_named():
    kernels = {"auto": "xla", "xla": "xla", "fused": "fused"}
    for name, kernel in kernels.items():
        assert arguments(attention_kernel=name, patch_size=8)["attention_kernel"] == kernel
    assert "attention_kernel" not in arguments("shift_mlp", attention_kernel="fused")  # it has no attention to fuse


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 16}, "a number of tokens from 16 to 64, not 6;"),
        ({"patch_size": 4}, "a number of tokens from 16 to 64, not 96; choose xla or another model$"),
        ({"num_heads": 48, "patch_size": 8}, "a head width from 16 to 128, not 8"),
        ({"num_heads": 2, "patch_size": 8}, "a head width from 16 to 128, not 192"),
    ],
)
def test_the_fused_kernel_says_what_it_cannot_do(fields, message):
    with pytest.raises(UserError, match=message):
        arguments(attention_kernel="fused", **fields)
