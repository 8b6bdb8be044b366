r"""TAT (tailored activation transformation): a leaky ReLU (tailored rectifier) whose slope is solved for the depth.

Zhang, Botev and Martens, "Deep Learning without Shortcuts: Shaping the Kernel with Tailored Rectifiers"
(arXiv 2203.08120). In a wide network the cosine c of two inputs becomes C(c) after an activation (its C-map). A deep
composition of C-maps drives every cosine to 1, so that all inputs look alike. TAT picks the negative slope of a leaky
ReLU so that orthogonal inputs end at the cosine `c_val_0_target` (eta) after the whole network, C_f(0) = eta < 1.

A block of SimplEsT-ViT has two activations, so a network of depth L composes the map 2 L times.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from simplest_vit.errors import UserError

_MOST_COMPOSITIONS = 2000  # of the deepest network that an error suggests


def c_map(c: np.ndarray | float, negative_slope: float) -> np.ndarray:
    """Compute the C-map of a leaky ReLU for inputs of equal norm (TAT, section 3; Cho and Saul 2009 for slope 0).

    It maps cosines in [-1, 1] of any shape to those after the activation, float64.
    """
    c = np.clip(np.asarray(c, np.float64), -1.0, 1.0)
    weight = (1.0 - negative_slope) ** 2 / (math.pi * (1.0 + negative_slope**2))
    return c + weight * (np.sqrt(1.0 - c**2) - c * np.arccos(c))


def composed_c_map(c: np.ndarray | float, negative_slope: float, compositions: int) -> np.ndarray:
    """Compose the C-maps of `compositions` layers, each a wide linear layer and a leaky ReLU; float64, shape of `c`."""
    for _ in range(compositions):
        c = c_map(c, negative_slope)
    return np.asarray(c, np.float64)


@functools.cache
def solve_negative_slope(compositions: int, c_val_0_target: float = 0.9) -> float:
    """Solve for the negative slope s in (0, 1) with C_f(0) = eta (TAT, equation 9).

    C_f(0) falls from its value for ReLU (s = 0) to 0 (s = 1, a linear network).

    Args:
      compositions: Number of activations on a path through the network, 2 * depth here.
      c_val_0_target: eta, the cosine of orthogonal inputs after the network, in (0, 1).

    Raises:
      UserError: If `c_val_0_target` is outside (0, 1), or out of reach even for ReLU because the network is shallow.
    """
    if not 0.0 < c_val_0_target < 1.0:
        raise UserError(f"config.model.c_val_0_target={c_val_0_target} must lie in (0, 1)")
    highest = float(composed_c_map(0.0, 0.0, compositions))
    if highest <= c_val_0_target:
        reached, needed = highest, compositions
        while reached <= c_val_0_target and needed < _MOST_COMPOSITIONS:
            reached, needed = float(c_map(reached, 0.0)), needed + 1
        deeper = f" or use a depth of at least {math.ceil(needed / 2)}" if reached > c_val_0_target else ""
        raise UserError(
            f"config.model.c_val_0_target={c_val_0_target} is out of reach for depth {compositions // 2} "
            f"({compositions} activations): even ReLU gives only {highest:.4f}; "
            f"lower c_val_0_target below that{deeper}"
        )
    from scipy import optimize  # slow to import, and few networks solve for a slope

    return optimize.brentq(
        lambda slope: float(composed_c_map(0.0, slope, compositions)) - c_val_0_target,
        0.0,
        1.0,
        xtol=1e-15,
        rtol=4 * np.finfo(np.float64).eps,
    )


def output_scale(negative_slope: float) -> float:
    """Return the factor sqrt(2 / (1 + s^2)) that keeps the mean square of a unit Gaussian input."""
    return math.sqrt(2.0 / (1.0 + negative_slope**2))


def _slope(x: jax.Array, negative_slope: float) -> jax.Array:
    """Compute the derivative of TReLU; `x` may be its input or its output, which have the same sign."""
    scale = output_scale(negative_slope)
    return jnp.where(x > 0, jnp.asarray(scale, x.dtype), jnp.asarray(scale * negative_slope, x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def tailored_relu(x: jax.Array, negative_slope: float) -> jax.Array:
    """Compute TReLU(x) = sqrt(2 / (1 + s^2)) * leaky_relu(x, s) (TAT, section 4).

    The gradient uses the sign of the output, so training keeps one array per activation: the output, which the next
    product needs anyway.

    Args:
      x: Pre-activations of any shape and float dtype.
      negative_slope: s, from `solve_negative_slope`; 0 gives a ReLU that keeps the mean square.

    Returns:
      Activations of the same shape and dtype.
    """
    return x * _slope(x, negative_slope)


def _forward(x: jax.Array, negative_slope: float) -> tuple[jax.Array, jax.Array]:
    y = tailored_relu(x, negative_slope)
    return y, y


def _backward(negative_slope: float, y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient * _slope(y, negative_slope),)


tailored_relu.defvjp(_forward, _backward)
