"""Tracked eigenbases: many at once, on the few threads of a small machine."""

import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent("""
    import os
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    import jax, jax.numpy as jnp
    from simplest_vit.optimizers.shampoo.eigenbasis import refresh_basis
    from simplest_vit.optimizers.shampoo.options import SOAP

    stacks = [jax.random.normal(jax.random.key(n), (8, n, n)) for n in (128, 130, 132, 134)]
    refresh = jax.jit(lambda stacks, first: [refresh_basis(x @ x.mT, x, first, SOAP) for x in stacks])
    for _ in range(5):
        jax.block_until_ready(refresh(stacks, False))
""")


def test_bases_of_many_sizes_do_not_wait_for_each_other_for_ever():
    done = subprocess.run([sys.executable, "-c", PROGRAM], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
