"""Which tensor of the PyTorch reference is which array here, and how the layouts differ.

Linear layers are [out, in] there and [in, out] here; the patch convolution is [out, in, row, column] there and
[(row, column, in), out] here; queries, keys and values are one fused layer there; blocks are stacked here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the reference and the arrays of one block, or outside of the blocks, that it is made of.

    Attributes:
      name: In the reference's state dict.
      paths: Paths of the arrays here, such as `blocks/mlp/dense1/kernel`.
      block: Index along the first axis of these arrays; None where they are not stacked.
      here: Turns the tensor into the arrays.
      there: Turns the arrays into the tensor.
    """

    name: str
    paths: tuple[str, ...]
    block: int | None
    here: Callable[[np.ndarray], Arrays]
    there: Callable[..., Any]

    def arrays(self, flat: dict[str, Any]) -> list[Any]:
        """The arrays that it is made of, among those of a model by path."""
        return [flat[path] if self.block is None else flat[path][self.block] for path in self.paths]


# Layouts: tensor -> arrays, and back.
_SAME = (lambda x: (x,), lambda x: x)
_DENSE = (lambda w: (w.T,), lambda kernel: kernel.T)
_QKV_WEIGHT = (lambda w: tuple(part.T for part in np.split(w, 3)), lambda *qkv: jnp.concatenate([k.T for k in qkv]))
_QKV_BIAS = (lambda b: tuple(np.split(b, 3)), lambda *qkv: jnp.concatenate(qkv))
_ROW_SCALE = (lambda d: (d.reshape(-1),), lambda row_scale: row_scale.reshape(1, 1, -1, 1))
_ATTENTION_BIAS = (lambda b: (b[0, 0],), lambda attention_bias: attention_bias[None, None])


def _convolution(patch_size: int) -> tuple[Callable, Callable]:
    def there(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(patch_size, patch_size, -1, kernel.shape[1]).transpose(3, 2, 0, 1)

    return lambda w: (w.transpose(2, 3, 1, 0).reshape(-1, len(w)),), there


def _layer(there: str, here: str, block: int | None = None, layout: tuple[Callable, Callable] = _DENSE) -> list[Tensor]:
    """A layer with a weight and a bias."""
    return [
        Tensor(f"{there}.weight", (f"{here}/kernel",), block, *layout),
        Tensor(f"{there}.bias", (f"{here}/bias",), block, *_SAME),
    ]


def _norm(there: str, here: str, block: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{there}.weight", (f"{here}/scale",), block, *_SAME),
        Tensor(f"{there}.bias", (f"{here}/bias",), block, *_SAME),
    ]


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"blocks/attention/{part}/{kind}" for part in ("query", "key", "value"))


def tensors(model: str, depth: int, patch_size: int) -> Iterator[Tensor]:
    """All tensors of a model of the reference.

    Args:
      model: `simplest_vit` or `simple_vit`.
      depth: Number of blocks.
      patch_size: Side of a patch in pixels.

    Yields:
      The tensors; together they make up all parameters and, but for the position embedding, all constants.
    """
    yield from _layer("to_patch_embedding", "patch_embedding", layout=_convolution(patch_size))
    for block in range(depth):
        if model == "simplest_vit":
            attention, mlp = f"transformer.layers.{2 * block}", f"transformer.layers.{2 * block + 1}"
            yield Tensor(f"{attention}.d", ("blocks/attention/row_scale",), block, *_ROW_SCALE)
            yield Tensor(f"{attention}.B", ("blocks/attention/attention_bias",), block, *_ATTENTION_BIAS)
            yield Tensor(f"{attention}.to_qkv.bias", _qkv("bias"), block, *_QKV_BIAS)
            dense1, dense2 = f"{mlp}.layer1.lin", f"{mlp}.layer2.lin"
        else:
            attention, mlp = f"transformer.layers.{block}.0", f"transformer.layers.{block}.1.ff"
            yield from _norm(f"{attention}.norm", "blocks/attention/norm", block)
            yield Tensor(f"{attention}.to_out.weight", ("blocks/attention/out/kernel",), block, *_DENSE)
            yield from _norm(f"{mlp}.0", "blocks/mlp/norm", block)
            dense1, dense2 = f"{mlp}.1", f"{mlp}.3"
        yield Tensor(f"{attention}.to_qkv.weight", _qkv("kernel"), block, *_QKV_WEIGHT)
        yield from _layer(dense1, "blocks/mlp/dense1", block)
        yield from _layer(dense2, "blocks/mlp/dense2", block)
    if model == "simplest_vit":
        yield from _layer("linear_head", "head")
    else:
        yield from _norm("linear_head.0", "norm")
        yield from _layer("linear_head.1", "head")


def pytorch_layout(params: Any, model: str, patch_size: int) -> dict[str, Any]:
    """Lay parameters out as the reference does, which is how its Shampoo merges their dimensions.

    Args:
      params: Nested dict of parameters.
      model: `simplest_vit` or `simple_vit`.
      patch_size: Side of a patch in pixels.

    Returns:
      The same arrays, in another order, by the names of the reference's state dict.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    layout: dict[str, Any] = {}
    for tensor in tensors(model, flat["blocks/mlp/dense1/kernel"].shape[0], patch_size):
        if tensor.paths[0] in flat:  # E-SPA's constants are no parameters
            layout[tensor.name] = tensor.there(*tensor.arrays(flat))
    return layout
