"""Shampoo and SOAP need fewer steps than Adam, each at the best of a sweep of learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import steps_to_goal
from simplest_vit.optimizers.shampoo import scale_by_shampoo, scale_by_soap

ADAM = optax.scale_by_adam()
OURS = {
    "shampoo": scale_by_shampoo(precondition_frequency=5, max_preconditioner_dim=64),
    "soap": scale_by_soap(precondition_frequency=5, max_preconditioner_dim=64),
}


def losses(tx, loss, params, batches, rates):
    """The loss before each step: (rates, steps)."""

    @jax.jit
    def run(rate, params):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            updates = jax.tree.map(lambda update: -rate * update, updates)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    return np.stack([run(rate, params) for rate in rates])


def steps_to(target, curves):
    """The fewest steps, over learning rates, until the loss is at most the target."""
    reached = [np.argmax(curve <= target) for curve in curves if np.any(curve <= target)]
    return min(reached, default=np.inf)


@pytest.mark.parametrize("name", OURS)
def test_ill_conditioned_least_squares(name):
    """||A X B - C||^2 with condition numbers 100 and 30 on the two sides, rotated against the axes."""
    rng = np.random.default_rng(0)

    def matrix(n, condition):
        (q, _), (r, _) = np.linalg.qr(rng.normal(size=(n, n))), np.linalg.qr(rng.normal(size=(n, n)))
        return jnp.asarray((q * np.logspace(0, -np.log10(condition), n)) @ r, jnp.float32)

    left, right = matrix(16, 100), matrix(12, 30)
    target = left @ jnp.asarray(rng.normal(size=(16, 12)), jnp.float32) @ right

    def loss(params, _):
        return jnp.sum(jnp.square(left @ params["x"] @ right - target))

    params, steps, rates = {"x": jnp.zeros((16, 12))}, jnp.zeros(400), (0.3, 0.1, 0.03, 0.01, 0.003)
    adam = losses(ADAM, loss, params, steps, rates)
    ours = losses(OURS[name], loss, params, steps, rates)
    goal = 1e-4 * adam[0, 0]
    assert steps_to(goal, ours) < 0.8 * steps_to(goal, adam)


def test_soap_needs_no_more_steps_than_the_published_one(monkeypatch):
    """Three seeds of a classifier of digits, refreshed every 10 steps, at both ones' best rate (docs/shampoo.md)."""
    monkeypatch.setattr(steps_to_goal, "STEPS", 100)  # the goals are reached after about 50
    problem = steps_to_goal.PROBLEMS["classifier 64-64-64-10, ReLU"]
    needed = {}
    for name in ("SOAP@10, published", "SOAP@10"):
        run = steps_to_goal.make_run(problem, steps_to_goal.OPTIMIZERS[name][0])
        curves = [np.asarray(run(seed, 0.03)) for seed in steps_to_goal.SEEDS]
        needed[name] = [sum(steps_to_goal.steps_to(curve, goal) for curve in curves) for goal in problem.goals]
    assert np.all(np.less_equal(needed["SOAP@10"], needed["SOAP@10, published"])), needed
