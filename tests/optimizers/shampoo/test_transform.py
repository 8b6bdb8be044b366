"""What holds whatever the numbers: refresh, robustness, layouts and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from simplest_vit.optimizers.shampoo import (
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    shampoo_metrics,
    soap,
    view_as,
)
from simplest_vit.optimizers.shampoo.options import resolve_options
from simplest_vit.optimizers.shampoo.refresh import phases_due, slot_table

FACTORIES = [scale_by_shampoo, scale_by_soap]


def normal(seed, tree):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
    return jax.tree.map(lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype), keys, tree)


def run(tx, params, steps, gradients=normal, state=None):
    state = tx.init(params) if state is None else state
    update, history = jax.jit(tx.update), []
    for seed in range(steps):
        updates, state = update(gradients(seed, params), state)
        history.append(updates)
    return history, state


def assert_same(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("counts", "phases"), [((128, 128, 4, 4, 1), 25), ((8, 3), 4), ((1,), 5), ((16,), 1)])
def test_every_slot_has_one_phase_whatever_the_devices(counts, phases, devices):
    table = slot_table(counts, 8, devices, phases)
    local = [count // devices if count % devices == 0 else count for count in counts]
    for rows in table:
        slots = rows[rows < sum(local)]
        assert sorted(slots) == list(range(sum(local)))
    shared = sum(n for n, count in zip(local, counts, strict=True) if count % 8 == 0)
    assert table.shape[2] <= -(-shared // phases) + -(-(sum(local) - shared) // phases)


@pytest.mark.parametrize("frequency", [3, 7])
def test_stagger_takes_each_phase_once_a_period(frequency):
    options = resolve_options("fast", precondition_frequency=frequency)

    def phases_at(step):
        begin, number = phases_due(jnp.asarray(step), 3, options)
        return list(range(int(begin), int(begin + number)))

    assert not any(phases_at(step) for step in range(1, frequency))
    assert phases_at(frequency) == [0, 1, 2]
    period = [phases_at(frequency + step) for step in range(1, frequency + 1)]
    assert period == [[0], [1], [2]] + [[]] * (frequency - 3)


def test_stagger_with_frequency_one_is_all_at_once():
    params = {"kernel": jnp.zeros((12, 8))}
    settings = {"precondition_frequency": 1, "max_preconditioner_dim": 4}
    staggered, _ = run(scale_by_shampoo(stagger=True, **settings), params, 4)
    at_once, _ = run(scale_by_shampoo(stagger=False, **settings), params, 4)
    assert_same(staggered, at_once)


@pytest.mark.parametrize("factory", FACTORIES)
def test_blocks_and_layers_are_independent(factory):
    """A stack of layers cut into blocks equals each block alone, in any shards."""
    settings = {"precondition_frequency": 2, "stagger": False, "start_preconditioning_step": 2}
    whole = {"kernel": jnp.zeros((3, 8, 4)), "bias": jnp.zeros((3, 4))}
    tx = factory(stack_axes={"kernel": 1, "bias": 1}, max_preconditioner_dim=4, shards=4, **settings)
    history, _ = run(tx, whole, 5)
    split = {
        "kernel": [[jnp.zeros((4, 4)) for _ in range(2)] for _ in range(3)],
        "bias": [jnp.zeros(4) for _ in range(3)],
    }

    def cut(tree):
        kernels = [[layer[:4], layer[4:]] for layer in tree["kernel"]]
        return {"kernel": kernels, "bias": list(tree["bias"])}

    alone, _ = run(factory(**settings), split, 5, lambda seed, _: cut(normal(seed, whole)))
    assert_same([cut(updates) for updates in history], alone)


@pytest.mark.parametrize(("factory", "bad"), [(scale_by_shampoo, 1e30), (scale_by_soap, jnp.nan)])
def test_a_bad_gradient_does_not_enter_the_state(factory, bad):
    params = {"kernel": jnp.ones((6, 4)), "other": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    tx = factory(precondition_frequency=1)
    _, state = run(tx, params, 2)
    grads = jax.tree.map(jnp.ones_like, params)
    grads["kernel"] = grads["kernel"].at[1, 2].set(bad)
    updates, after = jax.jit(tx.update)(grads, state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))
    rows = [stack.factors[0].statistics for stack in state.stacks if stack.mu.shape[1:] == (6, 4)]
    kept = [stack.factors[0].statistics for stack in after.stacks if stack.mu.shape[1:] == (6, 4)]
    np.testing.assert_array_equal(rows[0], kept[0])
    # A gradient that is missing counts as such.
    updates, _ = jax.jit(tx.update)({**grads, "kernel": None}, state, params)
    assert updates["kernel"] is None
    assert np.all(np.isfinite(updates["bias"]))


def test_a_rejected_root_keeps_the_old_one_and_is_counted():
    params = {"kernel": jnp.ones((6, 4))}
    tx = scale_by_shampoo(precondition_frequency=1, max_residual=1e-12)
    _, state = run(optax.chain(optax.clip(1.0), tx), params, 3)
    metrics = jax.jit(shampoo_metrics)(state)
    assert metrics["rejected_roots"] == 6
    assert 0 < metrics["worst_residual"] < 1e-2
    np.testing.assert_array_equal(state[1].stacks[0].factors[0].preconditioner[0], np.eye(6))
    assert shampoo_metrics(optax.adam(1e-3).init(params)) == {}


def test_view_is_the_transformation_in_that_layout():
    """Unstacked, transposed and fused, as in PyTorch."""
    params = {name: jnp.zeros((2, 4, 4)) for name in ("query", "key", "value")} | {"head": jnp.zeros((4, 3))}

    def view(tree):
        fused = [jnp.concatenate([tree[k][i].T for k in ("query", "key", "value")]) for i in range(2)]
        return {"layers": fused, "head": tree["head"].T}

    settings = {"preset": "reference", "precondition_frequency": 2, "max_preconditioner_dim": 6}
    history, _ = run(view_as(view, scale_by_shampoo(**settings)), params, 4)
    direct, _ = run(scale_by_shampoo(**settings), view(params), 4, lambda seed, _: view(normal(seed, params)))
    assert_same([view(updates) for updates in history], direct)
    with pytest.raises(ValueError, match=r"view: it has 12 entries: it must have the 108"):
        view_as(lambda tree: tree["head"], shampoo(0.1)).init(params)


def test_weight_decay_is_coupled():
    params = {"kernel": jnp.full((3, 3), 2.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = shampoo(0.5, weight_decay=0.1, precondition_frequency=100, grafting="sgd")
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)


def test_nnx_state_and_types():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = shampoo(0.1, mu_dtype="bfloat16", precondition_frequency=2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    history, state = run(tx, half, 3)
    assert jax.tree.structure(history[0]) == jax.tree.structure(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(history[-1])} == {"bfloat16"}
    assert {stack.mu.dtype.name for stack in state[0].stacks} == {"bfloat16"}
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(history))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"b1": 1.0}, r"b1=1.0: it must be in \[0, 1\)"),
        ({"b2": 0.0}, r"b2=0.0: it must be in \(0, 1\]"),
        ({"grafting_b2": 1.5}, r"grafting_b2=1.5: it must be in \(0, 1\]"),
        ({"epsilon": 0.0}, r"epsilon=0.0: it must be finite and > 0"),
        ({"epsilon": -1e-3}, r"epsilon=-0.001: it must be finite and > 0"),
        ({"grafting_epsilon": 0.0}, r"grafting_epsilon=0.0: it must be finite and > 0"),
        ({"max_residual": 0.0}, r"max_residual=0.0: it must be > 0"),
        ({"precondition_frequency": 0}, r"precondition_frequency=0: it must be an integer >= 1"),
        ({"precondition_frequency": 2.5}, r"precondition_frequency=2.5: it must be an integer >= 1"),
        ({"start_preconditioning_step": -1}, r"start_preconditioning_step=-1: it must be an integer >= 0"),
        ({"max_preconditioner_dim": 0}, r"max_preconditioner_dim=0: it must be an integer >= 1"),
        ({"exponent_override": 0}, r"exponent_override=0: it must be an integer >= 1"),
        ({"shards": 0}, r"shards=0: it must be an integer >= 1"),
        ({"grafting": "lion"}, r"grafting='lion': it must be one of \('none', 'sgd'"),
        ({"root": "svd"}, r"root='svd': it must be one of \('auto', 'eigh', 'newton'\)"),
        ({"root": "newton", "relative_epsilon": False}, r"root='newton': it must be 'eigh' or 'auto'"),
        ({"preconditioner_dtype": "int32"}, r"preconditioner_dtype='int32': it must be one of"),
        ({"mu_dtype": "nonsense"}, r"mu_dtype='nonsense': it must be one of"),
        ({"preset": "soap"}, r"preset='soap': it must be 'fast' or 'reference'"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        shampoo(0.1, **setting)


@pytest.mark.parametrize("setting", [{"b1": -0.1}, {"eps": 0.0}, {"basis": "svd"}])
def test_bad_settings_of_soap_are_named(setting):
    with pytest.raises(ValueError, match=rf"^{next(iter(setting))}="):
        soap(0.1, **setting)


def test_bad_parameters_are_named():
    tx = shampoo(0.1)
    for dtype in ("int32", "complex64"):
        with pytest.raises(ValueError, match=rf"a/kernel: its dtype is {dtype}: it must be a real"):
            tx.init({"a": {"kernel": jnp.zeros((2, 2), dtype)}})
    with pytest.raises(ValueError, match=r"kernel: stack_axes=3: it must be in 0..2"):
        shampoo(0.1, stack_axes=3).init({"kernel": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"preconditioner_dtype='float64': it must be 'float32' unless"):
        shampoo(0.1, preconditioner_dtype="float64").init({"kernel": jnp.zeros((2, 2))})
    state = tx.init({"kernel": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"\['bias'\] are not among the parameters"):
        tx.update({"bias": jnp.zeros(2)}, state, {"kernel": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"kernel: a gradient of shape \(3, 2\): it must be \(2, 2\)"):
        tx.update({"kernel": jnp.zeros((3, 2))}, state, {"kernel": jnp.zeros((2, 2))})


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_state_of_another_plan_is_refused(factory):
    params = {"kernel": jnp.zeros((8, 8))}
    state = factory(max_preconditioner_dim=4).init(params)
    with pytest.raises(ValueError, match=r"state.stacks: .*\(4, 4, 4\).* they must be .*another plan"):
        factory(max_preconditioner_dim=8).update(params, state)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("made_with", "now", "params"),
    [
        ({"b2": 1.0}, {"b2": 0.9}, "ab"),
        ({"grafting": "adam"}, {"grafting": "rmsprop"}, "ab"),
        ({}, {}, "ac"),
    ],
)
def test_a_state_with_another_meaning_of_equal_arrays_is_refused(factory, made_with, now, params, tmp_path):
    state = factory(**made_with).init({name: jnp.ones((8, 8)) for name in "ab"})
    tx, params = factory(**now), {name: jnp.ones((8, 8)) for name in params}
    setting = next(iter(now), "layout")
    with pytest.raises(ValueError, match=rf"^{setting}=.*: it must be .*, which the state was made with"):
        jax.jit(tx.update)(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=f"{setting}="):
            checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_only_changes_the_next_steps_may_change(factory):
    params = {"kernel": jnp.ones((8, 8))}
    state = factory(b2=0.9).init(params)
    jax.eval_shape(factory(b2=0.99, precondition_frequency=3, stagger=False, b1=0.5).update, params, state)
