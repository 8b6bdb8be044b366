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
        compute = jax.shard_map(compute, in_specs=(images, whole, whole, whole), out_specs=images, check_vma=False)
    return compute(qkv, qkv_bias, attention_bias, row_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(
    qkv: jax.Array,
    qkv_bias: jax.Array | None,
    attention_bias: jax.Array | None,
    row_scale: jax.Array | None,
    num_heads: int,
    interpret: bool,
) -> jax.Array:
    """Compute `fused` on one device."""
    b, t, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    plan = _Plan(t, width // num_heads, width, qkv.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(attention_forward, plan=plan),
        grid=(b * num_heads,),  # heads of an image are neighbours, because they share cache lines
        out_shape=jax.ShapeDtypeStruct((b, t, width), qkv.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_forward",
    )(qkv, qkv_bias, attention_bias, row_scale)


def _forward(
    qkv: jax.Array, qkv_bias: Any, attention_bias: Any, row_scale: Any, num_heads: int, interpret: bool
) -> tuple[jax.Array, Any]:
    constants = (qkv_bias, attention_bias, row_scale)
    return _fused(qkv, *constants, num_heads, interpret), (qkv, constants)


def _backward(num_heads: int, interpret: bool, kept: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    qkv, (qkv_bias, attention_bias, row_scale) = kept
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
    )(qkv, qkv_bias, attention_bias, row_scale, gradient)
    return dqkv, None if qkv_bias is None else dbias.sum(axis=0).astype(qkv_bias.dtype), None, None


_fused.defvjp(_forward, _backward)


def attention_forward(qkv: Any, qkv_bias: Any, attention_bias: Any, row_scale: Any, out: Any, *, plan: _Plan) -> None:
    """Compute one head of one image, [T, d_head] of `out`: the forward kernel."""
    program = pl.program_id(0)
    heads = plan.width // plan.head_width
    image, head = program // heads, program % heads
    projection = functools.partial(_projection, qkv, qkv_bias, plan, image, head)
    keys, values = (_whole(plan, functools.partial(projection, index, 0, plan.keys)) for index in (1, 2))

    def attend(tile: Any, _: None) -> None:
        row = tile * plan.queries
        weights, total = _weights(projection(0, row, plan.queries), keys(), attention_bias, plan, head, row)
        mixed = _dot(weights.astype(qkv.dtype), values()) / total
        mixed = mixed * _row_scale(row_scale, plan, row) if row_scale is not None else mixed
        _store(out, mixed, plan, image, row, head * plan.head_width)

    _for_each_tile(plan, attend, None)


def attention_backward(
    qkv: Any, qkv_bias: Any, attention_bias: Any, row_scale: Any, gradient: Any, dqkv: Any, dbias: Any, *, plan: _Plan
) -> None:
    """Compute the gradients of one head of one image, or of a part of its columns: the backward kernel."""
    program = pl.program_id(0)
    part, program = program % plan.splits, program // plan.splits
    heads = plan.width // plan.head_width
    image, head = program // heads, program % heads
    columns = plan.columns // plan.splits
    first = part * columns
    projection = functools.partial(_projection, qkv, qkv_bias, plan, image, head)
    keys, values = (_whole(plan, functools.partial(projection, index, 0, plan.keys)) for index in (1, 2))
    some_keys = keys
    if plan.splits > 1:
        some_keys = _whole(plan, functools.partial(projection, 1, 0, plan.keys, first, columns))

    def part_of(x: jax.Array, load: Any) -> jax.Array:
        return x if plan.splits == 1 else load(first, columns)

    def attend(tile: Any, carry: Any) -> Any:
        dq_sum, dk, dv = carry
        row = tile * plan.queries
        scale = None if row_scale is None else _row_scale(row_scale, plan, row)

        def output_gradient(first: Any = 0, columns: int = plan.columns) -> jax.Array:
            g = _load(gradient, plan, image, row, plan.queries, head * plan.head_width, first, columns)
            return g if scale is None else (g * scale).astype(g.dtype)

        q, g = projection(0, row, plan.queries), output_gradient()
        weights, total = _weights(q, keys(), attention_bias, plan, head, row)
        weights = weights / total
        dweights = _dot(g, values(), transpose_b=True)
        mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
        dlogits = (weights * (dweights - mean) * plan.head_width**-0.5).astype(q.dtype)
        dq = _dot(dlogits, some_keys())
        _store(dqkv, dq, plan, image, row, head * plan.head_width, first)
        dk += _dot(dlogits, part_of(q, functools.partial(projection, 0, row, plan.queries)), transpose_a=True)
        dv += _dot(weights.astype(q.dtype), part_of(g, output_gradient), transpose_a=True)
        return dq_sum + dq.sum(axis=0), dk, dv

    zeros = jnp.zeros((plan.keys, columns), jnp.float32)
    dq_sum, dk, dv = _for_each_tile(plan, attend, (jnp.zeros(columns, jnp.float32), zeros, zeros))
    for index, x in ((1, dk), (2, dv)):
        _store(dqkv, x, plan, image, 0, index * plan.width + head * plan.head_width, first)
    if dbias is not None:
        column = first + jnp.arange(columns)
        for index, total in enumerate((dq_sum, dk.sum(axis=0), dv.sum(axis=0))):
            start = index * plan.width + head * plan.head_width + first
            mask = column < plan.head_width
            plgpu.store(dbias.at[image, pl.ds(start, columns)], total, mask=mask)


def _whole(plan: _Plan, load: Callable[[], jax.Array]) -> Callable[[], jax.Array]:
    """Return keys or values of a head: loaded once, or in float32, where both do not fit, at each use."""
    if plan.itemsize == 4:
        return load
    array = load()
    return lambda: array


def _for_each_tile(plan: _Plan, body: Any, carry: Any) -> Any:
    """Apply `body` to each tile of queries and the carry."""
    tiles = pl.cdiv(plan.tokens, plan.queries)
    return body(0, carry) if tiles == 1 else jax.lax.fori_loop(0, tiles, body, carry)


def _mask(plan: _Plan, row: Any, rows: int, first: Any, columns: int) -> jax.Array:
    """Return which entries of a tile exist, bool [rows, columns]."""
    return (row + jnp.arange(rows) < plan.tokens)[:, None] & (first + jnp.arange(columns) < plan.head_width)[None]


def _load(ref: Any, plan: _Plan, image: Any, row: Any, rows: int, start: Any, first: Any, columns: int) -> jax.Array:
    """Load rows of a head that begins at column `start`, from its column `first` on; zeros outside."""
    tile = ref.at[image, pl.ds(row, rows), pl.ds(start + first, columns)]
    return plgpu.load(tile, mask=_mask(plan, row, rows, first, columns), other=0.0)


def _store(ref: Any, x: jax.Array, plan: _Plan, image: Any, row: Any, start: Any, first: Any = 0) -> None:
    """Store the tile that `_load` loads."""
    tile = ref.at[image, pl.ds(row, x.shape[0]), pl.ds(start + first, x.shape[1])]
    plgpu.store(tile, x.astype(ref.dtype), mask=_mask(plan, row, x.shape[0], first, x.shape[1]))


def _projection(
    qkv: Any,
    qkv_bias: Any,
    plan: _Plan,
    image: Any,
    head: Any,
    index: int,
    row: Any,
    rows: int,
    first: Any = 0,
    columns: int | None = None,
) -> jax.Array:
    """Load queries (index 0), keys (1) or values (2) of a head with their bias, [rows, columns]."""
    columns = columns or plan.columns
    start = index * plan.width + head * plan.head_width
    x = _load(qkv, plan, image, row, rows, start, first, columns)
    if qkv_bias is None:
        return x
    mask = first + jnp.arange(columns) < plan.head_width
    bias = plgpu.load(qkv_bias.at[pl.ds(start + first, columns)], mask=mask, other=0.0)
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)[None]).astype(x.dtype)


def _row_scale(row_scale: Any, plan: _Plan, row: Any) -> jax.Array:
    """Load the scale of the rows of a tile, float32 [queries, 1]."""
    mask = row + jnp.arange(plan.queries) < plan.tokens
    return plgpu.load(row_scale.at[pl.ds(row, plan.queries)], mask=mask, other=0.0)[:, None]


def _weights(
    q: jax.Array, k: jax.Array, attention_bias: Any, plan: _Plan, head: Any, row: Any
) -> tuple[jax.Array, jax.Array]:
    """Compute weights before normalization, float32 [queries, keys], and their sums [queries, 1]."""
    logits = _dot(q, k, transpose_b=True) * plan.head_width**-0.5
    exists = (jnp.arange(plan.keys) < plan.tokens)[None]
    if attention_bias is not None:
        of_head = () if len(attention_bias.shape) == 2 else (head,)
        mask = (row + jnp.arange(plan.queries) < plan.tokens)[:, None] & exists
        tile = attention_bias.at[*of_head, pl.ds(row, plan.queries), pl.ds(0, plan.keys)]
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
