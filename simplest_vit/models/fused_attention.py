"""Attention as one kernel forward and one backward, for NVIDIA GPUs from Ampere on (Pallas, compiled by Triton).

`attention.attend` is the definition, which XLA computes in five passes over [B, H, T, T]. Here a program computes one
head of one image. It reads the projections in place, [B, T, 3 D], adds their biases, and goes over tiles of queries
with all keys together: rows of the softmax are whole, and no weight leaves the chip. The backward kernel recomputes the
weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from simplest_vit.errors import UserError

TOKENS = (16, 256)
HEAD_WIDTHS = (16, 128)
FASTER_TOKENS = 64  # up to this number it was faster than XLA's (benchmarks/README.md); with 196 it was slower
_TILE = 8192  # logits in a tile: 64 KB of registers for the two float32 tiles of the backward pass
_ACCUMULATED = 16384  # entries of the gradient of the keys, and as many of the values: 128 KB of registers


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
    """Return `xla` or `fused`: `kernel`, or if that is `auto`, the faster one on the devices of a run."""
    if kernel != "auto":
        return kernel
    fits = TOKENS[0] <= tokens <= FASTER_TOKENS and HEAD_WIDTHS[0] <= head_width <= HEAD_WIDTHS[1]
    return "fused" if fits and all(map(_is_recent, devices)) else "xla"


def _is_recent(device: jax.Device) -> bool:
    """Return whether a device is an NVIDIA GPU from Ampere on; AMD's capabilities are names such as gfx942."""
    capability = str(getattr(device, "compute_capability", "")).replace(".", "", 1)
    return device.platform == "gpu" and capability.isdigit() and int(capability) >= 80


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of one head's work. The properties are powers of two, which Triton needs."""

    tokens: int  # T
    head_width: int  # D / H
    width: int  # D
    itemsize: int  # bytes of a number

    @property
    def keys(self) -> int:  # T, padded
        return max(16, pl.next_power_of_2(self.tokens))

    @property
    def columns(self) -> int:  # of the head, padded
        return max(16, pl.next_power_of_2(self.head_width))

    @property
    def queries(self) -> int:  # in a tile
        return min(self.keys, 64, _TILE // self.keys)

    # Programs that share the columns of a head's gradients, which need too many registers for one program.
    @property
    def splits(self) -> int:
        return max(1, self.keys * self.columns // _ACCUMULATED)


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
    plan = _Plan(t, width // num_heads, width, qkv.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(attention_forward, plan=plan),
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
    b, t, width = gradient.shape
    plan = _Plan(t, width // num_heads, width, qkv.dtype.itemsize)
    of_bias = None if qkv_bias is None else jax.ShapeDtypeStruct((b, 3 * width), jnp.float32)
    dqkv, dbias = pl.pallas_call(
        functools.partial(attention_backward, plan=plan),
        grid=(b * num_heads * plan.splits,),
        out_shape=(jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), of_bias),
        compiler_params=plgpu.CompilerParams(num_warps=4 if plan.keys <= 64 else 8, num_stages=1),
        interpret=interpret,
        name="attention_backward",
    )(*inputs, gradient)
    return ((dqkv, None if qkv_bias is None else dbias.sum(axis=0).astype(qkv_bias.dtype), None, None),)


_fused.defvjp(_forward, _backward)


def attention_forward(*refs: Any, plan: _Plan) -> None:
    """Compute one head of one image, [T, d_head] of the last reference: the forward kernel."""
    *inputs, out = refs
    head = _Head(plan, pl.program_id(0), *inputs)

    def attend(row: Any, _: None) -> None:
        weights, total = head.weights(head.projection(0, row, plan.queries), row)
        mixed = _dot(weights.astype(out.dtype), head.values()) / total
        head.store(out, mixed if head.row_scale is None else mixed * head.scale(row), row)

    _for_each_tile(plan, attend, None)


def attention_backward(*refs: Any, plan: _Plan) -> None:
    """Compute the gradients of one head of one image, or of a part of its columns: the backward kernel."""
    *inputs, gradient, dqkv, dbias = refs
    program = pl.program_id(0)
    part, program = program % plan.splits, program // plan.splits
    head = _Head(plan, program, *inputs)
    columns = plan.columns // plan.splits
    first = part * columns
    some_keys = head.keys if plan.splits == 1 else head.keep(1, first, columns)

    def part_of(x: jax.Array, load: Any) -> jax.Array:
        return x if plan.splits == 1 else load(first, columns)

    def attend(row: Any, carry: Any) -> Any:
        dq_sum, dk, dv = carry
        scale = None if head.row_scale is None else head.scale(row)

        def output_gradient(first: Any = 0, columns: int | None = None) -> jax.Array:
            g = head.load(gradient, row, plan.queries, 0, first, columns)
            return g if scale is None else (g * scale).astype(g.dtype)

        q, g = head.projection(0, row, plan.queries), output_gradient()
        weights, total = head.weights(q, row)
        weights = weights / total
        dweights = _dot(g, head.values(), transpose_b=True)
        mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
        dlogits = (weights * (dweights - mean) * plan.head_width**-0.5).astype(q.dtype)
        dq = _dot(dlogits, some_keys())
        head.store(dqkv, dq, row, 0, first)
        dk += _dot(dlogits, part_of(q, functools.partial(head.projection, 0, row, plan.queries)), transpose_a=True)
        dv += _dot(weights.astype(q.dtype), part_of(g, output_gradient), transpose_a=True)
        return dq_sum + dq.sum(axis=0), dk, dv

    zeros = jnp.zeros((plan.keys, columns), jnp.float32)
    dq_sum, dk, dv = _for_each_tile(plan, attend, (jnp.zeros(columns, jnp.float32), zeros, zeros))
    for index, x in ((1, dk), (2, dv)):
        head.store(dqkv, x, 0, index, first)
    if dbias is not None:
        mask = first + jnp.arange(columns) < plan.head_width
        for index, total in enumerate((dq_sum, dk.sum(axis=0), dv.sum(axis=0))):
            plgpu.store(dbias.at[head.image, pl.ds(head.start(index) + first, columns)], total, mask=mask)


def _for_each_tile(plan: _Plan, body: Any, carry: Any) -> Any:
    """Apply `body` to the first row of each tile of queries and the carry."""
    tiles = pl.cdiv(plan.tokens, plan.queries)
    if tiles == 1:
        return body(0, carry)
    return jax.lax.fori_loop(0, tiles, lambda tile, carry: body(tile * plan.queries, carry), carry)


class _Head:
    """One head of one image: what a program loads and stores, as tiles [rows, columns] with zeros outside the head."""

    def __init__(self, plan: _Plan, program: Any, qkv: Any, qkv_bias: Any, attention_bias: Any, row_scale: Any) -> None:
        heads = plan.width // plan.head_width
        self.plan, self.image, self.head = plan, program // heads, program % heads
        self.qkv, self.qkv_bias, self.attention_bias, self.row_scale = qkv, qkv_bias, attention_bias, row_scale
        self.keys, self.values = self.keep(1), self.keep(2)

    def keep(self, index: int, first: Any = 0, columns: int | None = None) -> Callable[[], jax.Array]:
        """Return keys or values as functions: loaded once, or in float32, where both do not fit, at each use."""
        load = functools.partial(self.projection, index, 0, self.plan.keys, first, columns)
        if self.plan.itemsize == 4:
            return load
        array = load()
        return lambda: array

    def start(self, index: int) -> Any:
        """Return the first column of queries (index 0), keys (1) or values (2); 0 also for an array of one of them."""
        return index * self.plan.width + self.head * self.plan.head_width

    def tile(self, ref: Any, row: Any, rows: int, index: int, first: Any, columns: int) -> tuple[Any, jax.Array]:
        """Return a tile from a row and column of the head on, and which of its entries exist, bool [rows, columns]."""
        rows_exist = (row + jnp.arange(rows) < self.plan.tokens)[:, None]
        mask = rows_exist & (first + jnp.arange(columns) < self.plan.head_width)[None]
        return ref.at[self.image, pl.ds(row, rows), pl.ds(self.start(index) + first, columns)], mask

    def load(
        self, ref: Any, row: Any, rows: int, index: int = 0, first: Any = 0, columns: int | None = None
    ) -> jax.Array:
        """Load a tile; by default of all columns."""
        tile, mask = self.tile(ref, row, rows, index, first, columns or self.plan.columns)
        return plgpu.load(tile, mask=mask, other=0.0)

    def store(self, ref: Any, x: jax.Array, row: Any, index: int = 0, first: Any = 0) -> None:
        """Store a tile."""
        tile, mask = self.tile(ref, row, x.shape[0], index, first, x.shape[1])
        plgpu.store(tile, x.astype(ref.dtype), mask=mask)

    def projection(self, index: int, row: Any, rows: int, first: Any = 0, columns: int | None = None) -> jax.Array:
        """Load a tile of queries, keys or values, with their bias."""
        x = self.load(self.qkv, row, rows, index, first, columns)
        if self.qkv_bias is None:
            return x
        columns = x.shape[1]
        mask = first + jnp.arange(columns) < self.plan.head_width
        bias = plgpu.load(self.qkv_bias.at[pl.ds(self.start(index) + first, columns)], mask=mask, other=0.0)
        return (x.astype(jnp.float32) + bias.astype(jnp.float32)[None]).astype(x.dtype)

    def scale(self, row: Any) -> jax.Array:
        """Load the row scale of a tile of queries, float32 [queries, 1]."""
        mask = row + jnp.arange(self.plan.queries) < self.plan.tokens
        return plgpu.load(self.row_scale.at[pl.ds(row, self.plan.queries)], mask=mask, other=0.0)[:, None]

    def weights(self, q: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        """Compute weights before normalization, float32 [queries, keys], and their sums [queries, 1]."""
        plan = self.plan
        logits = _dot(q, self.keys(), transpose_b=True) * plan.head_width**-0.5
        exists = (jnp.arange(plan.keys) < plan.tokens)[None]
        if self.attention_bias is not None:
            of_head = () if len(self.attention_bias.shape) == 2 else (self.head,)
            mask = (row + jnp.arange(plan.queries) < plan.tokens)[:, None] & exists
            tile = self.attention_bias.at[*of_head, pl.ds(row, plan.queries), pl.ds(0, plan.keys)]
            logits += plgpu.load(tile, mask=mask, other=0.0)
        if plan.keys != plan.tokens:
            logits = jnp.where(exists, logits, -jnp.inf)
        weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
        return weights, jnp.sum(weights, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    """Multiply two tiles with sums in float32; float32 operands are not rounded to TF32."""
    dimensions = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6 if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32)
