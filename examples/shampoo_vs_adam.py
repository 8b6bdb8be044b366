"""Adam, Muon, Shampoo and SOAP on scikit-learn's digits, drawn as loss over steps; takes one to three minutes.

    pip install . matplotlib scikit-learn
    python examples/shampoo_vs_adam.py digits.png

A multilayer perceptron in plain JAX. Each optimizer has the best of three learning rates, by the mean loss of its last
steps over three seeds.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optax.contrib
from sklearn.datasets import load_digits

from simplest_vit.optimizers.shampoo import shampoo, soap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZES = (64, 64, 64, 10)
STEPS, BATCH, SEEDS, WINDOW = 150, 128, 3, 10
GOAL = 0.05

# Name -> the optimizer of a learning rate, and the rates to try.
OPTIMIZERS = {
    "Adam": (optax.adam, (3e-2, 1e-2, 3e-3)),
    "Muon": (lambda rate: optax.contrib.muon(rate, adam_learning_rate=1e-2), (3e-2, 1e-2, 3e-3)),
    "Shampoo": (lambda rate: shampoo(rate, precondition_frequency=5), (3e-2, 1e-2, 3e-3)),
    "SOAP": (lambda rate: soap(rate, precondition_frequency=5), (3e-2, 1e-2, 3e-3)),
}


def init(key):
    """Make the layers of a multilayer perceptron."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"kernel": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for key, m, n in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def cross_entropy(params, images, labels):
    """Compute the mean loss of a batch."""
    hidden = images
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
    logits = hidden @ params[-1]["kernel"] + params[-1]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train(tx, images, labels):
    """Train from each seed; return the loss of each step [SEEDS, STEPS]."""

    @jax.jit
    def step(params, state, index):
        loss, grads = jax.value_and_grad(cross_entropy)(params, images[index], labels[index])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for seed in range(SEEDS):
        params_key, batch_key = jax.random.split(jax.random.key(seed))
        params = init(params_key)
        state = tx.init(params)
        for index in jax.random.randint(batch_key, (STEPS, BATCH), 0, len(labels)):
            params, state, loss = step(params, state, index)
            losses.append(loss)
    return np.reshape(losses, (SEEDS, STEPS))


def smooth(losses):
    """Average the last axis over a window of steps."""
    return np.apply_along_axis(np.convolve, -1, losses, np.ones(WINDOW) / WINDOW, "valid")


def main(path):
    """Train all, print a table and draw the losses."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(labels)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, seeds 0 to {SEEDS - 1}")
    print(f"optimizer  rate   last loss  steps to {GOAL}  seconds a run")
    for name, (make, rates) in OPTIMIZERS.items():
        start = time.perf_counter()
        runs = {rate: train(make(rate), images, labels) for rate in rates}
        seconds = (time.perf_counter() - start) / (len(rates) * SEEDS)
        best = min(rates, key=lambda rate: np.nan_to_num(runs[rate][:, -WINDOW:].mean(), nan=np.inf))
        curves = smooth(runs[best])
        steps = [int(np.argmax(curve <= GOAL)) + WINDOW if np.any(curve <= GOAL) else "-" for curve in curves]
        reached = ", ".join(map(str, steps))
        print(f"{name:9}  {best:<5}  {curves[:, -1].mean():.5f}    {reached:13}  {seconds:.1f}", flush=True)
        x = np.arange(WINDOW, STEPS + 1)
        (line,) = axes.semilogy(x, np.exp(np.log(curves).mean(0)), label=f"{name}, {best}")
        axes.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps", title="Digits, MLP 64-64-64-10")
    axes.legend(title="best of three learning rates")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 2 or pathlib.Path(sys.argv[1]).suffix != ".png":
        sys.exit("usage: python examples/shampoo_vs_adam.py PICTURE.png")
    main(sys.argv[1])
