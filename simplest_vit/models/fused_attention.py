"""Attention as one kernel forward and one backward, for NVIDIA GPUs from Ampere on (Pallas, compiled by Triton).

`attention.attend` is the definition, which XLA computes in five passes over [B, H, T, T]. Here a program computes one
head of one image. It reads the projections in place, [B, T, 3 D], adds their biases, and takes all queries and all keys
together: rows of the softmax are whole, and no weight leaves the chip. The backward kernel recomputes the weights.

That takes few tokens. A version that went over tiles of queries was slower than XLA for 196 tokens (results/speed.csv).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from simplest_vit.errors import UserError

TOKENS = (16, 64)
HEAD_WIDTHS = (16, 128)


def check_sizes(tokens: int, head_width: int) -> None:
    """Raise a UserError if the kernel does not support T tokens or heads of this width."""
    for name, size, (low, high) in (("number of tokens", tokens, TOKENS), ("head width", head_width, HEAD_WIDTHS)):
        if not low <= size <= high:
            raise UserError(
                f"config.model.attention_kernel='fused' needs a {name} from {low} to {high}, not {size}; "
                "choose xla or another model"
            )


def check_devices(kernel: str, devices: Sequence[jax.Device]) -> None:
    """Raise a UserError if a kernel (see `choose`) cannot run on the devices of a run."""
    for device in devices:
        if kernel == "fused" and not _is_recent(device):
            capability = getattr(device, "compute_capability", None)
            raise UserError(
                f"config.model.attention_kernel='fused' needs NVIDIA GPUs of compute capability 8.0 (Ampere) or more, "
                f"not {device.device_kind}{f' with {capability}' if capability else ''}; choose xla"
            )


def choose(kernel: str, devices: Sequence[jax.Device], tokens: int, head_width: int) -> str:
    """Return `xla` or `fused`: `kernel`, or if that is `auto`, `fused` where it can run, which was always faster."""
    if kernel != "auto":
        return kernel
    fits = TOKENS[0] <= tokens <= TOKENS[1] and HEAD_WIDTHS[0] <= head_width <= HEAD_WIDTHS[1]
    return "fused" if fits and all(map(_is_recent, devices)) else "xla"


def _is_recent(device: jax.Device) -> bool:
    """Return whether a device is an NVIDIA GPU from Ampere on; AMD's capabilities are names such as gfx942."""
    capability = str(getattr(device, "compute_capability", "")).replace(".", "", 1)
    return device.platform == "gpu" and capability.isdigit() and int(capability) >= 80


