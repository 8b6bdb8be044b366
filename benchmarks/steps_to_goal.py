"""Compare the steps that SOAP, the published SOAP, Adam, Muon and Shampoo need to reach a loss.

    taskset -c 0 python -m benchmarks.steps_to_goal

Three small problems on scikit-learn's digits, three seeds, each optimizer at the best of three learning rates. Prints a
Markdown table with the mean number of steps for each problem and goal, in about ten minutes on one core.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from absl import flags
from sklearn.datasets import load_digits

from benchmarks import speed
from simplest_vit.optimizers.shampoo import scale_by_shampoo, scale_by_soap

flags.adopt_module_key_flags(speed)

STEPS, BATCH, SEEDS = 300, 256, (0, 1, 2)
FREQUENCY = 10
IMAGES, LABELS = load_digits(return_X_y=True)


class PublishedSoap(NamedTuple):
    """The state of `scale_by_published_soap`, by leaf: moments, statistics and bases."""

    count: jax.Array
    mu: Any
    nu: Any
    statistics: Any
    bases: Any


def scale_by_published_soap(b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """SOAP in the order of its authors' code (github.com/nikhilvyas/SOAP, soap.py), for vectors and matrices.

    The first gradient only determines the first basis. Then each step projects, averages both moments, projects
    back, and adds the gradient to the statistics. Every k-th step sorts the basis by its eigenvalues, the second
    moment with it, and refreshes it by a power iteration and QR.
    """

    def init(params: Any) -> PublishedSoap:
        eyes = jax.tree.map(lambda p: tuple(jnp.eye(n) for n in p.shape) if p.ndim > 1 else (), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return PublishedSoap(jnp.zeros((), jnp.int32), zeros, zeros, jax.tree.map(jnp.zeros_like, eyes), eyes)

    def leaf(t: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, gg: Any, q: Any) -> Any:
        project = lambda x: q[0].T @ x @ q[1] if q else x  # noqa: E731
        back = lambda x, q: q[0] @ x @ q[1].T if q else x  # noqa: E731
        projected = project(g)
        m, v = b1 * m + (1 - b1) * projected, b2 * v + (1 - b2) * projected**2
        update = back(m / (jnp.sqrt(v) + eps), q) * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        if not q:
            return update, m, v, gg, q
        gg = tuple(b2 * s + (1 - b2) * x for s, x in zip(gg, (g @ g.T, g.T @ g), strict=True))

        def refresh(_: None) -> Any:
            order = [jnp.argsort(-jnp.diag(b.T @ s @ b)) for s, b in zip(gg, q, strict=True)]
            momentum = back(m, q)
            new = tuple(jnp.linalg.qr(s @ b[:, i])[0] for s, b, i in zip(gg, q, order, strict=True))
            return new[0].T @ momentum @ new[1], v[order[0]][:, order[1]], new

        m, v, q = jax.lax.cond(t % FREQUENCY == 0, refresh, lambda _: (m, v, q), None)
        return update, m, v, gg, q

    def first(g: jax.Array, m: jax.Array, v: jax.Array, gg: Any, q: Any) -> Any:
        if not q:
            return jnp.zeros_like(g), m, v, gg, q
        gg = tuple((1 - b2) * x for x in (g @ g.T, g.T @ g))
        return jnp.zeros_like(g), m, v, gg, tuple(jnp.linalg.eigh(s)[1][:, ::-1] for s in gg)

    def update(updates: Any, state: PublishedSoap, params: Any = None) -> Any:
        leaves, tree = jax.tree.flatten(updates)
        parts = [tree.flatten_up_to(part) for part in state[1:]]
        t = jnp.maximum(state.count, 1)
        new = [
            jax.lax.cond(state.count == 0, first, lambda *x: leaf(t.astype(jnp.float32), *x), *row)
            for row in zip(leaves, *parts, strict=True)
        ]
        updates, *parts = (tree.unflatten(column) for column in zip(*new, strict=True))
        return updates, PublishedSoap(state.count + 1, *parts)

    return optax.GradientTransformation(init, update)


# Name -> the transformation of gradients without the learning rate, and the rates to try.
SETTINGS = {"precondition_frequency": FREQUENCY, "max_preconditioner_dim": 128}
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, tuple[float, ...]]] = {
    "Adam": (optax.scale_by_adam(), (3e-3, 1e-2, 3e-2)),
    "Muon": (optax.contrib.muon(-1.0, adam_learning_rate=-0.5), (1e-2, 3e-2, 1e-1)),
    f"Shampoo@{FREQUENCY}": (scale_by_shampoo(**SETTINGS), (3e-3, 1e-2, 3e-2)),
    f"SOAP@{FREQUENCY}, published": (scale_by_published_soap(), (3e-3, 1e-2, 3e-2)),
    f"SOAP@{FREQUENCY}": (scale_by_soap(**SETTINGS), (3e-3, 1e-2, 3e-2)),
}


class Problem(NamedTuple):
    """A problem.

    Attributes:
      sizes: Sizes of the layers of a perceptron.
      activation: Activation of the hidden layers.
      loss: Function of the outputs and a batch of images and labels.
      goals: Losses of all examples to reach.
    """

    sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    goals: tuple[float, ...]


def cross_entropy(outputs: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of logits."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))


def reconstruction(outputs: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean squared error of reconstructed images."""
    return jnp.mean(jnp.square(outputs - images))


