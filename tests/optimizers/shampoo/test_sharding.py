"""Spread over devices: the same steps on any number of them, nothing gathered, nothing exchanged within a root."""

import functools
import importlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from simplest_vit.optimizers.shampoo import (
    scale_by_shampoo,
    scale_by_soap,
    shampoo_metrics,
    sharding,
)

# 21 blocks of (8, 8) and 16 of (8, 4): of these only the latter divide over eight devices.
PARAMS = {"kernel": (9, 8, 16), "even": (16, 8, 4), "odd": (24, 8), "bias": (9, 8)}
ZEROS = {name: np.zeros(shape, np.float32) for name, shape in PARAMS.items()}
STACK_AXES = {"kernel": 1, "even": 1, "odd": 0, "bias": 1}
FSDP = {"kernel": P(None, None, "data"), "even": P(None, "data"), "odd": P(None, "data"), "bias": P()}
WHOLE = dict.fromkeys(PARAMS, P())
COLLECTIVES = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
SETTINGS = {"max_preconditioner_dim": 8, "precondition_frequency": 3}
TRANSFORMATIONS = {
    "shampoo": functools.partial(scale_by_shampoo, **SETTINGS),
    "newton": functools.partial(scale_by_shampoo, root="newton", **SETTINGS),
    "soap": functools.partial(scale_by_soap, **SETTINGS),
    "gram_schmidt": functools.partial(scale_by_soap, basis="gram_schmidt", **SETTINGS),
}


def mesh_of(size, kind=AxisType.Auto):
    return jax.make_mesh((size,), ("data",), axis_types=(kind,), devices=jax.devices()[:size])


def transformation(name, mesh):
    return TRANSFORMATIONS[name](stack_axes=STACK_AXES, mesh=mesh)


def on(mesh, specs, tree):
    if mesh is None:
        return tree
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}


def run(tx, steps, mesh=None, specs=WHOLE, state=None):
    params = on(mesh, specs, ZEROS)
    state = jax.jit(tx.init)(params) if state is None else state
    update = jax.jit(tx.update)
    for step in steps:
        rng = np.random.default_rng(step)
        grads = {name: np.float32(rng.normal(size=shape)) for name, shape in PARAMS.items()}
        updates, state = update(on(mesh, specs, grads), state, params)
    return updates, state


@functools.cache
def alone(name):
    """What comes of seven steps on one device."""
    return run(transformation(name, None), range(7))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "specs"),
    [
        ("shampoo", AxisType.Auto, FSDP),
        ("shampoo", AxisType.Explicit, WHOLE),
        ("soap", AxisType.Explicit, FSDP),
    ],
    ids=["shampoo-auto-fsdp", "shampoo-explicit", "soap-explicit-fsdp"],
)
def test_any_devices_take_the_same_steps(name, kind, specs):
    mesh = mesh_of(8, kind)
    updates, state = run(transformation(name, mesh), range(7), mesh, specs)
    assert_close((updates, state), alone(name))
    # Updates are laid out as the parameters are; of every matrix each device has an eighth.
    for leaf, spec in specs.items():
        if kind is AxisType.Auto and spec == P() and sharding.shard_alike is None:
            continue  # left to the compiler
        assert updates[leaf].sharding.is_equivalent_to(NamedSharding(mesh, spec), len(PARAMS[leaf]))
    for stack in state.stacks:
        for matrices in (stack.axes[0].statistics, stack.axes[0].preconditioner, stack.mu):
            assert matrices.addressable_shards[0].data.size == matrices.size // 8


def test_devices_that_divide_nothing_share_the_work():
    mesh = mesh_of(3)
    assert_close(run(transformation("shampoo", mesh), range(7), mesh), alone("shampoo"))


def compiled(name, mesh, specs):
    tx = transformation(name, mesh)
    params = on(mesh, specs, ZEROS)
    return jax.jit(tx.update).lower(params, jax.jit(tx.init)(params), params).compile().as_text()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_with_fsdp_no_gradient_is_gathered(kind):
    """Everything that is exchanged is at most a few shards in size; whole gradients and stacks have eight."""
    text = compiled("shampoo", mesh_of(8, kind), FSDP)
    found = re.findall(COLLECTIVES, text)
    assert any(op == "all-to-all" for _, op in found)
    for result, op in found:
        if op == "all-gather":
            sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"f32\[([\d,]*)\]", result)]
            assert max(sizes, default=0) <= 21 * 8 * 8 / 8, result


def computations(text):
    """Name -> lines, for each computation of a compiled module."""
    found, name = {}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.-]+) \(.*{$", line)
        if header:
            name = header.group(1)
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reachable(found, name):
    lines = list(found[name])
    for line in found[name]:
        for callee in re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", line):
            lines += reachable(found, callee)
    return lines


@pytest.mark.parametrize("name", ["newton", "gram_schmidt"])
def test_preconditioners_are_computed_without_communication(name):
    found = computations(compiled(name, mesh_of(8), WHOLE))
    loops = [line for lines in found.values() for line in lines if re.search(r" while\(", line)]
    assert loops
    for loop in loops:
        body = reachable(found, re.search(r"body=%([\w.-]+)", loop).group(1))
        assert not [line for line in body if re.search(COLLECTIVES, line)]


def test_a_checkpoint_resumes_on_another_number_of_devices(tmp_path):
    mesh, other = mesh_of(8), mesh_of(4)
    tx = transformation("shampoo", mesh)
    _, state = run(tx, range(4), mesh)
    expected, _ = run(tx, range(4, 7), mesh, state=state)
    tx = transformation("shampoo", other)
    params = on(other, WHOLE, ZEROS)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, jax.jit(tx.init)(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    updates, _ = run(tx, range(4, 7), other, state=restored)
    assert_close(updates, expected)


def test_slots_that_only_fill_up_are_not_counted(monkeypatch):
    monkeypatch.setattr(importlib.import_module("simplest_vit.optimizers.shampoo.shampoo"), "MOST_ERROR", 1e-12)
    mesh = mesh_of(8)
    _, state = run(transformation("shampoo", mesh), range(3), mesh)
    assert shampoo_metrics(state)["rejected_roots"] == 2 * (21 + 16)
