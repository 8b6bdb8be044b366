import jax
import numpy as np
import optax
import pytest

from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.training import run as run_module
from simplest_vit.training.run import build
from simplest_vit.training.sharding import batch_sharding, create_mesh
from simplest_vit.training.step import apply_model, make_eval_step
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


def run(config, tx, steps=3, devices=1, batch=None):
    """The state and the metrics after some steps."""
    made, state = start(config, tx, devices)
    for i in range(steps):
        part = batch_of(seed=i) if batch is None else batch
        state, metrics = made.train_step(state, jax.device_put(part, batch_sharding(made.mesh)))
    return made, state, metrics, made.train_step


def mean_loss(made, config, state, batch):
    def loss(params):
        logits = apply_model(made.graphdef, params, state.constants, batch["image"])
        label = (1 - config.label_smoothing) * batch["label"] + config.label_smoothing / 10
        return optax.softmax_cross_entropy(logits, label).mean()

    return loss


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def test_a_step_is_plain_gradient_descent_on_the_smoothed_loss():
    config = tiny_config(label_smoothing=0.1)
    made, state = start(config, optax.sgd(0.1))
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss(made, config, state, batch_of())))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    _, after, metrics, _ = run(config, optax.sgd(0.1), steps=1, batch=batch_of())
    assert_close(after.params, expected)
    np.testing.assert_allclose(metrics["loss"] / metrics["count"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert after.step == 1


def test_the_whole_run_traces_once():
    *_, train_step = run(tiny_config(), optax.adam(1e-3), steps=5)
    assert train_step._cache_size() == 1


def test_the_state_is_donated():
    config = tiny_config()
    made, state = start(config, optax.adam(1e-3))
    kernel = state.params["head"]["kernel"]
    made.train_step(state, batch_of())
    assert kernel.is_deleted()


def test_accumulation_equals_the_whole_batch():
    _, whole, whole_metrics, _ = run(tiny_config(), optax.sgd(0.1))
    _, parts, parts_metrics, _ = run(tiny_config(accumulation_steps=4), optax.sgd(0.1))
    assert_close(parts.params, whole.params)
    assert_close(parts_metrics, whole_metrics, rtol=1e-4)


def test_eight_devices_equal_one():
    _, one, _, _ = run(tiny_config(), optax.sgd(0.1))
    _, eight, _, _ = run(tiny_config(), optax.sgd(0.1), devices=8)
    assert_close(eight.params, one.params)


def test_sam_descends_from_the_worst_point_near_by_every_second_step():
    config = tiny_config(sam__rho=0.05, sam__every=2)
    made, state = start(config, optax.sgd(0.1))
    params = jax.device_get(state.params)
    gradient_of = jax.jit(jax.grad(mean_loss(made, config, state, batch_of())))
    for step in range(2):
        gradient = jax.device_get(gradient_of(params))
        if step % 2 == 0:
            norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
            worst = jax.tree.map(lambda p, g: p + 0.05 * g / norm, params, gradient)  # noqa: B023
            gradient = jax.device_get(gradient_of(worst))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    _, after, _, _ = run(config, optax.sgd(0.1), steps=2, batch=batch_of())
    assert_close(after.params, params, rtol=1e-4, atol=1e-5)


def test_the_average_moves_every_second_step():
    made, state = start(tiny_config(ema__decay=0.9, ema__every=2), optax.sgd(0.1))
    average = jax.device_get(state.params)
    for step in range(1, 6):
        state, _ = made.train_step(state, batch_of(seed=step))
        if step % 2 == 0:
            average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, jax.device_get(state.params))
        assert_close(state.ema_params, average)
    assert_close(state.model_state.params, state.ema_params)


def test_dropout_changes_training_but_not_evaluation():
    dry, wet = tiny_config(), tiny_config(model__dropout=0.5)
    losses = [run(config, optax.sgd(0.1), steps=1, batch=batch_of())[2]["loss"] for config in (dry, wet)]
    assert losses[0] != losses[1]
    # Each step has a mask of its own.
    made, state = start(wet, optax.sgd(0.0))
    state, first = made.train_step(state, batch_of())
    assert first["loss"] != made.train_step(state, batch_of())[1]["loss"]
    sums = []
    for config in (dry, wet):
        made, state = start(config, optax.sgd(0.1))
        sums.append(make_eval_step(made.graphdef, made.mesh)(state.params, state.constants, batch_of()))
    assert_close(*sums)


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
