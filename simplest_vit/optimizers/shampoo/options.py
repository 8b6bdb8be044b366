"""Every setting of Shampoo and SOAP with its range, and the presets: data, not branches."""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp

Root = Literal["auto", "eigh", "newton"]
Basis = Literal["auto", "qr", "gram_schmidt", "eigh"]
Grafting = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
Statistics = Literal["shampoo", "kl"]
Precision = Literal["default", "high", "highest"]
Number = float | jax.Array

_CHOICES = {
    "root": get_args(Root),
    "basis": get_args(Basis),
    "grafting": get_args(Grafting),
    "statistics": get_args(Statistics),
    "precision": (None, *get_args(Precision)),
    "preconditioner_dtype": ("float32", "float64"),
    "mu_dtype": (None, "bfloat16", "float32", "float64"),  # float16 would overflow, and stay infinite
}
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "b2": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "epsilon": (lambda x: 0 < x < math.inf, "finite and > 0"),
    "grafting_b2": (lambda x: 0 < x < 1, "in (0, 1)"),
    "grafting_epsilon": (lambda x: 0 < x < math.inf, "finite and > 0"),
    "max_residual": (lambda x: x > 0, "> 0"),
    "initial_preconditioner": (lambda x: 0 <= x < math.inf, "finite and >= 0"),
}
# What a schedule may set (`optax.inject_hyperparams`): numbers that decide neither a shape nor a branch.
_MAY_BE_TRACED = ("b1", "b2", "epsilon", "grafting_b2", "grafting_epsilon")
# Name -> the least value, and what None means where it is allowed.
_INTEGERS = {
    "precondition_frequency": (1, None),
    "start_preconditioning_step": (0, "precondition_frequency"),
    "max_preconditioner_dim": (1, None),
    "ignored_dim": (1, "no limit"),
    "exponent_override": (1, "2 x the preconditioned axes of a block"),
}
_FLAGS = ("relative_epsilon", "stagger", "merge_dims", "precondition_1d", "one_sided")


def _dtype_name(value: Any) -> str | None:
    try:
        return None if value is None else jnp.dtype(value).name
    except TypeError:
        return repr(value)


