"""Tracked eigenbases, by LAPACK and by matrix products alone, against float64."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.optimizers.shampoo import soap
from simplest_vit.optimizers.shampoo.roots import gram_schmidt, refresh_basis
from tests.fork_server import xla_flags

SPECTRA = {
    "flat": lambda n: 1 + np.arange(n)[::-1] / n,
    "1e3": lambda n: np.logspace(0, -3, n),
    "1e6": lambda n: np.logspace(0, -6, n),
    "power": lambda n: 1 / np.arange(1.0, n + 1) ** 1.5,
    "rank n/4": lambda n: (np.arange(n) <= n // 4) * np.logspace(0, -2, n),
}


def matrices(n):
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in SPECTRA]
    return np.stack([(q * spectrum(n)) @ q.T for q, spectrum in zip(bases, SPECTRA.values(), strict=True)])


@pytest.mark.parametrize("n", [1, 5, 32, 45, 96])
def test_gram_schmidt_is_the_q_of_qr(n):
    x = np.random.default_rng(0).normal(size=(3, n, n))
    q, r = np.linalg.qr(x)
    q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    np.testing.assert_allclose(gram_schmidt(jnp.asarray(x, jnp.float32)), q, atol=2e-3)


@pytest.mark.parametrize("basis", ["qr", "gram_schmidt", "eigh"])
@pytest.mark.parametrize("n", [6, 70])
def test_refreshes_lead_to_an_eigenbasis(basis, n):
    """From the identity; what is left off the diagonal is less than a third after five of them, and falls on."""
    stack = jnp.asarray(matrices(n), jnp.float32)
    q = jnp.broadcast_to(jnp.eye(n), stack.shape)
    refresh = jax.jit(lambda q: refresh_basis(stack, q, basis))
    left = []
    for _ in range(20):
        q, error = refresh(q)
        assert np.all(error < 1e-4)
        rotated = np.asarray(q.mT @ stack @ q, np.float64)
        diagonal = rotated * np.eye(n)
        left.append(np.linalg.norm(rotated - diagonal, axis=(1, 2)) / np.linalg.norm(rotated, axis=(1, 2)))
    assert np.all(left[4] < 1 / 3), left[4]
    assert np.all(left[-1] < np.maximum(left[4] / 2, 1e-5)), (left[4], left[-1])


@pytest.mark.parametrize("basis", ["qr", "gram_schmidt", "eigh"])
def test_a_zero_matrix_keeps_its_basis(basis):
    """But for signs."""
    q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(1, 6, 6)))[0], jnp.float32)
    new, error = refresh_basis(jnp.zeros((1, 6, 6)), q, basis)
    np.testing.assert_allclose(np.abs(new.mT @ q), np.eye(6)[None], atol=1e-6)
    assert error[0] < 1e-6


PROGRAM = textwrap.dedent("""
    import os
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    import jax
    from simplest_vit.optimizers.shampoo.roots import qr

    stacks = [jax.random.normal(jax.random.key(n), (8, n, n)) for n in (64, 66, 68, 130, 132, 134)]
    for decompose, parts in ((qr, stacks), (jax.vmap(qr), [x.reshape(2, 4, *x.shape[1:]) for x in stacks])):
        run = jax.jit(lambda parts: [decompose(x) for x in parts])
        for _ in range(6):
            jax.block_until_ready([run(parts), run(parts)])
""")


def test_decompositions_of_many_sizes_do_not_wait_for_each_other_for_ever():
    """Two programs in flight in a pool of two threads, where batched QR decompositions hang at once; and under vmap."""
    env = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}  # more would widen the pool
    done = subprocess.run([sys.executable, "-c", PROGRAM], timeout=120, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("eps", "is_noise"), [(1e-8, True), (1e-6, False)])
def test_a_larger_eps_keeps_rounding_errors_out_of_directions_without_a_gradient(eps, is_noise):
    """The step (64, 32) for gradients of rank 4: exactly, it lies in their span."""
    rng = np.random.default_rng(0)
    span, _ = np.linalg.qr(rng.normal(size=(64, 4)))
    gradients = jnp.asarray(0.2 * span @ rng.normal(size=(10, 4, 32)), jnp.float32)  # entries near 0.05
    tx = soap(1.0, eps=eps)
    update = jax.jit(tx.update)
    state = tx.init(gradients[0])
    for gradient in gradients:
        step, state = update(gradient, state)
    outside = np.linalg.norm(step - span @ (span.T @ step)) / np.linalg.norm(step)
    assert outside > 0.5 if is_noise else outside < 0.2
