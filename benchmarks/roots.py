"""Measure the CPU time of an inverse fourth root and of a new basis by method, to choose what `auto` takes on a CPU.

    OPENBLAS_NUM_THREADS=1 taskset -c 0 python -m benchmarks.roots

Prints milliseconds of CPU time, which other processes hardly change, for one n x n matrix of a stack of 16: the median
of ten calls, in which the methods alternate.
"""

import functools
import time

import jax
import numpy as np
from absl import flags

from benchmarks import speed
from simplest_vit.optimizers.shampoo.roots import inverse_pth_root, refresh_basis

flags.adopt_module_key_flags(speed)

SIZES = (8, 16, 32, 64, 128, 256)
STACK, CALLS, EPS = 16, 10, 1e-5  # the damping of `shampoo`
METHODS = {
    "`eigh`": lambda matrices: inverse_pth_root(matrices, 4, eps=EPS, root="eigh"),
    "`newton` (p = 4)": lambda matrices: inverse_pth_root(matrices, 4, eps=EPS, root="newton"),
    "`qr`": lambda matrices: refresh_basis(matrices, matrices, "qr"),
    "`gram_schmidt`": lambda matrices: refresh_basis(matrices, matrices, "gram_schmidt"),
}


def milliseconds(size: int) -> dict[str, float]:
    """Time each method on statistics of `size` random gradients."""
    gradients = jax.random.normal(jax.random.key(0), (STACK, size, size))
    calls = {name: functools.partial(jax.jit(method), gradients @ gradients.mT) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + CALLS):  # the first call compiles
        for name, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call())
            times[name].append(time.process_time() - start)
    return {name: 1e3 * float(np.median(seconds[1:])) / STACK for name, seconds in times.items()}


def _main() -> None:
    record = speed.Recorder(speed.RECORD.value)
    found = {size: milliseconds(size) for size in SIZES}
    for name in METHODS:
        print(f"{name:18}", *(f"{found[size][name]:8.3f}" for size in SIZES))
        for size in SIZES:
            record.add(str(size), float(f"{found[size][name]:.2g}"), row=name)
    record.write()


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.roots", required=())