class Diagonal(NamedTuple):
    """A diagonal method.

    Attributes:
      method: Its name.
      decay: Of its second moment; 1 sums it.
      epsilon: Added to the root of the second moment.
    """

    method: Grafting
    decay: Number
    epsilon: Number

    @property
    def has_second_moment(self) -> bool:
        """Whether it divides by one."""
        return self.method in ("adagrad", "rmsprop", "adam")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What Shampoo and SOAP have in common.

    `b1`, `b2`, `epsilon`, `grafting_b2` and `grafting_epsilon` may be arrays, which are not checked, so that
    `optax.inject_hyperparams` can schedule them.

    Attributes:
      b1: Decay of the gradient's average (momentum), in [0, 1).
      b2: Decay of the statistics (and of SOAP's second moment), in (0, 1]; 1 sums them (AdaGrad).
      epsilon: Shampoo: damping of the statistics before their root; SOAP: added to the root of the second moments; > 0.
      precondition_frequency: Steps between two computations of a preconditioner, >= 1.
      start_preconditioning_step: Steps up to and including this one are the diagonal method's own, >= 0. None means
        `precondition_frequency`, which is also the least where preconditioners are computed in turns.
      stagger: Whether preconditioners are computed in turns, from the first step on, each once in
        `precondition_frequency` steps, so that all steps take the same time; else all at multiples of the frequency.
      max_preconditioner_dim: Longer dimensions are cut into the fewest even blocks of at most this size, >= 1.
      merge_dims: Whether neighbouring dimensions are merged while their product is at most `max_preconditioner_dim`.
      precondition_1d: Whether vectors get a (full-matrix) preconditioner. Where they do not, and for scalars, the step
        is the diagonal method's own.
      one_sided: Whether only the shortest axis of each block (of those longer than 1) is preconditioned.
      ignored_dim: Dimensions longer than this (of a vocabulary, say) are neither cut nor preconditioned.
      max_residual: A preconditioner that is less accurate than this is rejected and the old one kept, > 0.
      preconditioner_dtype: float32, or float64 where x64 is enabled.
      mu_dtype: Type of the stored momentum, such as bfloat16; None means `preconditioner_dtype`.
      precision: Of the products that make and apply the preconditioners: 'default' (TF32 on a GPU), 'high' or
        'highest'; None leaves it to `jax.default_matmul_precision`. Roots and bases always take 'highest'.
    """

    b1: Number = 0.9
    b2: Number = 0.999
    epsilon: Number = 1e-5
    precondition_frequency: int = 25
    start_preconditioning_step: int | None = None
    stagger: bool = True
    max_preconditioner_dim: int = 384
    merge_dims: bool = False
    precondition_1d: bool = False
    one_sided: bool = False
    ignored_dim: int | None = None
    max_residual: float = 0.1
    preconditioner_dtype: Any = "float32"
    mu_dtype: Any = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        """Raise ValueError with the name, the value and the allowed range of a bad setting."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _NUMBERS:
                valid, allowed = _NUMBERS[name]
                traced = isinstance(value, jax.Array) and name in _MAY_BE_TRACED
                is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
                self._require(name, traced or (is_number and valid(float(value))), allowed)
                if not traced:  # NumPy's numbers would bring a type of their own into the state
                    object.__setattr__(self, name, float(value))
            elif name in _INTEGERS:
                least, none = _INTEGERS[name]
                is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
                self._require(
                    name,
                    (is_integer and int(value) >= least) or (value is None and none is not None),
                    f"an integer >= {least}" + (f", or None for {none}" if none else ""),
                )
                object.__setattr__(self, name, None if value is None else int(value))
            elif name in _FLAGS:
                self._require(name, isinstance(value, bool), "True or False")
            else:
                given = _dtype_name(value) if name.endswith("dtype") else value
                self._require(
                    name, isinstance(given, str | None) and given in _CHOICES[name], f"one of {_CHOICES[name]}"
                )

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            value = getattr(self, name)
            if isinstance(value, jax.Array):
                allowed += "; with optax.inject_hyperparams name it in static_args"
            raise ValueError(f"{name}={value!r}: it must be {allowed}.")

    @property
    def start(self) -> int:
        """The last step that is the diagonal method's own."""
        given = self.start_preconditioning_step
        start = self.precondition_frequency if given is None else given
        return max(start, self.precondition_frequency) if self.stagger else start

    @property
    def dtype(self) -> jnp.dtype:
        """The type of statistics and preconditioners.

        Raises:
          ValueError: For float64 while x64 is off, which would silently be float32.
        """
        return _enabled("preconditioner_dtype", self.preconditioner_dtype)

    @property
    def momentum_dtype(self) -> jnp.dtype:
        """The type of the stored momentum.

        Raises:
          ValueError: As `dtype`.
        """
        return self.dtype if self.mu_dtype is None else _enabled("mu_dtype", self.mu_dtype)

    @property
    def refresh_early(self) -> bool:
        """Whether all preconditioners are computed in each of the first k steps after the start."""
        return False

    def diagonal(self, preconditioned: bool) -> Diagonal:
        """Choose the diagonal method of parameters that are preconditioned, or of the others."""
        raise NotImplementedError


def _enabled(name: str, value: Any) -> jnp.dtype:
    dtype = jnp.dtype(value)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}='float64': it must be 'float32' unless jax_enable_x64 is on.")
    return dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShampooOptions(Options):
    """The settings of Shampoo; the first ones are those of `Options`.

    Attributes:
      relative_epsilon: Whether `epsilon` is in units of the statistics' Frobenius norm.
      initial_preconditioner: The preconditioners are this times I until first computed. 0 makes those steps zero, as in
        the PyTorch reference; 1 leaves the momentum's direction.
      root: 'eigh', 'newton' (matrix products only), or 'auto': 'eigh' on a CPU, else 'newton', decided as the
        program is lowered. Where `relative_epsilon` is False, 'auto' is 'eigh'.
      exponent_override: Take the p-th inverse root with this p >= 1; None means 2 x the preconditioned axes of a block,
        or what `statistics` says.
      statistics: 'shampoo' (G G^T), or 'kl': the gradient is first multiplied by the preconditioners of its other axes
        (KL-Shampoo), and p is 2.
      grafting: The method whose norm each block's step takes, and whose step all other parameters take
        ('none': Adam's).
      grafting_b2: Decay of the grafting method's second moment, in (0, 1); 'adagrad' sums.
      grafting_epsilon: Added to the root of that second moment, > 0.
    """

    relative_epsilon: bool = True
    initial_preconditioner: float = 1.0
    root: Root = "auto"
    exponent_override: int | None = None
    statistics: Statistics = "shampoo"
    grafting: Grafting = "adam"
    grafting_b2: Number = 0.999
    grafting_epsilon: Number = 1e-8

    def __post_init__(self) -> None:
        """Raise ValueError as `Options`."""
        super().__post_init__()
        self._require(
            "root",
            self.relative_epsilon or self.root != "newton",
            "'eigh' or 'auto' where relative_epsilon is False (the length of 'newton' is fixed by a relative one)",
        )
        if self.statistics == "kl":
            self._require("exponent_override", self.exponent_override is None, "None where statistics='kl' (p is 2)")
            self._require(
                "initial_preconditioner",
                self.initial_preconditioner > 0,
                "> 0 where statistics='kl', which multiplies gradients by it",
            )

    def diagonal(self, preconditioned: bool) -> Diagonal:
        """Choose the grafting method; what is neither preconditioned nor grafted is Adam's."""
        method: Grafting = "adam" if self.grafting == "none" and not preconditioned else self.grafting
        return Diagonal(method, 1.0 if method == "adagrad" else self.grafting_b2, self.grafting_epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoapOptions(Options):
    """The settings of SOAP; the others are those of `Options`. Decays and frequency are those of its paper.

    Attributes:
      basis: How an eigenbasis follows its statistics: one power iteration, orthogonalized by 'qr' (LAPACK or cuSOLVER)
        or by 'gram_schmidt' (matrix products only), or 'eigh'; 'auto': 'qr' on a CPU, else 'gram_schmidt', as the
        program is lowered.
    """

    b1: Number = 0.95
    b2: Number = 0.95
    epsilon: Number = 1e-8
    precondition_frequency: int = 10
    basis: Basis = "auto"

    @property
    def start(self) -> int:
        """The last step that is Adam's own: none by default."""
        return self.start_preconditioning_step or 0

    @property
    def refresh_early(self) -> bool:
        """A first basis from few gradients is poor, and each refresh is but one step of an iteration."""
        return True

    def diagonal(self, preconditioned: bool) -> Diagonal:
        """Choose Adam, in the eigenbasis and elsewhere."""
        return Diagonal("adam", self.b2, self.epsilon)


# The PyTorch reference (richardcepka/SimplEsT-ViT, train.py), whose trajectory this preset follows.
REFERENCE = ShampooOptions(
    epsilon=1e-12,
    relative_epsilon=False,
    initial_preconditioner=0.0,
    stagger=False,
    max_preconditioner_dim=8192,
    merge_dims=True,
    precondition_1d=True,
    root="eigh",
    max_residual=math.inf,
    precision="highest",
)

PRESETS: dict[str, ShampooOptions | SoapOptions] = {
    "fast": ShampooOptions(),
    "reference": REFERENCE,
    "soap": SoapOptions(),
}


def resolve_options(preset: str, **given: Any) -> Any:
    """Replace values of a preset by those given that are not None.

    Args:
      preset: 'fast', 'reference' or 'soap'.
      **given: Fields of `ShampooOptions` or, for 'soap', of `SoapOptions`.

    Returns:
      The options.

    Raises:
      ValueError: For an unknown preset, or a value out of range: the message names the field, its value and the range.
      TypeError: For a name that is not a setting.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: it must be one of {tuple(PRESETS)}.")
    return dataclasses.replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})


_Alias = TypeVar("_Alias", bound=Callable[..., Any])


def takes_settings_of(options: type[Options]) -> Callable[[_Alias], _Alias]:
    """Show the `**settings` of an alias as the fields of its options, for `help` and `optax.inject_hyperparams`."""

    def decorate(alias: _Alias) -> _Alias:
        signature = inspect.signature(alias)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
        fields = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=field.type)
            for field in dataclasses.fields(options)
        ]
        alias.__signature__ = signature.replace(parameters=own + fields)  # type: ignore[attr-defined]
        return alias

    return decorate
