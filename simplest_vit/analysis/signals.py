"""Signal propagation of one model as curves over its blocks: measured, and where there is one, the theory."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplest_vit.analysis import kernel_theory, measure
from simplest_vit.analysis.jacobian import jacobian_spectrum, pooled
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.models import espa, tat
from simplest_vit.models.layers import patchify, token_grid
from simplest_vit.models.simplest_vit import ShapedAttention, SimplestViT, ValueSkipInit
from simplest_vit.training.run import build

Curves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Signals:
    """Curves over the blocks, float64 [L + 1]; block 0 is the embedding, NaN where a quantity has no value.

    Attributes:
      name: Of the model.
      measured: mean_square, token_cosine, image_cosine, attention_entropy (nats), attention_distance, token_gradient,
        parameter_gradient; with a theory also kernel_error, the greatest |cosine - theory| of two tokens of an image.
      jacobian: Singular values of the network's Jacobian at the first image and their shares, from `jacobian_spectrum`,
        those of all models together.
      theory: mean_square, token_cosine, image_cosine of the infinitely wide network at initialization, and
        image_cosine_c_map, the C-map of the activations alone, without attention. Empty without theory.
      token_rows: Cosines of the middle token with all tokens, [L + 1, T], measured; averaged over images.
      theory_rows: The same in theory, or None.
      alone_rows: The middle token's row of the kernel that attention alone gives to orthogonal tokens, [L, T], or None.
      sigma_rows: The same rows of Sigma_l, or None.
    """

    name: str
    measured: Curves
    jacobian: tuple[np.ndarray, np.ndarray]
    theory: Curves
    token_rows: np.ndarray
    theory_rows: np.ndarray | None
    alone_rows: np.ndarray | None
    sigma_rows: np.ndarray | None


def initial_models(config: Any, data: DatasetInfo, seeds: int) -> Iterable[measure.Model]:
    """The float32 model of a config at initialization, from `seeds` seeds beginning with `config.seed`.

    Raises:
      UserError: If the config does not fit the data.
    """
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    run = build(config, data)
    initialize = jax.jit(lambda seed: run.initialize(seed=seed).model_state)
    for seed in range(config.seed, config.seed + seeds):
        yield run.model(initialize(np.uint32(seed)))


def analyse(name: str, models: Iterable[measure.Model], config: Any, image: jax.Array, label: jax.Array) -> Signals:
    """Measure models of one config on a batch, average over them, and set the theory beside it.

    Args:
      name: What to call the model.
      models: At least one, float32.
      config: `config.model`: which attention matrices A_l to compare with (for models without, E-SPA's), and which
        theory holds.
      image: Normalized images [B, H, W, C], B >= 2.
      label: Class distributions [B, num_classes].

    Returns:
      The curves.
    """
    measurements, alone, spectra = [], [], []
    for model in models:
        grid = token_grid(image.shape[1:], model.patch_size)
        depth = jax.tree.leaves(nnx.state(model.blocks))[0].shape[0]
        form = config.attention if config.attention in espa.FORMS else "espa"
        shaping = config.gamma_max_depth, form, config.rho_max_depth
        if isinstance(model, SimplestViT) and config.attention == "shift":
            target = _shaped_attention(model.blocks.attention)
        else:
            target = espa.attention_matrices(grid, depth, *shaping)[:, None]
        measurements.append(measure.measure(model, image, label, target))
        spectra.append(jacobian_spectrum(model, image[:1]))
        num_tokens, width = model.position_embedding.shape
        if isinstance(model, SimplestViT) and config.attention in espa.FORMS and num_tokens <= width:
            alone.append(measure.attention_alone(model))
    mean = {key: np.stack([m[key] for m in measurements]).mean(axis=0, dtype=np.float64) for key in measurements[0]}
    kernel = mean.pop("kernel")
    del mean["logits"]
    measured = _curves(kernel) | {
        key: np.pad(x, (depth + 1 - len(x), 0), constant_values=np.nan) for key, x in mean.items()
    }

    theory, theory_rows, middle = {}, None, num_tokens // 2
    kernels = theoretical_kernels(model, config, image)
    if kernels is not None:
        theory = _curves(kernels)
        start = theory["image_cosine"][0]
        if config.mlp == "shaped":
            slope = model.blocks.mlp.negative_slope
            theory["image_cosine_c_map"] = np.array(
                [tat.composed_c_map(start, slope, 2 * block) for block in range(depth + 1)]
            )
        difference = kernel_theory.correlation(kernel) - kernel_theory.correlation(kernels)
        measured["kernel_error"] = np.abs(difference[:, 0]).max(axis=(1, 2, 3))
        theory_rows = _rows(kernels, middle)
    return Signals(
        name=name,
        measured=measured,
        jacobian=pooled(spectra),
        theory=theory,
        token_rows=_rows(kernel, middle),
        theory_rows=theory_rows,
        alone_rows=np.mean(alone, axis=0)[:, middle] if alone else None,
        sigma_rows=espa.kernel_matrices(grid, depth, *shaping)[1:, middle] if alone else None,
    )


def theoretical_kernels(model: measure.Model, config: Any, image: jax.Array) -> np.ndarray | None:
    """Kernels at initialization in the infinitely wide network, [L + 1, 2, B, T, T].

    None where attention depends on the weights drawn: then there is no closed form.
    """
    matrices = initial_attention(model)
    if matrices is None:
        return None
    first = kernel_theory.embedding_kernel(
        np.asarray(patchify(image, model.patch_size)), np.asarray(model.position_embedding[...])
    )
    if config.mlp == "mirrored":
        return kernel_theory.kernel_recursion(first, matrices, lambda kernel: kernel)
    width, mlp_dim = model.blocks.mlp.dense1.kernel.shape[1:]
    gain = kernel_theory.dense_gain(width, mlp_dim, config.init) * kernel_theory.dense_gain(mlp_dim, width, config.init)
    slope = model.blocks.mlp.negative_slope
    return kernel_theory.kernel_recursion(first, matrices, lambda kernel: kernel_theory.shaped_mlp(kernel, slope, gain))


def initial_attention(model: measure.Model) -> np.ndarray | None:
    """What attention multiplies values with at initialization, by its constants: float64 [L, H or 1, T, T], or None."""
    attention = model.blocks.attention
    if isinstance(attention, ShapedAttention):
        return _shaped_attention(attention)
    if isinstance(attention, ValueSkipInit):
        return np.tile(np.eye(len(model.position_embedding[...])), (len(attention.alpha[...]), 1, 1, 1))
    return None


def _shaped_attention(attention: ShapedAttention) -> np.ndarray:
    """`initial_attention` of shaped attention, whose queries start at zero."""
    bias = np.asarray(attention.attention_bias[...], np.float64)
    bias = bias.reshape(len(bias), -1, *bias.shape[-2:])
    weights = np.exp(bias - bias.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    if attention.row_scale is not None:
        weights *= np.asarray(attention.row_scale[...], np.float64)[:, None, :, None]
    return weights


def _rows(kernel: np.ndarray, token: int) -> np.ndarray:
    """Cosines of one token with all tokens of its image, averaged over images: [L + 1, T]."""
    return kernel_theory.correlation(kernel)[:, 0, :, token].mean(axis=1)


def _curves(kernel: np.ndarray) -> Curves:
    """Means over images and tokens of kernels [L + 1, 2, B, T, T]."""
    cosine = kernel_theory.correlation(kernel)
    tokens = cosine.shape[-1]
    same_token = np.trace(cosine, axis1=-2, axis2=-1)
    others = (cosine[:, 0].sum(axis=(-2, -1)) - same_token[:, 0]) / max(tokens * (tokens - 1), 1)
    return {
        "mean_square": kernel_theory.mean_square(kernel).mean(axis=(-2, -1)),
        "token_cosine": others.mean(axis=-1),
        "image_cosine": same_token[:, 1].mean(axis=-1) / tokens,
    }
