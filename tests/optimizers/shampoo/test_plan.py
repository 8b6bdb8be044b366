"""The plan, what it says about costs, and what is compiled from it."""

import doctest
import importlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simplest_vit.optimizers.shampoo as package
from simplest_vit.optimizers.shampoo import reference_shampoo, shampoo, shampoo_plan, soap, soap_plan
from simplest_vit.optimizers.shampoo.blocks import from_blocks, to_blocks
from simplest_vit.optimizers.shampoo.plan import merge_small_dims

PLANS = {shampoo: shampoo_plan, soap: soap_plan}
REFERENCE = dict(reference_shampoo.keywords)


def vit_parameters(depth=12, width=384, mlp=1536, classes=10, patch=48):
    """The parameters of the S model on CIFAR: depth is a leading axis."""

    def dense(*shape):
        shapes = {"kernel": shape, "bias": (*shape[:-2], shape[-1])}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    blocks = {name: dense(depth, width, width) for name in ("query", "key", "value")}
    blocks |= {"dense1": dense(depth, width, mlp), "dense2": dense(depth, mlp, width)}
    return {"blocks": blocks, "patch_embedding": dense(patch, width), "head": dense(width, classes)}


def stack_axes(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: int(path[0].key == "blocks"), params)


def lower(tx, params):
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params))


def count_instructions(lowered):
    return len(re.findall(r"^\s+%\S+ = ", lowered.as_text(), re.M))


@pytest.mark.parametrize(
    ("shape", "max_dim", "merged"),
    [
        ((384, 3, 4, 4), 8192, (4608, 4)),
        ((4, 4, 3, 384), 8192, (48, 384)),
        ((10, 384), 8192, (3840,)),
        ((1152, 384), 8192, (1152, 384)),
        ((1, 9000), 8192, (9000,)),
        ((5,), 2, (5,)),
    ],
)
def test_merging(shape, max_dim, merged):
    assert merge_small_dims(shape, max_dim) == merged


@pytest.mark.parametrize("given", [{}, {"even_blocks": False, "merge_dims": True, "precondition_1d": True}])
def test_blocks_go_there_and_back(given):
    rng = np.random.default_rng(0)
    shapes = [(), (5,), (9, 6), (4, 8), (2, 3, 7), (3, 0)]
    leaves = [np.asarray(rng.normal(size=shape), np.float32) for shape in shapes]
    plan = shampoo_plan(leaves, max_preconditioner_dim=4, **given)
    blocks = jax.jit(lambda leaves: to_blocks(plan, leaves))(leaves)
    for stack, value in zip(plan.stacks, blocks, strict=True):
        assert value.shape == (stack.count, *stack.block_shape)
    for leaf, back in zip(leaves, jax.jit(lambda blocks: from_blocks(plan, blocks))(blocks), strict=True):
        if back is None:
            assert leaf.ndim < 2 or not leaf.size
        else:
            np.testing.assert_array_equal(back, leaf)


def test_plan_of_the_s_model():
    plan = shampoo_plan(vit_parameters(), stack_axes=stack_axes)
    text = str(plan)
    assert "266 matrices of 384 x 384, inverse root 4" in text
    assert re.search(r"blocks/dense1/kernel +\(12, 384, 1536\) +48 \(384, 384\)", text)
    assert re.search(r"blocks/dense1/bias +\(12, 1536\) +- ", text)
    np.testing.assert_allclose(plan.refresh_cubes, 266 * 384**3 + 48**3 + 10**3)
    np.testing.assert_allclose(plan.step_flops, 60e9, rtol=0.01)


@pytest.mark.parametrize(
    ("alias", "given"),
    [
        (shampoo, {}),
        (shampoo, REFERENCE),
        (soap, {}),
        (shampoo, {"mu_dtype": "bfloat16"}),
        (shampoo, {"grafting": "sgd"}),
    ],
)
def test_memory_is_what_the_plan_says(alias, given):
    params = vit_parameters(depth=2)
    plan = PLANS[alias](params, stack_axes=stack_axes, **given)
    state = jax.eval_shape(alias(1.0, stack_axes=stack_axes, **given).init, params)[0]
    leaves = jax.tree.leaves(state._replace(version=None))
    assert plan.state_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert plan.state_bytes <= 16 * parameters + plan.stack_bytes


