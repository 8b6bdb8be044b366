"""The training losses of this project beside plain PyTorch's: same weights, same batches, the reference's settings.

    python -m benchmarks.beside_torch --config configs/cifar10.py:optimizer=adam --steps 100 \
        --config.data.dir=DIR --config.compute_dtype=float32 --config.model.attention=espa_reference \
        --config.model.init=reference

Prints every tenth pair of losses, and the greatest relative difference of all.
"""

import numpy as np
from absl import flags

from simplest_vit import cli
from simplest_vit.data import pipeline
from simplest_vit.training.run import build

_STEPS = flags.DEFINE_integer("steps", 100, "Steps of both.", lower_bound=1)


def _main(arguments: list[str]) -> None:
    del arguments
    from tests.torch_training import losses_of_both

    config = cli.CONFIG.value
    config.steps = config.steps or _STEPS.value
    dataset = pipeline.load(config.data)
    ours, theirs = map(np.array, losses_of_both(build(config, dataset.info), dataset, _STEPS.value))
    for step in range(0, len(ours), 10):
        print(f"step {step + 1:4}  {ours[step]:.6f}  {theirs[step]:.6f}")
    difference = np.abs(ours - theirs) / theirs
    print(f"step {len(ours):4}  {ours[-1]:.6f}  {theirs[-1]:.6f}")
    worst = difference.argmax()
    print(f"greatest relative difference over {len(ours)} steps: {difference[worst]:.2e}, at step {worst + 1}")


if __name__ == "__main__":
    cli.run(_main, usage="python -m benchmarks.beside_torch --config FILE", required=("config",))
