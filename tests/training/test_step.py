import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.training import run as run_module
from simplest_vit.training.run import build
from simplest_vit.training.sharding import batch_sharding, create_mesh
from simplest_vit.training.step import make_eval_step
from tests.tiny import DIGITS, tiny_config


def batch_of(size=16, seed=0):
    rng = np.random.default_rng(seed)
    label = np.eye(10, dtype=np.float32)[rng.integers(10, size=size)]
    image = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": label, "weight": np.ones(size, np.float32)}


def start(config, tx, devices=1):
    """A run with the given optimizer, and its state at step 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "create_optimizer", lambda *_, **__: tx)
        made = build(config, DIGITS, create_mesh(devices=jax.devices()[:devices]))
    return made, made.create_state()


def mean_loss(made, state, batch):
    def loss(params):
        logits = nnx.merge(made.graphdef, params, state.constants)(batch["image"])
        smoothing = made.config.label_smoothing
        return optax.softmax_cross_entropy(logits, (1 - smoothing) * batch["label"] + smoothing / 10).mean()

    return loss


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


@functools.cache
def plain():
    """The state at the start and after each of three steps, the run, and the last metrics."""
    made, state = start(tiny_config(label_smoothing=0.1), optax.sgd(0.1))
    states = [jax.tree.map(np.array, state)]
    for i in range(3):
        kernel = state.params["head"]["kernel"]
        state, metrics = made.train_step(state, batch_of(seed=i))
        assert kernel.is_deleted(), "the state is donated"
        states.append(jax.tree.map(np.array, state))
    return states, made, metrics


def test_a_step_is_plain_gradient_descent_on_the_smoothed_loss():
    states, made, metrics = plain()
    before, after = states[-2:]
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss(made, before, batch_of(seed=2))))(before.params)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, before.params, gradient))
    np.testing.assert_allclose(metrics["loss"] / metrics["count"], loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert after.step == 3


@pytest.mark.parametrize(("accumulation_steps", "devices"), [(4, 1), (1, 8)])
def test_parts_and_devices_equal_the_whole_batch(accumulation_steps, devices):
    states, _, whole_metrics = plain()
    config = tiny_config(label_smoothing=0.1, accumulation_steps=accumulation_steps)
    made, state = start(config, optax.sgd(0.1), devices)
    for i in range(3):
        state, metrics = made.train_step(state, jax.device_put(batch_of(seed=i), batch_sharding(made.mesh)))
    assert_close(state.params, states[-1].params)
    assert_close(metrics, whole_metrics, rtol=1e-4)


def test_dropout_changes_training_but_not_evaluation():
    dry, _ = start(tiny_config(), optax.sgd(0.0))
    wet, state = start(tiny_config(model__dropout=0.5), optax.sgd(0.0))
    batch = batch_of()
    sums = [make_eval_step(made.graphdef, made.mesh)(state.params, state.constants, batch) for made in (dry, wet)]
    assert_close(*sums)
    # Each step has a mask of its own.
    state, first = wet.train_step(state, batch)
    assert len({float(sums[0]["loss"]), float(first["loss"]), float(wet.train_step(state, batch)[1]["loss"])}) == 3


@pytest.mark.parametrize(("optimizer", "devices"), [("adam", 8), ("shampoo", 1)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(optimizer, devices):
    config = tiny_config(f"optimizer={optimizer}", ema__decay=0.9, ema__every=1, sam__rho=0.05)
    tx = create_optimizer(optimizer, 1e-3)
    made, state = start(config, tx, devices)
    train_step = made.train_step
    good = jax.device_put(batch_of(), batch_sharding(create_mesh(devices=jax.devices()[:devices])))
    # One bad pixel, on one device: all must skip.
    image = batch_of()["image"]
    image[3, 2, 1, 0] = np.inf
    bad = good | {"image": jax.device_put(image, batch_sharding(create_mesh(devices=jax.devices()[:devices])))}
    state, _ = train_step(state, good)
    before = jax.tree.map(np.array, state)
    for in_a_row in (1, 2):
        state, metrics = train_step(state, bad)
        assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (in_a_row, in_a_row)
        assert (metrics["loss"], metrics["count"]) == (0, 0)
    for name in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (3, 2, 2)
    state, metrics = train_step(state, good)
    assert np.isfinite(metrics["grad_norm"])
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (4, 2, 0)
    assert not np.array_equal(state.params["head"]["kernel"], before.params["head"]["kernel"])
    assert train_step._cache_size() == 1
