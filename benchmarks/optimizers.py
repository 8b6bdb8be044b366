"""Measure what Shampoo and SOAP add to the time of a training step, as a ratio to Adam, in one run.

python -m benchmarks.optimizers --config configs/cifar10.py --config.compute_dtype=float32
python -m benchmarks.optimizers --config configs/imagenet.py
python -m benchmarks.optimizers --network=cnn

On a device that is fast enough, `--direct` times whole steps at the batch size of the config. Otherwise the step is
composed of parts measured in this run: the gradient at `--measured_batch_size`, times the ratio of the batch sizes (its
cost is proportional to them), plus the update, over whole periods of steps after the first. Parts alternate, so that a
slow minute of the machine affects all of them. On a CPU all times are CPU time, which other processes on the same
cores hardly change.

`--network` times whole steps of a small network on a batch of 128.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from benchmarks import fake_data, speed
from simplest_vit import cli
from simplest_vit.data.input_pipeline import Batch
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.shampoo import shampoo, shampoo_plan, soap
from simplest_vit.training.run import build
from simplest_vit.training.step import classification_sums

_MEASURED = flags.DEFINE_integer("measured_batch_size", 16, "Batch size of the measured gradient.", lower_bound=1)
_DIRECT = flags.DEFINE_bool("direct", False, "Time whole steps at the batch size of the config.")
_NETWORK = flags.DEFINE_enum("network", None, ["cnn", "mlp"], "Time a small network in place of a config.")
flags.adopt_module_key_flags(speed)

_USAGE = "python -m benchmarks.optimizers --config configs/cifar10.py"
FREQUENCY = 25
LEAST_STEPS, LEAST_STEPS_SMALL = 10, 100  # steps timed for each optimizer


def optimizers() -> dict[str, tuple[int, optax.GradientTransformation]]:
    """Name -> steps between two refreshes, and the transformation. Times are reported as ratios to the first."""
    stacked: dict[str, Any] = {"stack_axes": paths.stack_axes}
    often = {"precondition_frequency": FREQUENCY} | stacked
    return {
        "Adam": (1, optax.adam(1e-3)),
        f"Shampoo@{FREQUENCY}": (FREQUENCY, shampoo(1e-3, **often)),
        f"Shampoo@{FREQUENCY}, all at once": (FREQUENCY, shampoo(1e-3, stagger=False, **often)),
        "Shampoo@1": (1, shampoo(1e-3, precondition_frequency=1, **stacked)),
        "SOAP@10": (10, soap(1e-3, **stacked)),
        "SOAP@10, all at once": (10, soap(1e-3, stagger=False, **stacked)),
    }


class Times(NamedTuple):
    """Seconds of an optimizer's update.

    Attributes:
      compile: Time until the end of the first step.
      steps: Each step after the first period.
    """

    compile: float
    steps: np.ndarray


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call, until its work is done; on a CPU, of CPU time."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


class Run:
    """One optimizer, which updates its own copy of the parameters."""

    def __init__(
        self,
        frequency: int,
        tx: optax.GradientTransformation,
        params: Any,
        gradient_of: Callable[..., Any],
        least_steps: int = LEAST_STEPS,
    ) -> None:
        def update(params: Any, state: Any, data: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradient_of(params, data), state, params)
            return optax.apply_updates(params, updates), state

        self.frequency = frequency
        self.steps = frequency + math.ceil(least_steps / frequency) * frequency  # whole periods
        self.state = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        self.update = jax.jit(update, donate_argnums=(0, 1))
        self.seconds: list[float] = []

    @property
    def is_done(self) -> bool:
        """True if there are enough steps after the first period, in whole periods."""
        return len(self.seconds) >= self.steps

    def step(self, data: Any) -> None:
        """Take a step and record its time."""

        def call() -> Any:
            self.state = self.update(*self.state, data)
            return self.state

        self.seconds.append(timed(call))

    def times(self) -> Times:
        """Return the seconds of the first step and of those after the first period."""
        return Times(self.seconds[0], np.array(self.seconds[self.frequency :]))


def measure(runs: dict[str, Run], data: Any) -> dict[str, Times]:
    """Time every optimizer, one step of each in turn."""
    while waiting := [run for run in runs.values() if not run.is_done]:
        for run in waiting:
            run.step(data)
    return {name: run.times() for name, run in runs.items()}


def make_runs(params: Any, gradient_of: Callable[..., Any], **settings: Any) -> dict[str, Run]:
    """Make a run for each optimizer."""
    return {name: Run(frequency, tx, params, gradient_of, **settings) for name, (frequency, tx) in optimizers().items()}


def small_network(name: str) -> nnx.Sequential:
    """Build a small network for 10 classes: an MLP of 784-256-128-10, or a CNN for images of 8 x 8 pixels."""
    rngs, pool = nnx.Rngs(0), functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    convolutions = [
        *(nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.relu, pool),
        *(nnx.Conv(32, 64, (3, 3), rngs=rngs), nnx.relu, pool),
    ]
    sizes = (784, 256, 128, 10) if name == "mlp" else (256, 128, 10)
    layers = [] if name == "mlp" else convolutions
    layers.append(lambda x: x.reshape(len(x), -1))
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nnx.Linear(inputs, outputs, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers[:-1])


def measure_network(name: str) -> dict[str, Times]:
    """Print the plan of a small network and measure its steps."""
    graphdef, params = nnx.split(small_network(name))
    shape = (128, 28, 28, 1) if name == "mlp" else (128, 8, 8, 1)
    images, labels = jax.random.normal(jax.random.key(0), shape), jnp.arange(128) % 10

    def loss(params: Any, images: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    print(shampoo_plan(params))
    runs = make_runs(params, jax.grad(loss), least_steps=LEAST_STEPS_SMALL)
    return measure(runs, images)


def measure_config() -> tuple[dict[str, Times], float]:
    """Print the plan of the config's network; return the times of updates, and of the gradient that they leave out."""
    config = cli.CONFIG.value
    run = build(config, fake_data.info_of(config))
    state = run.create_state()
    size = config.batch_size if _DIRECT.value else _MEASURED.value
    batch = fake_data.batch(run.data, size)

    def loss(params: Any, batch: Batch) -> jax.Array:
        logits = nnx.merge(run.graphdef, params, state.constants)(batch["image"], dropout_key=jax.random.key(0))
        return classification_sums(logits, batch["label"], batch["weight"], config.label_smoothing)["loss"] / size

    gradient_of = jax.grad(loss)
    print(shampoo_plan(state.params, stack_axes=paths.stack_axes))
    if _DIRECT.value:
        return measure(make_runs(state.params, gradient_of), batch), 0.0
    compiled = jax.jit(gradient_of)
    gradient = jax.block_until_ready(compiled(state.params, batch))
    seconds = [timed(lambda: compiled(state.params, batch)) for _ in range(5)]
    times = measure(make_runs(state.params, lambda _, gradient: gradient), gradient)
    seconds += [timed(lambda: compiled(state.params, batch)) for _ in range(5)]
    model_s = float(np.median(seconds)) * config.batch_size / size
    print(
        f"gradient: {np.median(seconds):.3f} s at batch {size} ({min(seconds):.3f} .. {max(seconds):.3f}), "
        f"so {model_s:.2f} s at {config.batch_size}"
    )
    return times, model_s


