"""Measure what checkpoints cost: the share of a run's time, and the time of a resume to its first step.

python -m benchmarks.checkpoint --config configs/digits.py --config.checkpoint_every=330
python -m benchmarks.checkpoint --config configs/cifar10.py --config.checkpoint_every=240 --steps 1

Steps run on fake data, so `config.checkpoint_every` has to be a number of steps. A save is timed while the loop waits
for it (`blocking`) and until it is on disk (`whole`); this overlaps the next steps. The share of a run is that of
`blocking` in that many steps. On a CPU the whole save competes with the steps, so the true cost is between the two.
"""

import pathlib
import statistics
import tempfile
import time

import jax
from absl import flags

from benchmarks import fake_data, speed
from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.state import RunProgress

_USAGE = "python -m benchmarks.checkpoint --config configs/digits.py --config.checkpoint_every=330"
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps.", lower_bound=1)
_SAVES = flags.DEFINE_integer("saves", 5, "Timed saves.", lower_bound=2)
flags.adopt_module_key_flags(speed)


def _main() -> None:
    config = cli.CONFIG.value
    record = speed.Recorder(speed.RECORD.value, one_row=True)
    if isinstance(config.checkpoint_every, str):
        raise UserError(
            f"config.checkpoint_every={config.checkpoint_every}: fake data have no epochs; give a number of steps"
        )
    run = build(config, fake_data.info_of(config), create_mesh())
    batch = fake_data.batch(run.data, config.batch_size)

    start = time.perf_counter()
    state = jax.block_until_ready(run.create_state())
    create_s = time.perf_counter() - start
    start = time.perf_counter()
    state, _ = jax.block_until_ready(run.train_step(state, batch))
    compile_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(_STEPS.value):
        state, _ = jax.block_until_ready(run.train_step(state, batch))
    step_s = (time.perf_counter() - start) / _STEPS.value

    blocking, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(pathlib.Path(folder), create=True) as checkpoints:
            for step in range(1, _SAVES.value + 1):
                start = time.perf_counter()
                checkpoints.save(state, RunProgress(), step)
                blocking.append(time.perf_counter() - start)
                checkpoints.wait()
                whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        with Checkpoints(pathlib.Path(folder), create=True) as checkpoints:
            jax.block_until_ready(checkpoints.restore(run.abstract, checkpoints.newest() or 0))
            restore_s = time.perf_counter() - start

    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    interval = config.checkpoint_every * step_s
    print(f"state {megabytes:.1f} MB, step {step_s:.4f} s, {config.checkpoint_every} steps {interval:.1f} s")
    for name, seconds in (("blocking", statistics.median(blocking)), ("whole", statistics.median(whole))):
        print(f"save, {name:8} {seconds:.3f} s: {seconds / (interval + seconds):.2%} of the run's time")
    fresh, resumed = create_s + compile_s, restore_s + compile_s
    print(f"state to first step: fresh {fresh:.2f} s, resumed {resumed:.2f} s, ratio {resumed / fresh:.2f}")
    blocked = statistics.median(blocking)
    record.add("a save blocks training", blocked, "s")
    record.add("of the run's time", 100 * blocked / (interval + blocked), "%")
    record.add("first step: resumed / fresh", resumed / fresh)
    record.write()


if __name__ == "__main__":
    speed.run(_main, usage=_USAGE, required=("config",))
