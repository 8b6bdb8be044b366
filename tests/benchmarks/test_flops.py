"""The FLOPs of a step, counted by hand."""

import pytest

from benchmarks.flops import step_flops
from simplest_vit.training.run import build
from tests.tiny import DIGITS, tiny_config


@pytest.mark.parametrize(
    ("name", "attention", "kernels", "products"),
    [("isometric_vit", "shift", 3, 2), ("isometric_vit", "fixed_shift", 1, 0), ("shift_mlp", "spatial_shift", 0, 0)],
)
def test_a_step_counts_kernels_and_products_of_tokens(name, attention, kernels, products):
    run = build(tiny_config(model__name=name, model__attention=attention), DIGITS)
    model = run.config.model
    tokens, patch = (8 // model.patch_size) ** 2, model.patch_size**2
    block = kernels * model.width**2 + 2 * model.width * model.mlp_dim + products * tokens * model.width
    forward = 2 * (tokens * (patch * model.width + model.depth * block) + model.width * 10)
    assert step_flops(run) == 3 * run.config.batch_size * forward
