"""Checks of the arguments of Shampoo and SOAP, which `shampoo` and `soap` document with their defaults."""

import inspect
import math
import numbers
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Root = Literal["auto", "eigh", "newton"]
Basis = Literal["auto", "qr", "gram_schmidt", "eigh"]
Grafting = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
Statistics = Literal["shampoo", "kl"]
Precision = Literal["jax", "default", "high", "highest"]
Number = float | jax.Array

_DTYPES = {
    "preconditioner_dtype": ("float32", "float64"),
    "mu_dtype": ("bfloat16", "float32", "float64"),  # float16 would overflow and stay infinite
}
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "b2": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "shampoo_beta": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "eps": (lambda x: 0 < x < math.inf, "finite and > 0"),
    "grafting_b2": (lambda x: 0 < x < 1, "in (0, 1)"),
    "grafting_eps": (lambda x: 0 < x < math.inf, "finite and > 0"),
}
_MAY_BE_ZERO = ("start_preconditioning_step", "exponent_override")  # other integers are at least 1
# A smaller relative damping would be lost in the rounding of the statistics.
LEAST_EPS = {"float32": 1e-6, "float64": 1e-14}


def static_args(optimizer: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments of `shampoo` or `soap` that decide shapes or branches.

    `optax.inject_hyperparams(shampoo, static_args=static_args(shampoo))` schedules all others.
    """
    scheduled = (*_NUMBERS, "learning_rate", "weight_decay")
    return tuple(name for name in inspect.signature(optimizer).parameters if name not in scheduled)


class Diagonal(NamedTuple):
    """A diagonal method."""

    method: Grafting
    decay: Number  # of its second moment; 1 sums it
    eps: Number  # added to the root of the second moment

    @property
    def has_second_moment(self) -> bool:
        """True if the method divides by the root of a second moment."""
        return self.method in ("adagrad", "rmsprop", "adam")


class Options(types.SimpleNamespace):
    """The arguments of `scale_by_shampoo` or `scale_by_soap` by name, checked, with the defaults of their alias."""

    def __init__(self, alias: Callable[..., Any], arguments: dict[str, Any]):
        """Raise ValueError with the name, the value and the allowed range of a bad argument."""
        outside = ("learning_rate", "weight_decay", "mask")
        parameters = [p for name, p in inspect.signature(alias).parameters.items() if name not in outside]
        bound = inspect.Signature(parameters).bind(**arguments)
        bound.apply_defaults()
        super().__init__(**bound.arguments)
        # Numbers last, because traced ones are cast to the type of the statistics.
        for parameter in sorted(parameters, key=lambda parameter: isinstance(parameter.default, float)):
            setattr(self, parameter.name, self._checked(parameter, bound.arguments[parameter.name]))

    def _checked(self, parameter: inspect.Parameter, value: Any) -> Any:
        """Return the value as a Python type, because NumPy scalars would bring their dtype into the state."""
        name, kind = parameter.name, type(parameter.default)
        if kind is float:
            valid, allowed = _NUMBERS[name]
            if isinstance(value, jax.Array):
                if value.dtype.itemsize < 4:
                    rounded = f"{name}: {value.dtype} would round it, such as 0.999 to 1"
                    raise ValueError(f"{rounded}; give optax.inject_hyperparams hyperparam_dtype=jnp.float32.")
                return value.astype(self.dtype)
            self.require(name, _is(numbers.Real, value) and valid(float(value)), allowed)
            return float(value)
        if kind is int:
            least = 0 if name in _MAY_BE_ZERO else 1
            self.require(name, _is(numbers.Integral, value) and int(value) >= least, f"an integer >= {least}")
            return int(value)
        if kind is str:
            choices = _DTYPES.get(name) or get_args(parameter.annotation)
            given = _dtype_name(value) if name in _DTYPES else value
            self.require(name, isinstance(given, str) and given in choices, f"one of {choices}")
            return given
        self.require(name, kind is not bool or isinstance(value, bool), "True or False")
        return value

    def require(self, name: str, valid: bool, allowed: str) -> None:
        """Raise ValueError unless an argument is valid."""
        if not valid:
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                allowed += "; with optax.inject_hyperparams name it in static_args"
            raise ValueError(f"{name}={value!r}: it must be {allowed}.")

    @property
    def dtype(self) -> jnp.dtype:
        """The type of statistics and preconditioners; ValueError for float64 while x64 is off."""
        return _enabled("preconditioner_dtype", self.preconditioner_dtype)

    @property
    def momentum_dtype(self) -> jnp.dtype:
        """The type of the stored momentum; ValueError for float64 while x64 is off."""
        return _enabled("mu_dtype", self.mu_dtype)

    @property
    def matmul_precision(self) -> str | None:
        """The precision of products, as `jax.numpy` takes it."""
        return None if self.precision == "jax" else self.precision


class ShampooOptions(Options):
    """The arguments of Shampoo, and what they imply."""

    number = 1  # of the method, in the version of its state
    refreshes_early = False  # whether each of the first k steps after `start` refreshes all preconditioners as well

    def __init__(self, alias: Callable[..., Any], arguments: dict[str, Any]):
        """Raise ValueError as `Options`."""
        super().__init__(alias, arguments)
        self.require(
            "root",
            self.relative_eps or self.root != "newton",
            "'eigh' or 'auto' if relative_eps is False (the length of 'newton' is set by a relative eps)",
        )
        self.whitened = self.statistics == "kl"  # whether the statistics are KL-Shampoo's
        self.require("exponent_override", not (self.whitened and self.exponent_override), "0 with KL (p is 2)")
        if self.relative_eps and not isinstance(self.eps, jax.Array):
            least = LEAST_EPS[self.preconditioner_dtype]
            self.require(
                "eps",
                self.eps >= least,
                f"at least {least:g} if relative_eps is True: {self.preconditioner_dtype} cannot resolve less",
            )
        # The last step that is the grafting method's own; by then every block has its first root.
        self.start = max(self.start_preconditioning_step, self.precondition_frequency)
        self.first_due = self.start - self.precondition_frequency + 1  # of refreshes that are not staggered
        self.statistics_decay = self.b2
        # A multiple of the identity: eps I as in the PyTorch reference.
        self.first_statistics = 0.0 if self.relative_eps else self.eps

    def diagonal(self, preconditioned: bool) -> Diagonal:
        """Choose the grafting method, or Adam for what is neither preconditioned nor grafted."""
        method: Grafting = "adam" if self.grafting == "none" and not preconditioned else self.grafting
        return Diagonal(method, 1.0 if method == "adagrad" else self.grafting_b2, self.grafting_eps)


class SoapOptions(Options):
    """The arguments of SOAP, and what they imply; see `ShampooOptions`."""

    number, first_statistics, whitened, even_blocks = 2, 0.0, False, True
    refreshes_early = True

    def __init__(self, alias: Callable[..., Any], arguments: dict[str, Any]):
        """Raise ValueError as `Options`."""
        super().__init__(alias, arguments)
        self.start = self.first_due = self.start_preconditioning_step
        self.statistics_decay = self.shampoo_beta

    def diagonal(self, preconditioned: bool) -> Diagonal:
        """Choose Adam, in the eigenbasis and elsewhere."""
        return Diagonal("adam", self.b2, self.eps)


AnyOptions = ShampooOptions | SoapOptions


def _is(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _dtype_name(value: Any) -> str:
    try:
        return repr(value) if value is None else jnp.dtype(value).name
    except TypeError:
        return repr(value)


def _enabled(name: str, value: Any) -> jnp.dtype:
    dtype = jnp.dtype(value)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}='float64': it must be 'float32' unless jax_enable_x64 is on.")
    return dtype