@pytest.mark.parametrize(
    ("alias", "given"), [(shampoo, {}), (shampoo, {"statistics": "kl"}), (soap, {})], ids=["shampoo", "kl", "soap"]
)
def test_flops_of_a_step_are_those_of_its_program(alias, given):
    """The products over four blocks, each sum of which has 128 terms; those of a refresh are over one."""
    params = {"kernel": jax.ShapeDtypeStruct((4, 128, 128), jnp.float32)}
    given = {"stack_axes": 1, "precondition_frequency": 4, **given}
    text = lower(alias(1.0, **given), params).as_text()
    products = re.findall(r"stablehlo.dot_general.*-> tensor<4x128x128xf32>", text)
    flops = len(products) * 2 * 4 * 128**3
    assert flops == PLANS[alias](params, **given).step_flops


@pytest.mark.parametrize(
    ("blocks", "others", "soap_is_staggered", "shampoo_is_staggered"),
    [
        ([(384, 1536), (1536, 384), *[(384, 384)] * 4], [(48, 384), (384, 10)], True, True),
        ([(64, 256), (256, 64), *[(64, 64)] * 4], [(48, 64), (64, 10)], True, False),
        ([], [(784, 256), (256, 128), (128, 10)], False, False),
        ([], [(3, 3, 1, 32), (3, 3, 32, 64), (256, 128), (128, 10)], False, False),
    ],
    ids=["S/4", "small protocol", "MLP", "CNN"],
)
def test_networks_that_are_staggered(blocks, others, soap_is_staggered, shampoo_is_staggered):
    """A change would alter the recorded runs of the first two, and slow down the last two."""
    params = {"blocks": [jax.ShapeDtypeStruct((12, *shape), jnp.float32) for shape in blocks]}
    params["others"] = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in others]
    stack_axes = {"blocks": 1, "others": 0}
    assert soap_plan(params, stack_axes=stack_axes).is_staggered == soap_is_staggered
    assert shampoo_plan(params, stack_axes=stack_axes).is_staggered == shampoo_is_staggered


@pytest.mark.parametrize(("stagger", "blocks"), [(True, 3), (False, 2.5)])
def test_cubes_of_a_step(stagger, blocks):
    """Five blocks, with a matrix of 4 x 4 and one of 2 x 2 each, in turns of two steps."""
    plan = shampoo_plan(jnp.zeros((5, 4, 2)), stack_axes=1, precondition_frequency=2, stagger=stagger)
    assert plan.refresh_cubes == 5 * (4**3 + 2**3)
    assert plan.step_cubes == blocks * (4**3 + 2**3)


def test_axes_of_size_one_have_no_matrix():
    plan = shampoo_plan({"conv": jnp.zeros((1, 1, 6, 3)), "column": jnp.zeros((6, 1)), "one": jnp.zeros((1, 1))})
    assert [(stack.sizes, stack.root) for stack in plan.stacks] == [([6], 2), ([6, 3], 4), ([1, 1], 4)]


@pytest.mark.parametrize("module", [module.name for module in pkgutil.iter_modules(package.__path__)])
def test_examples_of_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(f"{package.__name__}.{module}"))
    assert not failed


def test_even_cuts():
    """The fewest even blocks: never one whole block and a sliver."""
    widths = {400: "2 (200, 4)", 384: "1 (384, 4)", 1000: "3 (334, 4)", 385: "2 (193, 4)"}
    for width, cut in widths.items():
        assert f"{cut}\n" in str(shampoo_plan({"x": jnp.zeros((width, 4))}, max_preconditioner_dim=384))


@pytest.mark.parametrize("alias", [shampoo, soap])
def test_the_program_is_small_and_does_not_grow_with_depth(alias):
    tx = alias(1.0, stack_axes=stack_axes)
    instructions = count_instructions(lower(tx, vit_parameters()))
    assert instructions < 2200
    assert count_instructions(lower(tx, vit_parameters(depth=36))) == instructions


def test_all_at_once_costs_nothing_in_other_steps():
    """Decompositions are in a branch, where XLA has not moved them out of it."""
    tx = shampoo(1.0, stagger=False, root="eigh", max_preconditioner_dim=4)
    text = lower(tx, {"kernel": jnp.zeros((8, 8))}).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "syevd" in text
    assert "syevd" not in entry
    assert "conditional" in entry


def test_a_side_is_ignored_above_the_limit_only():
    plans = (shampoo_plan(jnp.zeros((10, 4)), ignored_dim=limit) for limit in (10, 9))
    assert [plan.stacks[0].sizes for plan in plans] == [[10, 4], [4]]
