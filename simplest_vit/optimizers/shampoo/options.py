"""Every setting of Shampoo and SOAP, its allowed range, and the presets: data, not branches."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Preset = Literal["fast", "reference", "soap"]
Root = Literal["auto", "eigh", "newton"]
Basis = Literal["qr", "eigh"]
Grafting = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]

_CHOICES = {
    "root": ("auto", "eigh", "newton"),
    "basis": ("qr", "eigh"),
    "grafting": ("none", "sgd", "adagrad", "rmsprop", "adam"),
    "precision": ("default", "high", "highest"),
}


@dataclasses.dataclass(frozen=True)
class ShampooOptions:
    """The settings of one Shampoo or SOAP transformation.

    Attributes:
        b1: Decay of the gradient's average (momentum), in [0, 1).
        b2: Decay of the statistics (and of SOAP's second moment), in (0, 1]; 1 sums them (AdaGrad).
        epsilon: Damping of the statistics before their root, > 0.
        relative_epsilon: Whether `epsilon` is in units of the statistics' Frobenius norm.
        initial_preconditioner: The preconditioners are this times I until first computed. 0 makes
            those steps zero, as in the PyTorch reference; 1 leaves the momentum's direction.
        precondition_frequency: Steps between two computations of a preconditioner, >= 1.
        start_preconditioning_step: Steps up to and including this one are the grafting method's
            own, >= 0; None means `precondition_frequency`.
        stagger: Whether to recompute some slots at each step, so that the step time stays flat (all
            of them at the start step), instead of all at once at multiples of the frequency.
        max_preconditioner_dim: Longer dimensions are cut into blocks of this size, >= 1.
        merge_dims: Whether neighbouring dimensions are merged while their product is at most
            `max_preconditioner_dim`.
        precondition_1d: Whether vectors get a (full-matrix) preconditioner. Where they do not, and
            for scalars, the step is the grafting method's own (Adam's where grafting is 'none').
        root: 'eigh', 'newton' (matrix products only), or 'auto': 'eigh' on CPU, else 'newton'.
        basis: How SOAP refreshes its eigenbases: one power iteration and 'qr', or 'eigh'.
        exponent_override: Take the p-th inverse root with this p >= 1; None means 2 x the order of
            the block.
        max_residual: A root with ||X^p A - I||_F / sqrt(n) above this is rejected, > 0.
        grafting: The method whose norm each block's step takes.
        grafting_b2: Decay of the grafting method's second moment, in (0, 1].
        grafting_epsilon: Added to the root of that second moment (and of SOAP's), > 0.
        preconditioner_dtype: float32, or float64 where x64 is enabled.
        mu_dtype: Type of the stored momentum, such as bfloat16; None means float32 or wider.
        precision: Of the products that make and apply the preconditioners ('default' is TF32 on
            GPU). Roots are always computed at the highest.
        shards: The number of devices that stacks can be spread over evenly, >= 1 (any divisor of it
            as well). The state's shapes depend on this, and never on the devices at hand.
    """

    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-5
    relative_epsilon: bool = True
    initial_preconditioner: float = 1.0
    precondition_frequency: int = 25
    start_preconditioning_step: int | None = None
    stagger: bool = True
    max_preconditioner_dim: int = 384
    merge_dims: bool = False
    precondition_1d: bool = False
    root: Root = "auto"
    basis: Basis = "qr"
    exponent_override: int | None = None
    max_residual: float = 0.1
    grafting: Grafting = "adam"
    grafting_b2: float = 0.999
    grafting_epsilon: float = 1e-8
    preconditioner_dtype: Any = "float32"
    mu_dtype: Any = None
    precision: Literal["default", "high", "highest"] = "default"
    shards: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError with the name, the value and the allowed range of a bad setting."""
        self._require_number("b1", lambda b1: 0 <= b1 < 1, "in [0, 1)")
        for name in ("b2", "grafting_b2"):
            self._require_number(name, lambda b2: 0 < b2 <= 1, "in (0, 1]")
        for name in ("epsilon", "grafting_epsilon"):
            self._require_number(name, lambda epsilon: 0 < epsilon < math.inf, "finite and > 0")
        self._require_number("max_residual", lambda residual: residual > 0, "> 0")
        self._require_number("initial_preconditioner", lambda initial: 0 <= initial < math.inf, ">= 0")
        for name in ("relative_epsilon", "stagger", "merge_dims", "precondition_1d"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        for name in ("precondition_frequency", "max_preconditioner_dim", "shards"):
            value = getattr(self, name)
            self._require(name, _is_int(value) and value >= 1, "an integer >= 1")
        start, exponent = self.start_preconditioning_step, self.exponent_override
        self._require(
            "start_preconditioning_step",
            start is None or (_is_int(start) and start >= 0),
            "an integer >= 0, or None for precondition_frequency",
        )
        self._require(
            "exponent_override",
            exponent is None or (_is_int(exponent) and exponent >= 1),
            "an integer >= 1, or None for 2 x the order of the block",
        )
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {choices}")
        self._require(
            "root",
            self.relative_epsilon or self.root != "newton",
            "'eigh' or 'auto' where relative_epsilon is False (the matmul-only root has a fixed "
            "length, which a relative epsilon sets)",
        )
        for name, allowed in (
            ("preconditioner_dtype", ("float32", "float64")),
            ("mu_dtype", ("bfloat16", "float16", "float32", "float64", "None")),
        ):
            value = getattr(self, name)
            given = "None" if value is None else _dtype_name(value)
            self._require(name, given in allowed, f"one of {allowed}")

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: it must be {allowed}.")

    def _require_number(self, name: str, valid: Callable[[float], bool], allowed: str) -> None:
        value = getattr(self, name)
        self._require(name, isinstance(value, int | float) and not isinstance(value, bool) and valid(value), allowed)

    @property
    def start(self) -> int:
        """The last step that is the grafting method's own."""
        if self.start_preconditioning_step is None:
            return self.precondition_frequency
        return self.start_preconditioning_step

    @property
    def first_refresh(self) -> int:
        """The step at which every preconditioner is computed for the first time."""
        if self.stagger:
            return max(self.start, 1)
        return max(math.ceil(self.start / self.precondition_frequency), 1) * (self.precondition_frequency)

    @property
    def root_method(self) -> Literal["eigh", "newton"]:
        """The root with 'auto' resolved: LAPACK is the faster on CPU, matrix products elsewhere."""
        if self.root != "auto":
            return self.root
        return "newton" if self.relative_epsilon and jax.default_backend() != "cpu" else "eigh"

    @property
    def dtype(self) -> jnp.dtype:
        """The type of statistics and preconditioners.

        Raises:
            ValueError: For float64 while x64 is off, which would silently be float32.
        """
        dtype = jnp.dtype(self.preconditioner_dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError("preconditioner_dtype='float64': it must be 'float32' unless jax_enable_x64 is on.")
        return dtype


HAS_SECOND_MOMENT = ("adagrad", "rmsprop", "adam")


def method_for(block_shape: tuple[int, ...], options: ShampooOptions) -> Grafting:
    """Returns the method of a stack: what is not preconditioned, and not grafted either, is Adam's."""
    return "adam" if options.grafting == "none" and not block_shape else options.grafting


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dtype_name(value: Any) -> str:
    try:
        return jnp.dtype(value).name
    except TypeError:
        return repr(value)


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

FAST = ShampooOptions()

# arXiv 2409.11321: Adam in the eigenbasis, with the decays and the frequency of its experiments. It
# starts as Adam: in the eigenbasis of a single gradient most coordinates are rounding errors, which Adam
# would scale up to full size.
SOAP = ShampooOptions(
    b1=0.95,
    b2=0.95,
    precondition_frequency=10,
    grafting="none",
    grafting_b2=0.95,
)

PRESETS: dict[str, ShampooOptions] = {"fast": FAST, "reference": REFERENCE, "soap": SOAP}


def resolve_options(preset: str, **given: Any) -> ShampooOptions:
    """Returns a preset with the given values (those that are not None) in place of its own.

    Args:
        preset: 'fast', 'reference' or 'soap'.
        **given: Fields of `ShampooOptions`; None leaves the preset's value.

    Returns:
        The options, validated.

    Raises:
        ValueError: For an unknown preset or a value out of range; the message names the field, its
            value and the range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: it must be one of {tuple(PRESETS)}.")
    overrides = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(PRESETS[preset], **overrides)
