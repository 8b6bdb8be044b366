"""Measure the cost of each block size over model widths, to choose `max_preconditioner_dim`.

    python -m benchmarks.block_size

Prints, for twelve layers of one kernel (width, width): GFLOP per step of the plan (statistics, preconditioning, and the
matrix products of the roots that are due: 36 of size n for each), as a fraction of the kernels' gradient at 4,096
tokens (two products); this fraction for all six kernels of a transformer (four square ones and an MLP of 4 x width);
MiB of statistics and preconditioners; and, for widths up to `--most`, milliseconds per update, the median of five, also
as a fraction of the gradient's. `--record` keeps the range of the transformer's fractions over the widths.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import speed
from simplest_vit.optimizers.shampoo import shampoo, shampoo_plan

_MOST = flags.DEFINE_integer("most", 384, "The largest width that is timed.")
flags.adopt_module_key_flags(speed)

LAYERS = 12
WIDTHS = (192, 384, 768, 1024, 2048, 4096)
BLOCKS = (128, 256, 384, 512, 1024, 2048)
TOKENS = 4096
PRODUCTS_PER_ROOT = 36  # in the iteration of matrix products (docs/shampoo.md)


def milliseconds(function, *arguments) -> float:
    """Time a compiled function of its arguments: the median of five calls."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[1:]))


def flops(shapes: list[tuple[int, int]], block: int) -> int:
    """Count a step's operations for kernels (LAYERS, m, n): the plan's, and the roots that are due."""
    params = [jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32) for shape in shapes]
    plan = shampoo_plan(params, max_preconditioner_dim=block, stack_axes=1)
    return plan.step_flops + 2 * PRODUCTS_PER_ROOT * plan.step_cubes


def _main() -> None:
    """Print a line for each width and block size."""
    record = speed.Recorder(speed.RECORD.value, device="computed")
    fractions: dict[int, list[float]] = {block: [] for block in BLOCKS}
    print(
        "| width | blocks | GFLOP a step | of the gradient's | of a transformer's | MiB | ms | of the gradient's |\n|"
        + "---|" * 8
    )
    for width in WIDTHS:
        params = {"kernel": jax.ShapeDtypeStruct((LAYERS, width, width), jnp.float32)}
        gradient_flops = 4 * TOKENS * LAYERS * width**2
        if width <= _MOST.value:
            grads = {"kernel": jax.random.normal(jax.random.key(0), (LAYERS, width, width))}
            x = jnp.ones((TOKENS, width))
            gradient_ms = LAYERS * milliseconds(jax.jit(lambda x, k: (x @ k.T, x.T @ (x + 1))), x, grads["kernel"][0])
        for block in BLOCKS:
            if block > width and (width in BLOCKS or block > min(b for b in BLOCKS if b > width)):
                continue
            plan = shampoo_plan(params, max_preconditioner_dim=block, stack_axes=1)
            count = flops([(width, width)], block)
            mlp = [(width, 4 * width), (4 * width, width)]
            transformer = flops([(width, width)] * 4 + mlp, block) / (12 * gradient_flops)
            if block <= width:
                fractions[block].append(100 * transformer)
            line = f"| {width} | {min(block, width)} | {count / 1e9:.3g} | {count / gradient_flops:.1%} "
            line += f"| {transformer:.1%} | {plan.stack_bytes / 2**20:.1f} "
            if width <= _MOST.value:
                tx = shampoo(1e-3, max_preconditioner_dim=block, stack_axes=1)
                ms = milliseconds(jax.jit(tx.update), grads, tx.init(grads))
                line += f"| {ms:.1f} | {ms / gradient_ms:.1%} |"
            else:
                line += "| | |"
            print(line, flush=True)
    for block, found in fractions.items():
        record.add("of a transformer's gradient", "", "%", row=f"blocks of {block}", spread=(min(found), max(found)))
    record.write()


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.block_size", required=())
