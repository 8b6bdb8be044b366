"""Evaluate the best and the latest checkpoint of a run.

simplest-vit evaluate --workdir runs/mine

The config is the run's own; give --config only where its data have moved.
"""

import json

from absl import flags

from simplest_vit import cli
from simplest_vit.commands import processes

flags.adopt_module_key_flags(processes)


def evaluate(arguments: list[str]) -> None:
    """Evaluate, and print the metrics."""
    del arguments
    import jax

    from simplest_vit.training import distributed, evaluate

    config = cli.CONFIG.value
    # JAX would take SIGTERM so that all processes stop after the same step, and an evaluation has no steps.
    jax.config.update("jax_enable_preemption_service", False)
    with processes.connected(config):
        outcome = evaluate.evaluate(str(cli.WORKDIR.value), config)
    if distributed.is_primary():
        print(json.dumps(outcome, indent=2))


def main() -> None:
    """Run the command."""
    cli.run(evaluate, "simplest-vit evaluate --workdir FOLDER", required=("workdir",), optional=("config",))
