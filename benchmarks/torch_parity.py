"""Compare training losses with plain PyTorch's: same weights, same batches, the reference's settings.

    python -m benchmarks.torch_parity --config configs/cifar10.py:optimizer=adam --steps 100 \
        --config.data.dir=DIR --config.compute_dtype=float32 --config.model.attention=espa_reference \
        --config.model.init=reference

Prints every tenth loss of both and their largest difference so far. Training amplifies any rounding.
"""

import numpy as np
from absl import flags

from benchmarks import speed
from simplest_vit import cli
from simplest_vit.data import input_pipeline
from simplest_vit.training.run import build

_STEPS = flags.DEFINE_integer("steps", 100, "Number of steps.", lower_bound=1)
flags.adopt_module_key_flags(speed)


def _main() -> None:
    from tests.torch_training import losses_side_by_side

    record = speed.Recorder(speed.RECORD.value, one_row=True)
    config = cli.CONFIG.value
    config.steps = config.steps or _STEPS.value
    dataset = input_pipeline.load(config.data)
    ours, theirs = losses_side_by_side(build(config, dataset.info), dataset, _STEPS.value)
    apart = np.maximum.accumulate(np.abs(theirs - ours) / ours)
    print("step       ours    PyTorch   diff so far")
    for step in sorted({*range(9, len(ours), 10), len(ours) - 1}):
        print(f"{step + 1:4} {ours[step]:10.6f} {theirs[step]:10.6f} {apart[step]:13.1e}")
    record.add("relative difference", apart[-1])
    record.write()


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.torch_parity --config FILE", required=("config",))
