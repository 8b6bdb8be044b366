"""Compare the fused attention kernel with XLA's on the available GPU: errors against float64, and time.

python -m benchmarks.attention_kernel

Errors are those of the output and of the worst gradient. XLA computes products of float32 in TF32 on a GPU, as in
training; the kernel in true float32. Time is forward and backward together. The exit code is 1 if the kernel is not
accurate enough.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import speed
from simplest_vit.models import attention, fused_attention
from tests.models import attention_oracle as oracle

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 2048, "Images to time.", lower_bound=1)
_INTERPRET = flags.DEFINE_bool("interpret", False, "Emulate the GPU, to try the program without one.")
flags.adopt_module_key_flags(speed)

# Tokens, heads and head width: S/4 at 32 pixels, a size that does not fill its tile, and the widest heads.
SIZES = {"S/4": (64, 6, 64), "odd": (49, 3, 24), "wide": (64, 2, 128)}
FLOAT32_ERROR = 2e-6
ROUNDS = 5


def forms(num_heads: int, bias: Any, scale: Any, interpret: bool) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """Build each form: (query, key, value, gradient of the output) -> output and three gradients."""

    def by_kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        qkv = jnp.concatenate([query, key, value], axis=-1)
        return fused_attention.fused(qkv, None, num_heads, bias, scale, interpret=interpret)

    def by_xla(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention.attend(query, key, value, num_heads, bias, scale)

    def both(form: Callable[..., jax.Array], *arrays: jax.Array) -> tuple[jax.Array, ...]:
        output, pullback = jax.vjp(form, *arrays[:3])
        return output, *pullback(arrays[3])

    return {name: jax.jit(functools.partial(both, form)) for name, form in (("xla", by_xla), ("fused", by_kernel))}


def errors(size: tuple[int, int, int], dtype: Any, interpret: bool) -> dict[str, tuple[float, float]]:
    """Return the relative error of the output and of the worst gradient, for each form."""
    tokens, num_heads, head_width = size
    arrays, bias, scale = oracle.inputs(0, 4, tokens, num_heads, head_width, bias=num_heads, scaled=True)
    rounded = [jnp.asarray(x, dtype) for x in arrays]
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in rounded]
    output, gradients = oracle.attention(*exact[:3], num_heads, bias, scale, exact[3])
    result = {}
    for name, form in forms(num_heads, jnp.asarray(bias), jnp.asarray(scale), interpret).items():
        first, *rest = (
            oracle.relative_error(np.asarray(ours.astype(jnp.float32)), theirs)
            for ours, theirs in zip(form(*rounded), (output, *gradients), strict=True)
        )
        result[name] = first, max(rest)
    return result


def milliseconds(size: tuple[int, int, int], batch_size: int, dtype: Any, interpret: bool) -> dict[str, float]:
    """Time forward and backward of each form: the median over rounds that alternate."""
    tokens, num_heads, head_width = size
    shape = batch_size, tokens, num_heads * head_width
    arrays = [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]
    bias, scale = jax.random.normal(jax.random.key(1), (tokens, tokens)), jnp.ones(tokens)
    compiled = forms(num_heads, bias, scale, interpret)
    for form in compiled.values():
        jax.block_until_ready(form(*arrays))
    repeats = 1 if interpret else 10
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(ROUNDS):
        for name, form in compiled.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = form(*arrays)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def _main() -> None:
    record = speed.Recorder(speed.RECORD.value)
    good = True
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(f"{'':14} {'error of the output, gradients: xla':>36} {'fused':>20}  {'xla, ms':>9} {'fused, ms':>9}")
    for (name, size), dtype in ((item, dtype) for item in SIZES.items() for dtype in (jnp.bfloat16, jnp.float32)):
        error = errors(size, dtype, _INTERPRET.value)
        cells = [f"{output:.1e}, {gradient:.1e}" for output, gradient in (error["xla"], error["fused"])]
        line = f"{name:5} {dtype.__name__:8} {cells[0]:>36} {cells[1]:>20}"
        allowed = FLOAT32_ERROR if dtype == jnp.float32 else 1.5 * max(error["xla"])
        good &= max(error["fused"]) <= allowed
        if name == "S/4":
            row = f"{size[0]} tokens, {dtype.__name__}"
            ms = milliseconds(size, _BATCH_SIZE.value, dtype, _INTERPRET.value)
            line += f"  {ms['xla']:9.3f} {ms['fused']:9.3f}"
            record.add("XLA", ms["xla"], "ms", row=row)
            record.add("fused", ms["fused"], "ms", row=row)
            record.add("XLA, error", max(error["xla"]), row=row)
            record.add("fused, error", max(error["fused"]), row=row)
        print(line, flush=True)
    record.write()
    print("fused: accurate" if good else "fused: NOT accurate enough")
    sys.exit(not good)


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.attention_kernel", required=())
