"""Evaluates the best and the newest checkpoint of a run.

simplest-vit evaluate --workdir runs/mine

With --config, which must be the run's, where its data have moved.
"""

import json

from absl import flags

from simplest_vit import cli
from simplest_vit.programs import processes

flags.adopt_module_key_flags(processes)


def evaluate(arguments: list[str]) -> None:
    """Evaluate, and print the metrics."""
    del arguments
    import jax

    from simplest_vit.training import distributed, loop

    config = cli.CONFIG.value
    # JAX takes SIGTERM to have all processes stop after the same step: here there is none.
    jax.config.update("jax_enable_preemption_service", False)
    with processes.connected(config):
        outcome = loop.evaluate(str(cli.WORKDIR.value), config)
    if distributed.is_primary():
        print(json.dumps(outcome, indent=2))


def main() -> None:
    """Run as a program."""
    cli.run(evaluate, "simplest-vit evaluate --workdir FOLDER", required=("workdir",), optional=("config",))
