"""The tensors of the PyTorch reference, and the arrays in this project that they are made of.

Linear layers are [out, in] there and [in, out] here; the patch convolution is [out, in, row, column] there and
[(row, column, in), out] here; queries, keys and values are one fused layer there; blocks are stacked here.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the reference, and the arrays that it is made of, in one block or outside the blocks."""

    name: str  # in the reference's state dict
    paths: tuple[str, ...]  # paths of the arrays here, such as `blocks/mlp/dense1/kernel`
    block: int | None  # index along the first axis of these arrays; None if they are not stacked
    here: Callable[[np.ndarray], Arrays]  # turns the tensor into the arrays
    there: Callable[..., Any]  # turns the arrays into the tensor

    def arrays(self, flat: dict[str, Any]) -> list[Any]:
        """Return the arrays that it is made of, from those of a model by path."""
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
    """List the weight and the bias of a layer."""
    return [
        Tensor(f"{there}.weight", (f"{here}/kernel",), block, *layout),
        Tensor(f"{there}.bias", (f"{here}/bias",), block, *_SAME),
    ]


def _norm(there: str, here: str, block: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{there}.weight", (f"{here}/scale",), block, *_SAME),
        Tensor(f"{there}.bias", (f"{here}/bias",), block, *_SAME),
    ]


def _each(projections: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"blocks/attention/{projection}/{kind}" for projection in projections)


def tensors(paths: Collection[str], depth: int, patch_size: int) -> Iterator[Tensor]:
    """Yield the tensors of the reference that hold all parameters and, but for the position embedding, all constants.

    Args:
      paths: Paths of all parameters and constants here. With norms, the layout is that of the reference's SimpleViT.
    """
    normalized = "norm/scale" in paths
    yield from _layer("to_patch_embedding", "patch_embedding", layout=_convolution(patch_size))
    for block in range(depth):
        if normalized:
            attention, mlp = f"transformer.layers.{block}.0", f"transformer.layers.{block}.1.ff"
            yield from _norm(f"{attention}.norm", "blocks/attention/norm", block)
            yield from _norm(f"{mlp}.0", "blocks/mlp/norm", block)
            dense1, dense2 = f"{mlp}.1", f"{mlp}.3"
        else:
            attention, mlp = f"transformer.layers.{2 * block}", f"transformer.layers.{2 * block + 1}"
            yield Tensor(f"{attention}.d", ("blocks/attention/row_scale",), block, *_ROW_SCALE)
            yield Tensor(f"{attention}.B", ("blocks/attention/attention_bias",), block, *_ATTENTION_BIAS)
            dense1, dense2 = f"{mlp}.layer1.lin", f"{mlp}.layer2.lin"
        projections = tuple(name for name in ("query", "key", "value") if f"blocks/attention/{name}/kernel" in paths)
        if "query" in projections:
            qkv, weight, bias = f"{attention}.to_qkv", _QKV_WEIGHT, _QKV_BIAS
        else:  # not in the reference: values alone
            qkv, weight, bias = f"{attention}.to_v", _DENSE, _SAME
        yield Tensor(f"{qkv}.weight", _each(projections, "kernel"), block, *weight)
        if "blocks/attention/out/kernel" in paths:
            yield Tensor(f"{attention}.to_out.weight", ("blocks/attention/out/kernel",), block, *_DENSE)
        else:
            yield Tensor(f"{qkv}.bias", _each(projections, "bias"), block, *bias)
        yield from _layer(dense1, "blocks/mlp/dense1", block)
        yield from _layer(dense2, "blocks/mlp/dense2", block)
    if normalized:
        yield from _norm("linear_head.0", "norm")
    yield from _layer("linear_head.1" if normalized else "linear_head", "head")


def pytorch_layout(params: Any, patch_size: int) -> dict[str, Any]:
    """Lay parameters out as the reference does, because its Shampoo merges their dimensions.

    A nested dict becomes one by the names of the reference's state dict, with the same numbers.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    depth = flat["blocks/mlp/dense1/kernel"].shape[0]
    return {
        tensor.name: tensor.there(*tensor.arrays(flat))
        for tensor in tensors(flat, depth, patch_size)
        if tensor.paths[0] in flat  # constants are not parameters
    }
