"""The counts of docs/scaling.md beside what XLA compiles for eight fake devices."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import scaling
from benchmarks.flops import forward_flops
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.optimizers.shampoo import shampoo_plan
from simplest_vit.training.sharding import batch_sharding, create_mesh
from simplest_vit.training.state import abstract_state, apply_model, state_initializer
from simplest_vit.training.step import make_train_step
from tests.tiny import tiny_config

SHAPES = {"image_shape": (8, 8, 1), "num_classes": 10}
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"


def compiled(fsdp, argument="optimizer=adam", **overrides):
    """The state's description and the text of the train step on eight devices."""
    config = tiny_config(argument, **overrides)
    mesh = create_mesh(fsdp)
    tx = create_optimizer(config, optax.constant_schedule(1e-3), mesh)
    graphdef, initialize = state_initializer(config, **SHAPES, tx=tx)
    state = abstract_state(initialize, mesh)
    step = make_train_step(graphdef, tx, config, jax.tree.map(lambda x: x.sharding, state))
    batch = {
        name: jax.ShapeDtypeStruct((16, *shape), np.float32, sharding=batch_sharding(mesh))
        for name, shape in {"image": (8, 8, 1), "label": (10,), "weight": ()}.items()
    }
    return state, step.lower(state, batch).compile().as_text()


def result_bytes(hlo, kind):
    """Bytes of float32 that all collectives of a kind return, and how many numbers of them are single."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", hlo)
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        for line in lines
        for dims in re.findall(r"f32\[([\d,]*)\]", line)
    ]
    return 4 * sum(sizes), sum(size == 1 for size in sizes)


def test_data_parallel_sums_as_many_bytes_as_there_are_parameters():
    state, hlo = compiled(1)
    gradient = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    summed, scalars = result_bytes(hlo, "all-reduce")
    assert summed - 4 * scalars == gradient  # beside them: loss, correct and count
    assert 0 < scalars <= 4
    # Of those a device sends 2 (n - 1) / n.
    assert scaling.collective_bytes(gradient, 8) == (gradient * 7 / 8, 0)


def test_fsdp_gathers_as_many_bytes_as_the_kernels_have():
    state, hlo = compiled(8)
    split = 4 * sum(x.size for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated)
    assert result_bytes(hlo, "all-gather")[0] == split


def test_shampoo_gathers_the_updates_of_its_blocks():
    state, hlo = compiled(1, "optimizer=shampoo", model__depth=8)
    plan = shampoo_plan(state.params, stack_axes=paths.stack_axes)
    blocks = 4 * sum(stack.count * math.prod(stack.block_shape) for stack in plan.stacks)
    # Beside them some counters and matrices of single blocks, which devices cannot share.
    assert blocks <= result_bytes(hlo, "all-gather")[0] < 1.05 * blocks


def test_forward_flops_are_those_xla_counts():
    config = tiny_config(model__width=64, model__mlp_dim=256)
    graphdef, initialize = state_initializer(config, **SHAPES, tx=optax.identity())
    state = jax.eval_shape(initialize)
    images = jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)
    lowered = jax.jit(lambda *args: apply_model(graphdef, *args)).lower(state.params, state.constants, images)
    counted = lowered.cost_analysis()["flops"] / 8
    ours = forward_flops(state.params, 16)
    assert ours <= counted <= 1.1 * ours  # what is not a product: softmax, activations, biases


def test_two_levels_send_what_a_flat_ring_sends_of_a_node():
    size = 1e6
    for devices in (8, 64, 1024):
        within, between = scaling.collective_bytes(size, devices)
        assert within == size * 7 / 8
        # Through the links of a node goes, in all, one whole copy of what the other nodes have.
        assert between * 8 == pytest.approx(size * (1 - 8 / devices))


def test_work_is_shared_until_it_no_longer_divides():
    one, many = scaling.cost("S", "shampoo", 1), scaling.cost("S", "shampoo", 128)
    assert many.model_flops == one.model_flops / 128
    assert many.statistics_flops < one.statistics_flops / 30
    # Of each stack a device computes at least one block's roots in a step.
    assert many.root_flops < one.root_flops / 2
    assert scaling.cost("S", "shampoo", 1024).root_flops == many.root_flops
    assert scaling.cost("S", "fsdp", 8).state_bytes < scaling.cost("S", "data", 8).state_bytes / 7


def test_latency_counts_each_gather_and_scatter_of_a_layer():
    layers, levels = 12 + 1, 3  # of a tree over 8 nodes
    assert scaling.cost("S", "data", 8).hops == 0
    assert scaling.cost("S", "data", 64).hops == 2 * layers * levels
    assert scaling.cost("S", "fsdp", 64).hops == 3 * layers * levels
    assert scaling.cost("S", "fsdp", 1024).hops == scaling.cost("S", "data", 1024).hops  # nothing can be split
    assert scaling.cost("S", "shampoo", 64).hops - 2 * layers * levels in range(levels, 10 * levels, levels)


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_script_quick():
    page = DOCS.read_text()
    for variant in ("S", "L"):
        assert scaling.counts_table(variant) in page
        for hardware in scaling.HARDWARE:
            assert scaling.times_table(variant, hardware) in page
