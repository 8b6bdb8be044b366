"""Signal propagation: kernels, attention and gradients of a model block by block, measured and in theory.

A kernel is the mean product of two tokens' features. It is kept for two kinds of pairs, [2, B, T, T]:

    kernel[0, b]  tokens of image b with one another
    kernel[1, b]  tokens of image b with those of image b + 1 (the last one's with the first)

The theory is for infinite width, without noise, in float64. At initialization attention maps a kernel to the mean
over heads of A_h K A_h^T: heads own disjoint columns of the values, which keep products (He et al., arXiv 2302.10322,
section 3). An MLP maps that to q * C(corr(K)) and leaves the mean squares q as they are. C is the C-map of both
activations for TAT (arXiv 2203.08120, section 3), and the identity for the looks-linear MLP, which is orthogonal. With
several images, A_h acts on every pair of images alike.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simplest_vit.analysis.jacobian import jacobian_spectrum, merge_spectra
from simplest_vit.models import ViT
from simplest_vit.models.layers import identity, patchify

Curves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Curves over the blocks, float64 [L + 1]; block 0 is the embedding. NaN if a quantity has no value."""

    name: str
    # mean_square, token_cosine, image_cosine, attention_entropy (nats), attention_distance, token_gradient,
    # parameter_gradient; with a theory also kernel_error, the largest |cosine - theory| of two tokens of an image.
    measured: Curves
    # Singular values of the network's Jacobian at the first image and their shares, from `jacobian_spectrum`, merged
    # over the models.
    jacobian: tuple[np.ndarray, np.ndarray]
    # mean_square, token_cosine, image_cosine of the infinitely wide network at initialization, and image_cosine_c_map,
    # the C-map of the activations alone, without attention. Empty without theory.
    theory: Curves
    token_rows: np.ndarray  # cosines of the middle token with all tokens, [L + 1, T], averaged over images
    theory_rows: np.ndarray | None  # the same in theory, or None


def analyse(name: str, models: Iterable[ViT], image: jax.Array, label: jax.Array) -> Propagation:
    """Measure models of one config on a batch, average over the models, and compute the theory.

    Args:
      models: At least one, float32.
      image: Normalized images [B, H, W, C], B >= 2.
      label: Class distributions [B, num_classes].
    """
    measurements, spectra = [], []
    for model in models:
        with jax.default_matmul_precision("float32"):
            measurements.append(measure_propagation(model, image, label, model.initial_attention()))
            spectra.append(jacobian_spectrum(model, image[:1]))
    mean = {key: np.stack([m[key] for m in measurements]).mean(axis=0, dtype=np.float64) for key in measurements[0]}
    kernel = mean.pop("kernel")
    measured = _curves(kernel) | {
        key: np.pad(x, (model.depth + 1 - len(x), 0), constant_values=np.nan) for key, x in mean.items()
    }
    theory, kernels = {}, theoretical_kernels(model, image)
    if kernels is not None:
        theory = _curves(kernels)
        cosine = [theory["image_cosine"][0]]
        for _ in range(model.depth):
            cosine.append(model.blocks.mlp.initial_c_map()(cosine[-1]))
        theory["image_cosine_c_map"] = np.array(cosine)
        difference = correlation(kernel) - correlation(kernels)
        measured["kernel_error"] = np.abs(difference[:, 0]).max(axis=(1, 2, 3))
    return Propagation(
        name=name,
        measured=measured,
        jacobian=merge_spectra(spectra),
        theory=theory,
        token_rows=_rows(kernel),
        theory_rows=None if kernels is None else _rows(kernels),
    )


