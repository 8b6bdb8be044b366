"""What XLA makes of training for a GPU, compiled without one: nothing in a step waits for the host.

Needs JAX's CUDA plugin (docs/gpu.md), which `.ci/run` brings; skipped without.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from configs import cifar10
from simplest_vit.data.augment import Preprocessing
from simplest_vit.data.input_pipeline import train_batch

if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    if os.environ.get("SIMPLEST_VIT_REQUIRE_GPU_COMPILER"):
        raise ImportError("the tests of what is compiled for a GPU need jax-cuda13-pjrt and jax-cuda13-plugin")
    pytest.skip("needs JAX's CUDA plugin", allow_module_level=True)

from benchmarks import compiled, fake_data

SIZES = {"model.depth": 7, "model.width": 64, "model.num_heads": 2, "model.mlp_dim": 128, "batch_size": 32}


def small(arguments, **overrides):
    config = cifar10.get_config(arguments)
    config.update_from_flattened_dict(SIZES | {name.replace("__", "."): value for name, value in overrides.items()})
    return config


@pytest.mark.parametrize(
    "config",
    [
        small("optimizer=adam", ema__decay=0.9, sam__rho=0.05, sam__every=1),
        small("optimizer=muon", accumulation_steps=2),
        small("optimizer=shampoo", optimizer__precondition_frequency=4),
        small("optimizer=soap", optimizer__precondition_frequency=4),
        small("model=isometric_vit,optimizer=adam"),
        small("model=simple_vit,optimizer=adam"),
    ],
    ids=["adam", "muon", "shampoo", "soap", "isometric", "simple_vit"],
)
def test_a_step_waits_for_nothing(config):
    row, _ = compiled.describe(config, {})
    # SOAP refreshes all bases in its first steps: the length of that loop is read by the host.
    assert row["host_waits"] == (config.optimizer.name == "soap")
    times = 7 * (2 if config.sam.rho else 1)
    assert row["custom_calls"] == {"attention_forward": times, "attention_backward": times}


@pytest.mark.parametrize("mode", ["batch", "example"])
def test_a_batch_waits_for_nothing(mode):
    config = small("augmentation=strong", data__cutmix_alpha=1.0, data__mixup_mode=mode).data
    data = fake_data.info((32, 32, 3), 10)
    sample = functools.partial(train_batch, preprocessing=Preprocessing.of(data, config), batch_size=32, sharding=None)
    split = jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.uint8), jax.ShapeDtypeStruct((1000,), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.uint32)
    _, program = compiled.compile_for(compiled.target(), jax.jit(sample), *split, number, number)
    assert program.host_waits == 0