def _main() -> None:
    """Print a table."""
    record = speed.Recorder(speed.RECORD.value)
    if _NETWORK.value:
        times, model_s = measure_network(_NETWORK.value), 0.0
    elif cli.CONFIG.present:
        times, model_s = measure_config()
    else:
        raise cli.missing("config", _USAGE)
    adam = model_s + np.median(times["Adam"].steps)
    print(f"{'update, seconds':26} compile    p50     p99 | step / Adam's: p50     p99    mean")
    for name, entry in times.items():
        ratios = [(model_s + statistic(entry.steps)) / adam for statistic in (np.median, _p99, np.mean)]
        print(
            f"{name:26} {entry.compile:7.2f} {np.median(entry.steps):7.4f} {_p99(entry.steps):7.4f} | "
            f"{ratios[0]:18.4f} {ratios[1]:7.4f} {ratios[2]:7.4f}"
        )
        record.add("p50", 1e3 * np.median(entry.steps), "ms", row=name)
        record.add("p99", 1e3 * _p99(entry.steps), "ms", row=name)
        for column, ratio in zip(("p50", "p99", "mean"), ratios, strict=True):
            record.add(f"{column} / Adam's p50", ratio, row=name)
    record.write()


def _p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


if __name__ == "__main__":
    speed.run(_main, usage=_USAGE, required=(), optional=("config",))
