import pytest
from ml_collections import ConfigDict

from simplest_vit.config import default
from simplest_vit.errors import UserError
from simplest_vit.models.factory import MODELS, model_arguments

DEFAULTS = {
    "name": "simplest_vit",
    "variant": "S",
    "depth": None,
    "width": None,
    "num_heads": None,
    "mlp_dim": None,
    "patch_size": 4,
    "dropout": 0.0,
    "remat": False,
    "attention_kernel": "auto",
    "attention": "espa",
    "gamma_max_depth": 0.005,
    "rho_max_depth": 0.8,
    "shift_eps": 0.01,
    "shift_in_place": 0.75,
    "mlp": "shaped",
    "activation": "tailored_relu",
    "c_val_0_target": 0.9,
    "init": "paper",
}


def model_config(**overrides):
    return ConfigDict({**DEFAULTS, **overrides})


def test_variant_gives_way_to_explicit_sizes():
    arguments = model_arguments(model_config(depth=24, mlp_dim=96), (32, 32, 3))
    assert (arguments["depth"], arguments["width"], arguments["num_heads"], arguments["mlp_dim"]) == (24, 384, 6, 96)


def test_a_model_takes_what_its_own_choice_reads():
    shaping = {"gamma_max_depth", "rho_max_depth", "shift_eps", "shift_in_place", "c_val_0_target"}
    for choice, expected in (
        ({}, {"gamma_max_depth", "c_val_0_target"}),
        ({"attention": "uspa", "activation": "relu"}, {"rho_max_depth"}),
        ({"attention": "shift", "mlp": "mirrored", "activation": "gelu"}, {"shift_eps", "shift_in_place"}),
        ({"attention": "value_skipinit"}, {"c_val_0_target"}),
    ):
        assert shaping & set(model_arguments(model_config(**choice), (32, 32, 3))) == expected


def test_baseline_takes_no_shaping():
    assert "attention" not in model_arguments(model_config(name="simple_vit", depth=2), (32, 32, 3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": "vit"}, "config.model.name='vit' is unknown; expected one of simplest_vit, simple_vit"),
        ({"variant": "XS"}, "config.model.variant='XS' is unknown; expected one of Ti, S, B, L"),
        ({"patch_size": 5}, "config.model.patch_size=5 does not divide the image size 32 x 48; choose a divisor"),
        ({"num_heads": 5}, "config.model.width=384 is not divisible by config.model.num_heads=5"),
        ({"width": 6}, "config.model.width=6 must be a multiple of 4 and at least 8"),
        ({"attention": "spa"}, "config.model.attention='spa' is unknown; expected one of espa, "),
        ({"activation": "gelu"}, "config.model.activation='gelu' is unknown"),
        ({"init": "torch"}, "config.model.init='torch' is unknown; expected one of paper, reference"),
        (
            {"attention": "shift", "num_heads": 128},
            "config.model.num_heads=128 must be at most the 96 tokens, for shift attention has an offset for each head",
        ),
        (
            {"mlp": "mirrored", "activation": "gelu", "mlp_dim": 769},
            "config.model.mlp_dim=769 must be even and at least 768, twice the width, for a mirrored MLP",
        ),
        (
            {"mlp": "mirrored", "activation": "gelu", "mlp_dim": 766},
            "config.model.mlp_dim=766 must be even and at least 768, twice the width, for a mirrored MLP",
        ),
        (
            {"mlp": "mirrored"},
            "config.model.activation='tailored_relu' is unknown; expected one of gelu, silu, relu",
        ),
        ({"depth": 6}, "config.model.c_val_0_target=0.9 is out of reach for depth 6 (12 activations)"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(overrides, message):
    if overrides.get("width") == 6:
        overrides = {**overrides, "num_heads": 2}
    with pytest.raises(UserError) as error:
        model_arguments(model_config(**overrides), (32, 48, 3))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_defaults_are_the_fields_that_the_factory_reads(name):
    config = default().model
    assert config.to_dict() == DEFAULTS
    config.name = name
    model_arguments(config, (32, 32, 3))


def test_the_kernel_for_attention_is_xla_unless_it_is_named():
    kernels = {"auto": "xla", "xla": "xla", "fused": "fused"}
    for name, kernel in kernels.items():
        assert model_arguments(model_config(attention_kernel=name), (32, 32, 3))["attention_kernel"] == kernel


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": 16}, "does tokens of 16 to 256, not 4"),
        ({"patch_size": 1}, "does tokens of 16 to 256, not 1024"),
        ({"num_heads": 48}, "does head width of 16 to 128, not 8"),
        ({"num_heads": 2}, "does head width of 16 to 128, not 192"),
    ],
)
def test_the_fused_kernel_says_what_it_cannot_do(overrides, message):
    with pytest.raises(UserError, match=message):
        model_arguments(model_config(attention_kernel="fused", **overrides), (32, 32, 3))