PROBLEMS = {
    "classifier 64-64-64-10, ReLU": Problem((64, 64, 64, 10), jax.nn.relu, cross_entropy, (0.1, 0.01)),
    "deep classifier, 8 layers of 32, tanh": Problem((64, *(32,) * 8, 10), jnp.tanh, cross_entropy, (0.1, 0.01)),
    "autoencoder 64-48-16-48-64, tanh": Problem((64, 48, 16, 48, 64), jnp.tanh, reconstruction, (0.015, 0.01)),
}


def make_run(problem: Problem, scale: optax.GradientTransformation) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a compiled function of seed and learning rate: the loss of all examples after each step [STEPS]."""
    images, labels = jnp.asarray(IMAGES / 16, jnp.float32), jnp.asarray(LABELS)

    def loss(params: Any, rows: jax.Array | slice) -> jax.Array:
        x = images[rows]
        for index, layer in enumerate(params):
            x = x @ layer["kernel"] + layer["bias"][None]
            x = problem.activation(x) if index < len(params) - 1 else x
        return problem.loss(x, images[rows], labels[rows])

    @jax.jit
    def run(seed: jax.Array, rate: jax.Array) -> jax.Array:
        gain = 2.0 if problem.activation is jax.nn.relu else 1.0
        *keys, key = jax.random.split(jax.random.key(seed), len(problem.sizes))
        params = [
            {"kernel": jax.random.normal(k, (m, n)) * (gain / m) ** 0.5, "bias": jnp.zeros(n)}
            for k, m, n in zip(keys, problem.sizes, problem.sizes[1:], strict=False)
        ]

        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            updates, state = scale.update(jax.grad(loss)(params, rows), state, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, state), loss(params, slice(None))

        batches = jax.random.randint(key, (STEPS, BATCH), 0, len(labels))
        return jax.lax.scan(step, (params, scale.init(params)), batches)[1]

    return run


def steps_to(curve: np.ndarray, goal: float) -> int:
    """Count the steps until a loss is below a goal; one more than `STEPS` if it never is."""
    return int(np.argmax(curve < goal)) + 1 if np.any(curve < goal) else len(curve) + 1


def _main() -> None:
    record = speed.Recorder(speed.RECORD.value)
    start = time.perf_counter()
    print(f"| problem, loss | {' | '.join(OPTIMIZERS)} |\n|{'---|' * (len(OPTIMIZERS) + 1)}")
    for name, problem in PROBLEMS.items():
        cells: dict[float, list[str]] = {goal: [] for goal in problem.goals}
        for optimizer, (scale, rates) in OPTIMIZERS.items():
            run = make_run(problem, scale)
            curves = {rate: [np.asarray(run(seed, rate)) for seed in SEEDS] for rate in rates}
            for goal, row in cells.items():
                means = {rate: np.mean([steps_to(curve, goal) for curve in curves[rate]]) for rate in rates}
                best = min(means, key=lambda rate: means[rate])
                reached = all(np.any(curve < goal) for curve in curves[best])
                steps, rate = (f"{means[best]:.0f}", f"{best:g}") if reached else (f"> {STEPS}", "")
                row.append(f"{steps} ({rate})" if rate else steps)
                record.add(optimizer, steps, row=f"{name}, {goal}", note=rate)
        for goal, row in cells.items():
            print(f"| {name}, {goal} | {' | '.join(row)} |", flush=True)
    record.write()
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.steps_to_goal", required=())