def fused(
    qkv: jax.Array,
    qkv_bias: jax.Array | None,
    num_heads: int,
    attention_bias: jax.Array | None = None,
    row_scale: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute multi-head attention row_scale * softmax(q k^T / sqrt(d_head) + attention_bias) v.

    Products are in the dtype of `qkv`, true float32 included, sums and softmax in float32. Each device of the mesh in
    context computes its own images; XLA cannot partition a kernel.

    Args:
      qkv: Queries, keys and values before their biases, bfloat16 or float32 [B, T, 3 D], T in `TOKENS`.
      qkv_bias: Their biases [3 D], or None. The kernel sums its gradient over tokens.
      num_heads: H, a divisor of D, D / H in `HEAD_WIDTHS`.
      attention_bias: Constant float32 [T, T], the same for all heads, or [H, T, T], or None. It gets no gradient.
      row_scale: Constant float32 [T], or None. It gets no gradient.
      interpret: Emulate the kernel without a GPU, slowly.

    Returns:
      [B, T, D] in the dtype of `qkv`.
    """
    compute = functools.partial(_fused, num_heads=num_heads, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        images, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        # Not checked, because a kernel does not say along which axes its output varies.
        compute = jax.shard_map(compute, in_specs=((images, *[whole] * 3),), out_specs=images, check_vma=False)
    return compute((qkv, qkv_bias, attention_bias, row_scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fused(inputs: tuple[Any, ...], num_heads: int, interpret: bool) -> jax.Array:
    """Compute `fused` on one device, for (qkv, qkv_bias, attention_bias, row_scale)."""
    qkv = inputs[0]
    b, t, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return pl.pallas_call(
        functools.partial(attention_forward, num_heads=num_heads),
        grid=(b * num_heads,),  # heads of an image are neighbours, because they share cache lines
        out_shape=jax.ShapeDtypeStruct((b, t, width), qkv.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_forward",
    )(*inputs)


def _forward(inputs: tuple[Any, ...], num_heads: int, interpret: bool) -> tuple[jax.Array, tuple[Any, ...]]:
    return _fused(inputs, num_heads, interpret), inputs


def _backward(num_heads: int, interpret: bool, inputs: tuple[Any, ...], gradient: jax.Array) -> tuple[Any]:
    qkv, qkv_bias, *_ = inputs
    b = len(qkv)
    of_bias = None if qkv_bias is None else jax.ShapeDtypeStruct((b, qkv.shape[2]), jnp.float32)
    dqkv, dbias = pl.pallas_call(
        functools.partial(attention_backward, num_heads=num_heads),
        grid=(b * num_heads,),
        out_shape=(jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), of_bias),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_backward",
    )(*inputs, gradient)
    return ((dqkv, None if qkv_bias is None else dbias.sum(axis=0).astype(qkv_bias.dtype), None, None),)


_fused.defvjp(_forward, _backward)


def attention_forward(*refs: Any, num_heads: int) -> None:
    """Compute one head of one image, [T, d_head] of the last reference: the forward kernel."""
    *inputs, out = refs
    head = _Head(num_heads, *inputs)
    weights, total = head.weights(head.projection(0))
    mixed = _dot(weights.astype(out.dtype), head.values()) / total
    head.store(out, mixed if head.row_scale is None else mixed * head.scale())


def attention_backward(*refs: Any, num_heads: int) -> None:
    """Compute the gradients of one head of one image: the backward kernel."""
    *inputs, gradient, dqkv, dbias = refs
    head = _Head(num_heads, *inputs)
    scale = None if head.row_scale is None else head.scale()
    q, g = head.projection(0), head.load(gradient)
    if scale is not None:
        g = (g * scale).astype(g.dtype)
    weights, total = head.weights(q)
    weights = weights / total
    dweights = _dot(g, head.values(), transpose_b=True)
    mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
    dlogits = (weights * (dweights - mean) * head.head_width**-0.5).astype(q.dtype)
    dq = _dot(dlogits, head.keys())
    head.store(dqkv, dq)
    dk = _dot(dlogits, q, transpose_a=True)
    dv = _dot(weights.astype(q.dtype), g, transpose_a=True)
    for index, x in ((1, dk), (2, dv)):
        head.store(dqkv, x, index)
    if dbias is not None:
        for index, x in enumerate((dq, dk, dv)):
            plgpu.store(dbias.at[head.image, head.columns(index)], x.sum(axis=0), mask=head.has_column)


class _Head:
    """One head of one image: what a program loads and stores, as tiles [rows, columns] with zeros outside the head."""

    def __init__(self, num_heads: int, qkv: Any, qkv_bias: Any, attention_bias: Any, row_scale: Any) -> None:
        program = pl.program_id(0)
        self.image, self.head = program // num_heads, program % num_heads
        self.qkv, self.qkv_bias, self.attention_bias, self.row_scale = qkv, qkv_bias, attention_bias, row_scale
        self.tokens, self.width = qkv.shape[1], qkv.shape[2] // 3
        self.head_width = self.width // num_heads
        # Triton needs powers of two, its products at least 16.
        self.rows, self.width_padded = (max(16, pl.next_power_of_2(n)) for n in (self.tokens, self.head_width))
        self.has_row = jnp.arange(self.rows) < self.tokens
        self.has_column = jnp.arange(self.width_padded) < self.head_width
        self.keys, self.values = self.keep(1), self.keep(2)

    def keep(self, index: int) -> Callable[[], jax.Array]:
        """Return keys or values as functions: loaded once, or in float32, where both do not fit, at each use."""
        load = functools.partial(self.projection, index)
        if self.qkv.dtype == jnp.float32:
            return load
        array = load()
        return lambda: array

    def columns(self, index: int) -> Any:
        """Return the columns of queries (index 0), keys (1) or values (2); 0 also for an array of one of them."""
        return pl.ds(index * self.width + self.head * self.head_width, self.width_padded)

    def tile(self, ref: Any, index: int) -> tuple[Any, jax.Array]:
        """Return the tile of the head, and which of its entries exist, bool [rows, columns]."""
        tile = ref.at[self.image, pl.ds(0, self.rows), self.columns(index)]
        return tile, self.has_row[:, None] & self.has_column[None]

    def load(self, ref: Any, index: int = 0) -> jax.Array:
        """Load a tile."""
        tile, mask = self.tile(ref, index)
        return plgpu.load(tile, mask=mask, other=0.0)

    def store(self, ref: Any, x: jax.Array, index: int = 0) -> None:
        """Store a tile."""
        tile, mask = self.tile(ref, index)
        plgpu.store(tile, x.astype(ref.dtype), mask=mask)

    def projection(self, index: int) -> jax.Array:
        """Load a tile of queries, keys or values, with their bias."""
        x = self.load(self.qkv, index)
        if self.qkv_bias is None:
            return x
        bias = plgpu.load(self.qkv_bias.at[self.columns(index)], mask=self.has_column, other=0.0)
        return (x.astype(jnp.float32) + bias.astype(jnp.float32)[None]).astype(x.dtype)

    def scale(self) -> jax.Array:
        """Load the row scale, float32 [rows, 1]."""
        return plgpu.load(self.row_scale.at[pl.ds(0, self.rows)], mask=self.has_row, other=0.0)[:, None]

    def weights(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute weights before normalization, float32 [rows, rows], and their sums [rows, 1]."""
        logits = _dot(q, self.keys(), transpose_b=True) * self.head_width**-0.5
        if self.attention_bias is not None:
            of_head = () if len(self.attention_bias.shape) == 2 else (self.head,)
            tile = self.attention_bias.at[*of_head, pl.ds(0, self.rows), pl.ds(0, self.rows)]
            logits += plgpu.load(tile, mask=self.has_row[:, None] & self.has_row[None], other=0.0)
        if self.rows != self.tokens:
            logits = jnp.where(self.has_row[None], logits, -jnp.inf)
        weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        return weights, jnp.sum(weights, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    """Multiply two tiles with sums in float32; float32 operands are not rounded to TF32."""
    dimensions = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)
