"""Signal propagation of one model as curves over its blocks: measured, and in theory if there is one."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from simplest_vit.analysis import kernel_theory, measure
from simplest_vit.analysis.jacobian import jacobian_spectrum, merge_spectra
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.models import ViT
from simplest_vit.models.layers import patchify
from simplest_vit.training.run import build

Curves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Curves over the blocks, float64 [L + 1]; block 0 is the embedding. NaN if a quantity has no value.

    Attributes:
      name: Of the model.
      measured: mean_square, token_cosine, image_cosine, attention_entropy (nats), attention_distance, token_gradient,
        parameter_gradient; with a theory also kernel_error, the largest |cosine - theory| of two tokens of an image.
      jacobian: Singular values of the network's Jacobian at the first image and their shares, from `jacobian_spectrum`,
        those of all models together.
      theory: mean_square, token_cosine, image_cosine of the infinitely wide network at initialization, and
        image_cosine_c_map, the C-map of the activations alone, without attention. Empty without theory.
      token_rows: Cosines of the middle token with all tokens, [L + 1, T], measured; averaged over images.
      theory_rows: The same in theory, or None.
      alone_rows: The middle token's row of the kernel that attention alone gives to orthogonal tokens, [L, T], or None.
      alone_theory_rows: The same in theory, or None; Sigma_l for E-SPA.
    """

    name: str
    measured: Curves
    jacobian: tuple[np.ndarray, np.ndarray]
    theory: Curves
    token_rows: np.ndarray
    theory_rows: np.ndarray | None
    alone_rows: np.ndarray | None
    alone_theory_rows: np.ndarray | None


def initial_models(config: Any, data: DatasetInfo, seeds: int) -> Iterable[ViT]:
    """Yield the float32 model of a config at initialization for `seeds` seeds from `config.seed` on.

    Raises:
      UserError: If the config does not fit the data.
    """
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    run = build(config, data)
    initialize = jax.jit(lambda seed: run.initialize(seed=seed).model_state)
    for seed in range(config.seed, config.seed + seeds):
        yield run.model(initialize(np.uint32(seed)))


def analyse(name: str, models: Iterable[ViT], image: jax.Array, label: jax.Array) -> Propagation:
    """Measure models of one config on a batch, average over them, and compute the theory beside it.

    Args:
      name: Name of the model.
      models: At least one, float32.
      image: Normalized images [B, H, W, C], B >= 2.
      label: Class distributions [B, num_classes].

    Returns:
      The curves.
    """
    measurements, alone, spectra = [], [], []
    for model in models:
        start = model.initial_attention()
        num_tokens, width = model.position_embedding.shape
        measurements.append(measure.measure_propagation(model, image, label, start))
        spectra.append(jacobian_spectrum(model, image[:1]))
        if start is not None and model.preserves_kernels and not model.has_norm and num_tokens <= width:
            alone.append(measure.attention_alone(model))
    mean = {key: np.stack([m[key] for m in measurements]).mean(axis=0, dtype=np.float64) for key in measurements[0]}
    kernel, middle = mean.pop("kernel"), num_tokens // 2
    del mean["logits"]
    measured = _curves(kernel) | {
        key: np.pad(x, (model.depth + 1 - len(x), 0), constant_values=np.nan) for key, x in mean.items()
    }
    theory, theory_rows, alone_theory = {}, None, None
    if start is not None and alone:
        orthogonal = np.eye(num_tokens)[None, None].repeat(2, axis=0)
        alone_theory = kernel_theory.kernel_recursion(orthogonal, start, lambda cosine: cosine)[1:, 0, 0, middle]
    kernels = theoretical_kernels(model, image)
    if kernels is not None:
        theory = _curves(kernels)
        cosine = [theory["image_cosine"][0]]
        for _ in range(model.depth):
            cosine.append(model.blocks.mlp.initial_c_map()(cosine[-1]))
        theory["image_cosine_c_map"] = np.array(cosine)
        difference = kernel_theory.correlation(kernel) - kernel_theory.correlation(kernels)
        measured["kernel_error"] = np.abs(difference[:, 0]).max(axis=(1, 2, 3))
        theory_rows = _rows(kernels, middle)
    return Propagation(
        name=name,
        measured=measured,
        jacobian=merge_spectra(spectra),
        theory=theory,
        token_rows=_rows(kernel, middle),
        theory_rows=theory_rows,
        alone_rows=np.mean(alone, axis=0)[:, middle] if alone else None,
        alone_theory_rows=alone_theory,
    )


def theoretical_kernels(model: ViT, image: jax.Array) -> np.ndarray | None:
    """Compute the kernels at initialization in the infinitely wide network, [L + 1, 2, B, T, T].

    None if there is no closed form: attention depends on the weights drawn, the activations of the MLP have none, or
    there are normalizations, skip connections or kernels that change mean products.
    """
    matrices, c_map = model.initial_attention(), model.blocks.mlp.initial_c_map()
    if matrices is None or c_map is None or model.has_norm or model.has_skip or not model.preserves_kernels:
        return None
    first = kernel_theory.embedding_kernel(
        np.asarray(patchify(image, model.patch_size)), np.asarray(model.position_embedding[...])
    )
    return kernel_theory.kernel_recursion(first, matrices, c_map)


def _rows(kernel: np.ndarray, token: int) -> np.ndarray:
    """Return the cosines of one token with all tokens of its image, averaged over images: [L + 1, T]."""
    return kernel_theory.correlation(kernel)[:, 0, :, token].mean(axis=1)


def _curves(kernel: np.ndarray) -> Curves:
    """Average kernels [L + 1, 2, B, T, T] over images and tokens."""
    cosine = kernel_theory.correlation(kernel)
    tokens = cosine.shape[-1]
    same_token = np.trace(cosine, axis1=-2, axis2=-1)
    others = (cosine[:, 0].sum(axis=(-2, -1)) - same_token[:, 0]) / max(tokens * (tokens - 1), 1)
    return {
        "mean_square": kernel_theory.mean_square(kernel).mean(axis=(-2, -1)),
        "token_cosine": others.mean(axis=-1),
        "image_cosine": same_token[:, 1].mean(axis=-1) / tokens,
    }
