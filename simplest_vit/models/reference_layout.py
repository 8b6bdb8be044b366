"""The layout of the PyTorch reference: its tensors, as functions of the arrays of this project."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import traverse_util


def pytorch_layout(arrays: Any, patch_size: int) -> dict[str, Any]:
    """Arrange parameters, or parameters and constants, as the state dict of the reference, with the same numbers.

    Linear layers are [out, in] there and [in, out] here; the patch convolution is [out, in, row, column] there and
    [(row, column, in), out] here; queries, keys and values are one fused layer there; blocks are stacked here. Networks
    with norms have the names of the reference's SimpleViT.

    Args:
      arrays: Arrays of a model as nested dicts, or by path, such as `blocks/mlp/dense1/kernel`. The position embedding
        is not in a state dict.

    Returns:
      The tensors by their names in the state dict.
    """
    flat = traverse_util.flatten_dict(arrays, sep="/")
    tensors: dict[str, Any] = {}

    def add(name: str, *paths: str, block: int | None = None, change: Callable[..., Any] = lambda x: x) -> None:
        """Make a tensor of arrays, or of their slices for a block, unless the model lacks them."""
        if paths[0] in flat:
            tensors[name] = change(*(flat[path] if block is None else flat[path][block] for path in paths))

    def add_layer(name: str, path: str, block: int | None = None, change: Callable[[Any], Any] = lambda w: w.T) -> None:
        """Make the tensors of a linear layer or a norm."""
        add(f"{name}.weight", f"{path}/kernel", block=block, change=change)
        add(f"{name}.weight", f"{path}/scale", block=block)
        add(f"{name}.bias", f"{path}/bias", block=block)

    def convolution(kernel: Any) -> Any:
        return kernel.reshape(patch_size, patch_size, -1, kernel.shape[1]).transpose(3, 2, 0, 1)

    has_queries, has_norm = "blocks/attention/query/kernel" in flat, "norm/scale" in flat
    fused = [f"blocks/attention/{name}" for name in (("query", "key", "value") if has_queries else ("value",))]
    add_layer("to_patch_embedding", "patch_embedding", change=convolution)
    for block in range(len(flat["blocks/mlp/dense1/kernel"])):
        if has_norm:
            attention, mlp = f"transformer.layers.{block}.0", f"transformer.layers.{block}.1.ff"
            dense1, dense2 = f"{mlp}.1", f"{mlp}.3"
        else:
            attention, mlp = f"transformer.layers.{2 * block}", f"transformer.layers.{2 * block + 1}"
            dense1, dense2 = f"{mlp}.layer1.lin", f"{mlp}.layer2.lin"
        qkv = f"{attention}.to_qkv" if has_queries else f"{attention}.to_v"  # values alone are not in the reference
        add_layer(f"{attention}.norm", "blocks/attention/norm", block)
        add(f"{attention}.d", "blocks/attention/row_scale", block=block, change=lambda d: d.reshape(1, 1, -1, 1))
        add(f"{attention}.B", "blocks/attention/attention_bias", block=block, change=lambda b: b[None, None])
        kernels, biases = ([f"{path}/{kind}" for path in fused] for kind in ("kernel", "bias"))
        add(f"{qkv}.weight", *kernels, block=block, change=lambda *parts: jnp.concatenate([w.T for w in parts]))
        add(f"{qkv}.bias", *biases, block=block, change=lambda *parts: jnp.concatenate(parts))
        add_layer(f"{attention}.to_out", "blocks/attention/out", block)
        add_layer(f"{mlp}.0", "blocks/mlp/norm", block)
        add_layer(dense1, "blocks/mlp/dense1", block)
        add_layer(dense2, "blocks/mlp/dense2", block)
    add_layer("linear_head.0", "norm")
    add_layer("linear_head.1" if has_norm else "linear_head", "head")
    return tensors
