"""What a state was made with, told by its tree: a state is not taken for one of another plan of equal shapes."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from simplest_vit.optimizers.shampoo.plan import Plan

# Names such as 'grafting=adam'; the values say nothing. A name is part of the tree, and so is compared wherever trees
# are: by Orbax when it restores, and by `update` while it is traced, without waiting for the device.
Marks = dict[str, jax.Array]


def init_marks(plan: Plan) -> Marks:
    """Returns a mark for each setting that gives equal arrays another meaning.

    Settings that only change what comes next, such as the frequency or the method of the root, have none.
    """
    return {f"{name}={value}": jnp.zeros((), jnp.bool_) for name, value in plan.meanings.items()}


def check_marks(plan: Plan, marks: Iterable[str]) -> None:
    """Compare the marks of a state with those of the plan.

    Raises:
        ValueError: Where they differ; it names the setting, its value and the one the state was made with.
    """
    made_with = dict(mark.split("=", 1) for mark in marks)
    for name, value in plan.meanings.items():
        if made_with.get(name) != value:
            raise ValueError(
                f"{name}={value}: it must be {made_with.get(name)}, which the state was made with"
                + (" (a checksum of the parameters' paths, shapes and stack_axes)." if name == "layout" else ".")
            )
