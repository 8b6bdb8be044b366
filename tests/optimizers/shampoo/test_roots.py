"""Both roots against float64, over spectra and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.optimizers.shampoo.options import LEAST_EPS
from simplest_vit.optimizers.shampoo.roots import backward_error, inverse_pth_root, newton_coefficients
from simplest_vit.optimizers.shampoo.shampoo import MOST_ERROR

EPS = 1e-5
SPECTRA = {
    **{f"1e{k}": (lambda n, k=k: np.logspace(0, -k, n)) for k in (0, 2, 4, 6, 8, 12)},
    "rank n/10": lambda n: (np.arange(n) <= n // 10).astype(float),
    "rank 1": lambda n: (np.arange(n) == 0).astype(float),
    "tiny": lambda n: 1e-20 * np.logspace(0, -3, n),
    "huge": lambda n: 1e15 * np.logspace(0, -3, n),
}


def stack_of(n, seed=0):
    """One matrix for each spectrum."""
    rng = np.random.default_rng(seed)
    matrices = []
    for spectrum in SPECTRA.values():
        q, _ = np.linalg.qr(rng.normal(size=(n, n)))
        matrices.append((q * spectrum(n)) @ q.T)
    stack = np.stack(matrices).astype(np.float32)
    return (stack + stack.transpose(0, 2, 1)) / 2


def direction_error(root, matrix, p, epsilon, rng):
    """For gradients drawn from N(0, A), against the root of the same damped matrix in float64."""
    matrix = matrix.astype(np.float64)
    values, q = np.linalg.eigh(matrix + epsilon * np.linalg.norm(matrix) * np.eye(len(matrix)))
    exact = (q * values ** (-1 / p)) @ q.T
    gradients = q @ (np.sqrt(values)[:, None] * rng.normal(size=(len(values), 64)))
    difference = (np.asarray(root, np.float64) - exact) @ gradients
    return np.linalg.norm(difference) / np.linalg.norm(exact @ gradients)


def check(method, n, p):
    rng, stack = np.random.default_rng(1), stack_of(n)
    roots, errors = jax.jit(lambda stack: inverse_pth_root(stack, p, eps=EPS, root=method))(jnp.asarray(stack))
    assert np.all(np.isfinite(roots))
    for name, matrix, root, error in zip(SPECTRA, stack, roots, errors, strict=True):
        direction = direction_error(root, matrix, p, EPS, rng)
        # LAPACK's float32 eigenvalues are off by a few rounding errors of the largest one.
        limit = 1e-2 if method == "eigh" and p < 4 else 1e-3
        assert direction < limit, (name, direction)
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("method", ["newton", "eigh"])
@pytest.mark.parametrize(("n", "p"), [(1, 4), (2, 4), (48, 2), (48, 3), (48, 4), (48, 6), (160, 4)])
def test_direction_is_accurate(method, n, p):
    check(method, n, p)


@pytest.mark.slow
@pytest.mark.parametrize("n", [384, 768, 1536])
def test_direction_is_accurate_for_large_matrices(n):
    check("newton", n, 4)


@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_root_of_zero_is_identity(method):
    root, error = inverse_pth_root(jnp.zeros((2, 5, 5)), 4, eps=EPS, root=method)
    np.testing.assert_allclose(root, np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-5)
    assert np.all(error < 1e-4)


@pytest.mark.parametrize(("n", "p"), [(48, 2), (48, 4)])
def test_newton_roots_are_symmetric(n, p):
    """To the last bit: applied on two sides, an asymmetry would turn directions."""
    root, _ = inverse_pth_root(jnp.asarray(stack_of(n)), p, eps=EPS, root="newton")
    np.testing.assert_array_equal(root, root.mT)


@pytest.mark.parametrize("method", ["newton", "eigh"])
def test_the_least_damping_makes_good_roots(method):
    """Of statistics of rank 1 too, where the forward residual was above its limit by rounding alone."""
    stack = jnp.concatenate([jnp.asarray(stack_of(48)), jnp.ones((1, 48, 48))])
    root, error = inverse_pth_root(stack, 4, eps=LEAST_EPS["float32"], root=method)
    assert np.all(np.isfinite(root))
    assert np.all(error < MOST_ERROR / 2), error


def test_absolute_eps_follows_the_formula_at_zero():
    root, _ = inverse_pth_root(jnp.zeros((1, 3, 3)), 4, eps=1e-12, relative_eps=False)
    np.testing.assert_allclose(root[0], 1e3 * np.eye(3), rtol=1e-5)


def test_eigh_shifts_a_negative_eigenvalue():
    matrix = jnp.diag(jnp.array([-0.5, 1.0]))[None]
    root, _ = inverse_pth_root(matrix, 2, eps=0.25, relative_eps=False)
    np.testing.assert_allclose(np.diag(root[0]), [0.25**-0.5, 1.75**-0.5], rtol=1e-6)


def test_an_absolute_eps_is_not_lost_in_the_shift():
    """Eigenvalues of -100 and 1e4: in one sum, 100 + 1e-12 would be 100 and the smallest 0, whose root is infinite."""
    root, error = inverse_pth_root(jnp.diag(jnp.array([-100.0, 1e4]))[None], 4, eps=1e-12, relative_eps=False)
    np.testing.assert_allclose(np.diag(root[0]), [1e3, 10100**-0.25], rtol=1e-5)
    assert error[0] == 0


def test_the_backward_error_is_that_of_the_matrix():
    matrix = jnp.diag(jnp.array([16.0, 81.0]))[None]
    exact = jnp.diag(jnp.array([1 / 2, 1 / 3]))[None]
    assert backward_error(exact, matrix, 4)[0] < 1e-6
    np.testing.assert_allclose(backward_error(2 * exact, matrix, 4)[0], 15, rtol=1e-6)
    off = jnp.diag(jnp.array([1 / 2, 81.81**-0.25]))[None]  # the root of a matrix 0.81 away
    np.testing.assert_allclose(backward_error(off, matrix, 4)[0], 0.81 / np.hypot(16, 81), rtol=2e-2)


@pytest.mark.parametrize("p", [2, 4])
def test_a_root_that_is_wrong_has_an_error_above_the_limit(p):
    damped = jnp.asarray(stack_of(48)[2:3]) + EPS * jnp.eye(48)[None]
    values, vectors = np.linalg.eigh(np.float64(damped[0]))
    for wrong in (slice(-1, None), slice(0, 40)):  # the largest eigenvalue by 5 %; most of the damped ones by 2 x
        factors = np.ones(48)
        factors[wrong] = 1.05 if wrong.start == -1 else 8.0
        root = (vectors * factors * values ** (-1 / p)) @ vectors.T
        assert backward_error(jnp.asarray(root[None], jnp.float32), damped, p)[0] > MOST_ERROR


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_coefficients_take_the_whole_interval_to_one(p):
    """The scalar iteration, in float64, on a fine grid of eigenvalues."""
    eigenvalues = np.logspace(-5, 0, 1000)
    for a, b in newton_coefficients(p, 1e-5):
        eigenvalues = eigenvalues * (a - b * eigenvalues) ** p
        assert eigenvalues.max() < 1 + 1e-6
    np.testing.assert_allclose(eigenvalues, 1, atol=1e-4)


def test_a_scheduled_epsilon_takes_the_same_root():
    """One that falls below what float32 can resolve, 1e-6, counts as that."""
    stack = jnp.asarray(stack_of(48))

    def root(stack, epsilon):  # an argument: XLA's folding of constants makes NaN of the tiny one's norm
        return inverse_pth_root(stack, 4, eps=epsilon, root="newton")[0]

    for epsilon, least in ((1e-3, 1e-3), (1e-5, 1e-5), (1e-9, 1e-6)):
        scheduled, fixed = np.float64(jax.jit(root)(stack, epsilon)), np.float64(root(stack, least))
        error = np.linalg.norm(scheduled - fixed, axis=(1, 2)) / np.linalg.norm(fixed, axis=(1, 2))
        assert np.all(error < 2e-3)
