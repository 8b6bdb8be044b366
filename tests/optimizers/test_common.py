"""What every optimizer that the project offers must do: one table, one test for each property."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from simplest_vit.optimizers.factory import create_optimizer

# Those of the recipes as a run makes them, and others of optax.
TABLE = {
    "adam": {},
    "muon": {},
    "lion": {},
    "nadamw": {},
    "shampoo": {"precondition_frequency": 5, "max_preconditioner_dim": 4},
    "reference_shampoo": {"precondition_frequency": 5},
    "soap": {"precondition_frequency": 3, "max_preconditioner_dim": 4},
}
TABLE = {name: functools.partial(create_optimizer, name, **given) for name, given in TABLE.items()}
every_optimizer = pytest.mark.parametrize("create", TABLE.values(), ids=TABLE)
RATE = optax.constant_schedule(1e-3)


def parameters(dtype=jnp.float32):
    """A layer of one stacked block, and a head."""
    shapes = {"blocks": {"kernel": (1, 6, 4), "bias": (1, 4)}, "head": {"kernel": (4, 3)}}
    shapes, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return treedef.unflatten(
        [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]
    )


def placed(tree):
    """On a named device, as what is restored: so both run the same compiled program."""
    return jax.device_put(tree, jax.devices()[0])


@functools.cache
def made(create):
    """An optimizer and its compiled update."""
    tx = create(RATE)
    return tx, jax.jit(tx.update)


def loss(params):
    """An ill-conditioned quadratic with its minimum at 1."""
    scales = {6: jnp.logspace(0, -2, 6)[:, None], 4: jnp.logspace(0, -1, 4)[:, None]}
    kernels = params["blocks"]["kernel"][0], params["head"]["kernel"]
    parts = [jnp.sum(scales[len(kernel)] * jnp.square(kernel - 1)) for kernel in kernels]
    return sum(parts) + jnp.sum(jnp.square(params["blocks"]["bias"] - 1))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@every_optimizer
def test_converges_without_recompilation(create):
    tx = create(optax.cosine_decay_schedule(0.3, 200))

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
    tx = create(RATE)
    params = parameters(jnp.bfloat16)
    state = after = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(7):  # some of them preconditioned
        updates, after = update(params, after, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    types = [jax.tree.map(lambda x: (x.shape, jnp.result_type(x)), tree) for tree in (state, after)]
    assert types[0] == types[1]


@every_optimizer
def test_a_checkpoint_restores_exactly(create, tmp_path):
    tx, update = made(create)
    params = placed(parameters())
    state = placed(tx.init(params))
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
    tx, update = made(create)
    params = placed(parameters())
    zero = jax.tree.map(jnp.zeros_like, params)
    state = placed(tx.init(params))
    for _ in range(7):
        updates, state = update(zero, state, params)
        assert_same(updates, zero)


@every_optimizer
def test_none_stays_none(create):
    tx, update = made(create)
    params = placed(parameters() | {"frozen": None})
    updates, _ = update(params, placed(tx.init(params)), params)
    assert updates["frozen"] is None
    assert np.all(np.isfinite(updates["blocks"]["kernel"]))
