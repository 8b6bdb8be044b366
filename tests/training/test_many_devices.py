"""Eight fake devices: the same training as on one, less memory on each, and checkpoints for any number."""

import functools
import re

import jax
import numpy as np
import pytest

from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.run import build
from simplest_vit.training.sharding import batch_sharding, bytes_per_device, create_mesh
from simplest_vit.training.state import RunProgress
from simplest_vit.training.step import make_eval_step
from tests.tiny import DIGITS, tiny_config

pytestmark = pytest.mark.slow  # two minutes of compiling for eight devices

# Name -> config argument and overrides.
RECIPES = {
    "adam": ("optimizer=adam", {"ema__decay": 0.9, "ema__every": 2}),
    "sam": ("optimizer=adam", {"sam__rho": 0.05, "sam__every": 2, "accumulation_steps": 2}),
    # Deep enough for each device to have slots of its own.
    "shampoo": ("optimizer=shampoo", {"optimizer__precondition_frequency": 4, "model__depth": 8}),
    "soap": ("optimizer=soap", {"optimizer__precondition_frequency": 4, "model__depth": 8}),
    "muon": ("optimizer=muon", {}),
    # No roots in these steps: their batched eigendecompositions on eight fake devices wait for each other for ever
    # (see `models/initializers.py`).
    "reference": ("optimizer=reference_shampoo", {}),
}
# (data, fsdp)
ONE, DATA, BOTH = (1, 1), (8, 1), (2, 4)


class Run:
    """A tiny run on a mesh, fed by noise."""

    def __init__(self, recipe, shape):
        argument, overrides = RECIPES[recipe]
        # At 3e-4, Shampoo's and SOAP's training amplifies rounding errors to more than these tests allow.
        config = tiny_config(argument, steps=40, optimizer__learning_rate=1e-4, **overrides)
        self.mesh = create_mesh(shape[1], jax.devices()[: shape[0] * shape[1]])
        self.run = build(config, DIGITS, self.mesh)
        self.graphdef, self.abstract, self.step = self.run.graphdef, self.run.abstract, self.run.train_step
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.create = self.run.create_state

    def batch(self, seed):
        rng = np.random.default_rng(seed)
        label = np.eye(10, dtype=np.float32)[rng.integers(10, size=16)]
        image = rng.normal(size=(16, 8, 8, 1)).astype(np.float32)
        batch = {"image": image, "label": label, "weight": np.ones(16, np.float32)}
        return jax.device_put(batch, batch_sharding(self.mesh))

    def train(self, state, steps):
        """The state and the loss of each step."""
        losses = []
        for step in steps:
            state, metrics = self.step(state, self.batch(step))
            losses.append(metrics["loss"] / metrics["count"])
        return state, np.array(losses)

    @functools.cached_property
    def hlo(self):
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.batch(0))
        return self.step.lower(self.abstract, batch).compile().as_text()


@functools.cache
def trained(recipe, shape):
    """A run with its state and losses after 20 steps."""
    run = Run(recipe, shape)
    return run, *run.train(run.create(), range(20))


def collectives(hlo):
    """(kind, shapes) of each collective of a compiled module."""
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for result, kind in re.findall(pattern, hlo):
        yield kind, [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", result)]


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ("adam", DATA),
        ("adam", BOTH),
        pytest.param("sam", BOTH, id="sam-quick"),
        ("sam", DATA),
        ("shampoo", DATA),
        pytest.param("shampoo", BOTH, id="shampoo-quick"),
        ("soap", DATA),
        ("soap", BOTH),
        ("muon", BOTH),
        ("reference", BOTH),
    ],
)
def test_eight_devices_train_as_one(recipe, shape):
    _, expected_state, expected = trained(recipe, ONE)
    run, state, losses = trained(recipe, shape)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    # Adam's first steps are as large for a rounding error as for a gradient.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), state.model_state, expected_state.model_state
    )
    # What comes out is laid out as what went in: one trace, and no copy between steps.
    assert run.step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, state) == run.shardings


@pytest.mark.parametrize("shape", [DATA, BOTH])
def test_the_state_is_donated_on_eight_devices(shape):
    run = Run("adam", shape)
    state = run.create()
    run.step(state, run.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.size > 1)


