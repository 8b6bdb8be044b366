"""Allowed values of settings, and those of a network's fields, which a config and `create_model` share."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple


class Values(NamedTuple):
    """The allowed values of a field and their description; `kind` is their type if the default is None."""

    allows: Callable[[Any], bool]
    expected: str
    kind: Any = str


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def integer(low: int, high: int = 2**31 - 1) -> Values:  # steps and sizes are int32 on the device
    """Allow integers from `low` to `high`."""
    text = f"an integer from {low:,} to {high:,}"
    return Values(lambda value: _is_number(value, numbers.Integral) and low <= value <= high, text, int)


def number(interval: str) -> Values:
    """Allow the numbers of an interval such as "[0, 1)", which is also the description."""
    low, high = map(float, interval[1:-1].split(","))

    def allows(value: Any) -> bool:
        inside = _is_number(value) and low <= value <= high
        return inside and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")

    return Values(allows, f"a number in {interval}", float)


def one_of(*choices: str) -> Values:
    """Allow some texts."""
    return Values(lambda value: value in choices, f"one of {', '.join(choices)}")


def optional(values: Values) -> Values:
    """Allow None as well."""
    return Values(lambda value: value is None or values.allows(value), f"{values.expected}, or None", values.kind)


DECAY = number("[0, 1)")
FLAG = Values(lambda value: isinstance(value, bool), "True or False")
TEXT = Values(lambda value: isinstance(value, str), "a name")

# Fields of `config.model`, if they are not None.
MODEL = {
    "depth": integer(1, 1000),
    "width": integer(1, 2**16),
    "num_heads": integer(1, 2**18),
    "mlp_dim": integer(1, 2**18),
    "patch_size": integer(1, 2**14),
    "dropout": DECAY,
    "remat": FLAG,
    "attention_kernel": one_of("auto", "xla", "fused"),
    # Beyond these values, token kernels are singular in float64 or the identity in float32.
    "gamma_max_depth": number("[1e-9, 10]"),
    "rho_max_depth": number("[1e-9, 0.999999]"),
    "uniform_fraction": number("(0, 1)"),  # at 0, no query could ever attend to another token
    "identity_head_fraction": number("(0, 1]"),
    "c_val_0_target": number("[1e-6, 0.9999]"),
}