def _rows(kernel: np.ndarray) -> np.ndarray:
    """Return the cosines of the middle token with all tokens of its image, averaged over images: [L + 1, T]."""
    return correlation(kernel)[:, 0, :, kernel.shape[-1] // 2].mean(axis=1)


def _curves(kernel: np.ndarray) -> Curves:
    """Average kernels [L + 1, 2, B, T, T] over images and tokens."""
    cosine = correlation(kernel)
    tokens = cosine.shape[-1]
    same_token = np.trace(cosine, axis1=-2, axis2=-1)
    others = (cosine[:, 0].sum(axis=(-2, -1)) - same_token[:, 0]) / max(tokens * (tokens - 1), 1)
    return {
        "mean_square": mean_square(kernel).mean(axis=(-2, -1)),
        "token_cosine": others.mean(axis=-1),
        "image_cosine": same_token[:, 1].mean(axis=-1) / tokens,
    }


# Theory.


def token_kernel(x: Any, xp: Any = np) -> Any:
    """Compute the kernel of tokens [B, T, D] with NumPy, or the module `xp`: [2, B, T, T]."""
    pairs = xp.stack([x, xp.roll(x, -1, axis=0)])
    return xp.einsum("btd,pbsd->pbts", x, pairs, optimize=True) / x.shape[-1]


def theoretical_kernels(model: ViT, image: jax.Array) -> np.ndarray | None:
    """Compute the kernels at initialization in the infinitely wide network, [L + 1, 2, B, T, T].

    None if there is no closed form: attention depends on the weights drawn, the activations of the MLP have none, or
    there are normalizations, skip connections or kernels that change mean products.
    """
    matrices, c_map = model.initial_attention(), model.blocks.mlp.initial_c_map()
    is_plain = model.norm is identity and model.blocks.skip == "none"
    if matrices is None or c_map is None or not (is_plain and model.preserves_kernels):
        return None
    # The weights of the patch embedding are N(0, 1 / fan_in).
    patches = np.asarray(patchify(image, model.patch_size), np.float64)
    position = np.asarray(model.position_embedding[...], np.float64)
    return kernel_recursion(token_kernel(patches) + position @ position.T / position.shape[1], matrices, c_map)


def kernel_recursion(
    kernel: np.ndarray, attention: np.ndarray, c_map: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Compute the kernels before the first block and after each: K -> q * C(corr(K')), K' = mean_h A_h K A_h^T.

    Args:
      kernel: Before the first block, [2, B, T, T]; the result is float64 [L + 1, 2, B, T, T].
      attention: Attention matrices of every block, [L, H or 1, T, T].
      c_map: C, the C-map of an MLP.
    """
    kernels = [kernel]
    for heads in attention:
        mixed = sum(matrix @ kernels[-1] @ matrix.T for matrix in heads) / len(heads)
        kernels.append(norms(mixed) * c_map(correlation(mixed)))
    return np.stack(kernels)


def mean_square(kernel: np.ndarray) -> np.ndarray:
    """Return the q-values of all tokens: [..., 2, B, T, T] -> [..., B, T]."""
    return np.diagonal(kernel[..., 0, :, :, :], axis1=-2, axis2=-1)


def norms(kernel: np.ndarray) -> np.ndarray:
    """Return the products of the two tokens' root mean squares, in the shape of `kernel`."""
    root = np.sqrt(mean_square(kernel))
    other = np.stack([root, np.roll(root, -1, axis=-2)], axis=-3)
    return root[..., None, :, :, None] * other[..., :, :, None, :]


def correlation(kernel: np.ndarray) -> np.ndarray:
    """Return the cosines of tokens, in the shape of `kernel`."""
    return kernel / norms(kernel)


# Measurement.


@nnx.jit
def measure_propagation(
    model: ViT, image: jax.Array, label: jax.Array, start: np.ndarray | None
) -> dict[str, jax.Array]:
    """Run a batch forward and backward, and measure it at each block.

    Args:
      model: The model, in float32; so must be the precision of products.
      image: Normalized images [B, H, W, C].
      label: Class distributions, float32 [B, num_classes], for the loss whose gradients are taken.
      start: Attention matrices at initialization, [L, H or 1, T, T], or None if they depend on the weights drawn.

    Returns:
      Arrays, with block 0 for the embedding:
        kernel: [L + 1, 2, B, T, T].
        attention_entropy: [L], mean entropy in nats of the rows |A| / sum |A| of the attention matrices A.
        attention_distance: [L], root mean square over images and heads of |A - A_start| / |A_start| (Frobenius); absent
          without `start`.
        token_gradient: [L + 1], norm of the loss's gradient at the tokens.
        parameter_gradient: [L], norm of the loss's gradient at the parameters of the block.
    """
    blocks_def, *parts = nnx.split(model.blocks, nnx.Param, ...)
    params, constants = (nnx.as_pure(part) for part in parts)
    x = model.embed(image)

    def loss(params: Any, probes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the mean cross-entropy; the gradient at `probes` (zeros between blocks) is that at the tokens."""

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            params, constants, probe, start = layer
            block = nnx.merge(blocks_def, params, constants)
            matrix = block.attention.matrix(x)
            share = jnp.abs(matrix) / jnp.sum(jnp.abs(matrix), axis=-1, keepdims=True)
            y = block(x) + probe
            measured = {
                "kernel": token_kernel(y, jnp),
                "attention_entropy": -jnp.mean(jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)),
            }
            if start is not None:
                squares = jnp.sum((matrix - start[None]) ** 2, axis=(-2, -1))
                measured["attention_distance"] = jnp.sqrt(
                    jnp.mean(squares) / jnp.mean(jnp.sum(start**2, axis=(-2, -1)))
                )
            return y, measured

        first = x + probes[0]
        last, measured = jax.lax.scan(body, first, (params, constants, probes[1:], start))
        measured["kernel"] = jnp.concatenate([token_kernel(first, jnp)[None], measured["kernel"]])
        return optax.softmax_cross_entropy(model.head(model.pool(last)), label).mean(), measured

    probes = jnp.zeros((model.depth + 1, *x.shape), x.dtype)
    (params_gradient, tokens_gradient), measured = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probes)
    squares = [jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(params_gradient)]
    return measured | {
        "token_gradient": jnp.sqrt(jnp.sum(tokens_gradient**2, axis=(1, 2, 3))),
        "parameter_gradient": jnp.sqrt(sum(squares)),
    }
