import math
import re

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from simplest_vit.errors import UserError
from simplest_vit.models import fused_attention
from simplest_vit.models.initializers import scaled_uniform_orthogonal
from simplest_vit.training import run as run_module
from simplest_vit.training.run import build
from simplest_vit.training.sharding import bytes_per_device, check_batch_size, create_mesh, memory_line, state_shardings
from tests.tiny import DIGITS, tiny_config


@pytest.fixture(scope="module")
def run():
    return build(tiny_config(), DIGITS, create_mesh())


def test_initialization_is_a_function_of_the_seed(run):
    first, again = run.create_state(), run.create_state()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = build(tiny_config(seed=1), DIGITS, create_mesh()).create_state()
    assert not np.array_equal(first.params["head"]["kernel"], other.params["head"]["kernel"])


class Kernel(nnx.Module):
    """One orthogonal kernel: drawn from a normal distribution, then decomposed."""

    def __init__(self, *_, rngs, **__):
        self.kernel = nnx.Param(scaled_uniform_orthogonal(rngs.params(), (16, 32)))


def test_initialization_is_compiled_fast_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(run_module, "create_model", Kernel)
    run = build(tiny_config(), DIGITS, create_mesh(devices=jax.devices()[:1]))
    expected = jax.jit(run.initialize, compiler_options={"xla_backend_optimization_level": 3})()
    monkeypatch.delenv("XLA_FLAGS")  # the level of the tests
    jax.tree.map(np.testing.assert_array_equal, run.create_state(), expected)


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


def test_a_run_needs_jit():
    jax.config.update("jax_disable_jit", True)  # as JAX_DISABLE_JIT=1 does
    try:
        with pytest.raises(UserError, match=r"^JAX_DISABLE_JIT is set, and a run needs jit; unset it$"):
            build(tiny_config(), DIGITS)
    finally:
        jax.config.update("jax_disable_jit", False)


@pytest.mark.parametrize(("section", "switch"), [("ema", "ema__decay"), ("sam", "sam__rho")])
def test_a_run_is_long_enough_for_its_average_and_sam(section, switch):
    """The average would be that of the first weights alone."""
    config = tiny_config(**{switch: 0.5, f"{section}__every": 7})
    with pytest.raises(UserError, match=rf"^config.{section}.every=7 exceeds the run's 6 steps; lower it$"):
        build(config, DIGITS)
    config[section].every = 6
    build(config, DIGITS)


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


# Path -> shape, how it is split over two copies of two devices each, and into how many parts.
SPLITS = {
    "params/blocks/kernel": ((64, 16, 32), P(None, None, "fsdp"), 2),
    "params/blocks/odd": ((64, 15, 33), P(), 1),
    "params/blocks/bias": ((64, 16), P(), 1),
    "params/head/kernel": ((65, 16), P(None, "fsdp"), 2),
    "params/head/bias": ((16,), P(), 1),
    "ema_params/head/kernel": ((640, 160), P("fsdp"), 2),
    "opt_state/mu/blocks/kernel": ((64, 32, 16), P(None, "fsdp"), 2),
    "opt_state/stacks/statistics": ((8, 64, 64), P(("data", "fsdp")), 4),
    "opt_state/stacks/few": ((6, 64, 64), P(None, ("data", "fsdp")), 4),
    "opt_state/stacks/odd": ((3, 5, 5), P(), 1),
    "constants/blocks/attention_bias": ((12, 64, 64), P(), 1),
    "step": ((), P(), 1),
}


@pytest.mark.parametrize("fsdp", [1, 2])
def test_arrays_are_split_by_what_they_are(fsdp):
    """Kernels, never along layers; the stacks of Shampoo over all devices; the rest is whole."""
    mesh = create_mesh(fsdp, jax.devices()[:4])
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, (shape, _, _) in SPLITS.items()}
    tree = traverse_util.unflatten_dict(shapes, "/")
    shardings = state_shardings(tree, mesh)
    split = {name: fsdp == 2 or "stacks" in name for name in SPLITS}
    found = {name: sharding.spec for name, sharding in traverse_util.flatten_dict(shardings, sep="/").items()}
    assert found == {name: spec if split[name] else P() for name, (_, spec, _) in SPLITS.items()}
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)
    expected = sum(4 * math.prod(shape) // (parts if split[name] else 1) for name, (shape, _, parts) in SPLITS.items())
    assert bytes_per_device(state) == expected
    line = memory_line(state)
    assert f"data {4 // fsdp} x fsdp {fsdp}" in line
    assert f"{expected / 1e6:.1f} MB" in line


def test_what_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"config.fsdp=3 does not divide the 8 devices"):
        create_mesh(3)
    mesh = create_mesh(2)
    check_batch_size(64, 8, mesh)
    with pytest.raises(UserError, match=r"config.batch_size=12 cannot be split over 8 devices"):
        check_batch_size(12, 1, mesh)
    with pytest.raises(
        UserError, match=r"config.batch_size=16 .* 8 devices x 4 micro-batches; choose a multiple of 32,"
    ):
        check_batch_size(16, 4, mesh)