@pytest.mark.parametrize(("recipe", "shape"), [("adam", DATA), ("adam", BOTH), ("adam", (1, 8)), ("shampoo", BOTH)])
def test_memory_falls_as_computed(recipe, shape):
    run = Run(recipe, shape)
    state = run.create()
    fsdp = shape[1]
    kernels = {name: kernel for name, kernel in by_name(run.abstract.params).items() if name.endswith("kernel")}
    split = sum(kernel.size for kernel in kernels.values())
    whole = sum(x.size for x in jax.tree.leaves(run.abstract.params)) - split
    constants = sum(x.size for x in jax.tree.leaves(run.abstract.constants))
    if recipe == "adam":  # parameters, two moments and the average; three counters of the run, two of the optimizer
        expected = 4 * (4 * (split // fsdp + whole) + constants + 5)
    else:  # slots over all devices, or else another axis of each array that they divide; two counters of the optimizer
        arrays = by_name(run.abstract.opt_state).items()
        stacks = [(x.size * x.dtype.itemsize, x.shape) for name, x in arrays if "stacks" in name]
        shared = sum(size // (8 if any(n % 8 == 0 for n in shape) else 1) for size, shape in stacks)
        assert shared < sum(size for size, _ in stacks) / 6
        version = sum(x.size * x.dtype.itemsize for name, x in arrays if "version" in name)
        expected = 4 * (split // fsdp + whole + constants + 2 * whole + 5) + shared + version
    on_first = sum(
        shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards if shard.device.id == 0
    )
    assert on_first == bytes_per_device(run.abstract) == bytes_per_device(state) == expected


def by_name(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_data_parallel_training_sums_gradients_and_gathers_nothing():
    found = list(collectives(Run("adam", DATA).hlo))
    assert {kind for kind, _ in found} == {"all-reduce"}


def test_with_fsdp_kernels_are_gathered_layer_by_layer():
    run = Run("adam", BOTH)
    gathered = [shape for kind, shapes in collectives(run.hlo) for shape in shapes if kind == "all-gather"]
    squeezed = sorted(tuple(n for n in shape if n > 1) for shape in gathered)
    kernels = {name: x.shape for name, x in by_name(run.abstract.params).items() if name.endswith("kernel")}
    layers = [shape[-2:] for shape in kernels.values() for _ in shape[:-2] and range(shape[0])]
    whole = [shape for shape in kernels.values() if len(shape) == 2]
    assert squeezed == sorted(layers + whole)
    assert {kind for kind, _ in collectives(run.hlo)} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_shampoo_gathers_updates_and_exchanges_blocks():
    run = Run("shampoo", DATA)
    assert {kind for kind, _ in collectives(run.hlo)} == {"all-gather", "all-reduce", "all-to-all"}


@pytest.mark.parametrize(
    ("recipe", "before", "after"),
    [
        ("adam", BOTH, ONE),
        ("adam", ONE, BOTH),
        pytest.param("shampoo", BOTH, ONE, id="shampoo-quick"),
        ("shampoo", ONE, BOTH),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_devices(tmp_path, recipe, before, after):
    first, second = trained(recipe, before)[0], trained(recipe, after)[0]
    state, _ = first.train(first.create(), range(12))
    with Checkpoints(tmp_path, create=True) as checkpoints:
        checkpoints.save(state, RunProgress(), 12)
        checkpoints.wait()
        restored, _ = checkpoints.restore(second.abstract, 12)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == second.shardings
    _, expected = first.train(state, range(12, 20))
    _, losses = second.train(restored, range(12, 20))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [ONE, DATA, BOTH, (3, 1)])
def test_evaluation_counts_each_example_once_on_any_number_of_devices(shape):
    run = Run("adam", shape)
    state = run.create().model_state
    size = 24
    rng = np.random.default_rng(0)
    image = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    label = np.eye(10, dtype=np.float32)[rng.integers(10, size=size)]
    weight = (np.arange(size) < 19).astype(np.float32)
    batch = jax.device_put({"image": image, "label": label, "weight": weight}, batch_sharding(run.mesh))
    sums = make_eval_step(run.graphdef, run.mesh)(state.params, state.constants, batch)
    alone = Run("adam", ONE)
    state = alone.create().model_state
    real = {"image": image[:19], "label": label[:19], "weight": weight[:19]}
    expected = make_eval_step(alone.graphdef, alone.mesh)(state.params, state.constants, real)
    assert int(sums["count"]) == 19
    assert int(sums["correct"]) == int(expected["correct"])
    np.testing.assert_allclose(sums["loss"], expected["loss"], rtol=1e-5)
    assert all(x.is_fully_replicated for x in sums.values())
