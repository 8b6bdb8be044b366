import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from simplest_vit.models import fused_attention
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh, state_spec
from tests.tiny import DIGITS, tiny_config


@pytest.fixture(scope="module")
def run():
    return build(tiny_config(), DIGITS, create_mesh())


def test_initialization_is_a_function_of_the_seed(run):
    first, again = run.create_state(), run.create_state()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = build(tiny_config(seed=1), DIGITS, create_mesh()).create_state()
    assert not np.array_equal(first.params["head"]["kernel"], other.params["head"]["kernel"])


def test_the_state_is_on_every_device_as_announced(run):
    for leaf, announced in zip(jax.tree.leaves(run.create_state()), jax.tree.leaves(run.abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (announced.shape, announced.dtype, announced.sharding)
        assert len(leaf.sharding.device_set) == jax.device_count()


def test_no_orthogonal_kernel_is_drawn_by_a_batched_qr(run):
    """Two batched QRs at once hang for ever on a CPU of two cores (see `initializers.py`)."""
    lowered = jax.jit(run.initialize).lower().as_text()
    results = re.findall(r"lapack_sgeqrf_ffi.*?-> \(tensor<([0-9x]+)xf32>", lowered)
    assert results
    assert all(len(shape.split("x")) == 2 for shape in results), results


@pytest.mark.parametrize("kernel", ["xla", "fused"])
def test_a_run_takes_the_attention_kernel_that_suits_its_devices(monkeypatch, kernel):
    asked = []

    def choose(*arguments, **sizes):
        asked.append((*arguments, sizes))
        return kernel

    monkeypatch.setattr(fused_attention, "choose", choose)
    config = tiny_config(model__width=64)
    run = build(config, DIGITS, create_mesh(devices=jax.devices()[:2]))
    assert asked == [("auto", jax.devices()[:2], {"tokens": 16, "head_width": 32})]
    assert nnx.merge(run.graphdef, run.abstract.params, run.abstract.constants).attention_kernel == kernel
    assert run.config.model.attention_kernel == config.model.attention_kernel == "auto"  # the same on other devices


def test_fsdp_splits_the_longest_axis_of_kernels_but_never_layers():
    mesh = create_mesh(2, jax.devices()[:4])

    def spec(shape, *names):
        return state_spec(tuple(map(jax.tree_util.DictKey, ("params", *names))), shape, mesh)

    assert spec((64, 16, 32), "blocks", "kernel") == P(None, None, "fsdp")
    assert spec((64, 16), "blocks", "bias") == P()
    assert spec((64, 16), "head", "kernel") == P("fsdp")
