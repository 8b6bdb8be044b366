"""Every argument of Shampoo and SOAP acts: made from their signatures, so that one without a row fails."""

import ast
import functools
import inspect

import jax
import numpy as np
import pytest

from simplest_vit.optimizers.shampoo import shampoo, soap
from simplest_vit.optimizers.shampoo.options import static_args

PARAMS = {"kernel": (2, 12, 10), "bias": (6,)}
# In turns of 2 steps, cut into 8 blocks (6, 5).
BASE = {"precondition_frequency": 2, "max_preconditioner_dim": 10, "stack_axes": {"kernel": 1, "bias": 0}}
MASK = {"kernel": True, "bias": False}
# Argument -> another value than the default's, and what else is given both times.
BOTH = {
    "learning_rate": (0.2, {}),
    "b1": (0.5, {}),
    "b2": (0.5, {}),
    "eps": (1e-2, {}),
    "weight_decay": (0.1, {}),
    "mask": (MASK, {"weight_decay": 0.1}),
    "mu_dtype": ("bfloat16", {}),
}
ROWS = {
    shampoo: {
        **BOTH,
        "stagger": (False, {}),
        "root": ("newton", {}),
        "grafting_b2": (0.5, {}),
        "grafting_eps": (1e-2, {}),
    },
    soap: {
        **BOTH,
        "merge_dims": (True, {"max_preconditioner_dim": 200}),
        "precondition_1d": (True, {}),
        "shampoo_beta": (0.5, {}),
    },
}
# At other values than the defaults, steps are compared with the oracle's in test_reference.py; or they change no step:
# test_optax.py (the products' precision) and test_sharding.py.
COMPARED = {
    *("precondition_frequency", "start_preconditioning_step", "max_preconditioner_dim", "one_sided", "ignored_dim"),
    *("preconditioner_dtype", "stack_axes", "precision", "mesh"),
}
ELSEWHERE = {
    shampoo: COMPARED.union(
        ("relative_eps", "even_blocks", "merge_dims", "precondition_1d", "exponent_override", "statistics", "grafting")
    ),
    soap: COMPARED | {"stagger", "basis"},
}


@functools.cache
def numbers_of(alias):
    """The arguments that may be numbers of each step, with their defaults."""
    arguments, static = inspect.signature(alias).parameters, static_args(alias)
    return {name: arguments[name].default for name in arguments if name not in static}


@functools.cache
def compiled(alias, given):
    """A step for all numbers: they are arguments of the program, so it is compiled once."""
    given = ast.literal_eval(given)
    return jax.jit(lambda numbers, *arguments: alias(**numbers, **given).update(*arguments))


def steps(alias, count=8, **given):
    """The updates of some steps, as one vector."""
    given = numbers_of(alias) | {"learning_rate": 0.1} | BASE | given
    params = {name: np.ones(shape, np.float32) for name, shape in PARAMS.items()}
    state, found = alias(**given).init(params), []
    numbers = {name: given.pop(name) for name in numbers_of(alias)}
    update = functools.partial(compiled(alias, repr(given)), numbers)
    for t in range(count):
        rng = np.random.default_rng(t)
        grads = {name: np.float32(rng.normal(size=shape)) for name, shape in PARAMS.items()}
        updates, state = update(grads, state, params)
        found += [np.ravel(updates[name]) for name in PARAMS]
    return np.concatenate(found)


@pytest.fixture(scope="module")
def unchanged():
    found = {}

    def of(alias, given):
        key = alias, str(given)
        if key not in found:
            found[key] = steps(alias, **given)
        return found[key]

    return of


@pytest.mark.parametrize(
    ("alias", "name"),
    [(alias, name) for alias in ROWS for name in inspect.signature(alias).parameters if name not in ELSEWHERE[alias]],
)
def test_a_changed_value_changes_the_update(alias, name, unchanged):
    value, given = ROWS[alias][name]
    changed = steps(alias, **given | {name: value})
    assert np.all(np.isfinite(changed))
    # Another way to the same root differs in its rounding alone.
    least = 0 if name == "root" else 1e-4
    assert np.abs(changed - unchanged(alias, given)).max() > least


@pytest.mark.parametrize("alias", ROWS)
def test_defaults_are_what_is_not_given(alias):
    """And are values: a run's record has no None."""
    defaults = {name: p.default for name, p in inspect.signature(alias).parameters.items()}
    outside = ("learning_rate", "weight_decay", "mask", "stack_axes", "mesh")
    assert [name for name, value in defaults.items() if value is None] == [n for n in defaults if n in outside[1:]]
    given = {name: value for name, value in defaults.items() if name not in (*BASE, "learning_rate")}
    np.testing.assert_array_equal(steps(alias, count=4, **given), steps(alias, count=4))


@pytest.mark.parametrize("alias", ROWS)
def test_arguments_are_scheduled_or_static(alias):
    scheduled = {"learning_rate", "weight_decay", "b1", "b2", "eps", "shampoo_beta", "grafting_b2", "grafting_eps"}
    assert set(static_args(alias)) == set(inspect.signature(alias).parameters) - scheduled
