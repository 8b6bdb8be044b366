"""What every optimizer that the project offers must do: one table, one test for each property."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from simplest_vit.optimizers.factory import OPTIMIZERS
from simplest_vit.optimizers.shampoo import shampoo, soap

TABLE = {
    "adam": lambda rate: optax.adam(rate),
    "muon": lambda rate: optax.contrib.muon(rate),
    "shampoo": lambda rate: shampoo(rate, precondition_frequency=5, max_preconditioner_dim=4),
    "shampoo reference": lambda rate: shampoo(rate, preset="reference", precondition_frequency=5),
    "soap": lambda rate: soap(rate, precondition_frequency=3, max_preconditioner_dim=4),
}
every_optimizer = pytest.mark.parametrize("create", TABLE.values(), ids=TABLE)


def parameters(dtype=jnp.float32):
    key_a, key_b = jax.random.split(jax.random.key(0))
    kernel, bias = jax.random.normal(key_a, (6, 4)), jax.random.normal(key_b, (4,))
    return {"layer": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}


def loss(params):
    """An ill-conditioned quadratic with its minimum at 1."""
    scale = jnp.logspace(0, -2, 6)[:, None]
    kernel, bias = params["layer"]["kernel"], params["layer"]["bias"]
    return jnp.sum(scale * jnp.square(kernel - 1)) + jnp.sum(jnp.square(bias - 1))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_table_is_complete():
    assert set(OPTIMIZERS) <= set(TABLE)


@every_optimizer
def test_converges_without_recompilation(create):
    tx = create(optax.cosine_decay_schedule(0.1, 200))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = parameters()
    state = tx.init(params)
    start = loss(params)
    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 1e-3 * start
    assert step._cache_size() == 1


@every_optimizer
def test_types_and_structure_are_preserved(create):
    tx = create(1e-3)
    params = parameters(jnp.bfloat16)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    types = [jax.tree.map(lambda x: (x.shape, jnp.result_type(x)), tree) for tree in (state, after)]
    assert types[0] == types[1]


@every_optimizer
def test_a_checkpoint_restores_exactly(create, tmp_path):
    tx = create(1e-3)
    params = parameters()
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(6):
        _, state = update(params, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(update(params, state, params), update(params, restored, params))


@every_optimizer
def test_zero_gradients_give_zero_updates(create):
    tx = create(1e-3)
    params = parameters()
    zero = jax.tree.map(jnp.zeros_like, params)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(7):
        updates, state = update(zero, state, params)
        assert_same(updates, zero)


@every_optimizer
def test_none_stays_none(create):
    tx = create(1e-3)
    params = parameters()
    params["frozen"] = None
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["frozen"] is None
    assert np.all(np.isfinite(updates["layer"]["kernel"]))


@every_optimizer
def test_masked_and_multi_transform(create):
    params = parameters() | {"other": {"kernel": jnp.ones((3, 3))}}
    alone, _ = jax.jit(create(1e-3).update)(parameters(), create(1e-3).init(parameters()), parameters())
    labels = {"layer": "ours", "other": "frozen"}
    masked = optax.masked(create(1e-3), {"layer": True, "other": False})
    multi = optax.multi_transform({"ours": create(1e-3), "frozen": optax.set_to_zero()}, labels)
    for tx, other in ((masked, params["other"]), (multi, jax.tree.map(jnp.zeros_like, params["other"]))):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        for a, b in zip(jax.tree.leaves(updates["layer"]), jax.tree.leaves(alone["layer"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)
        assert_same(updates["other"], other)
