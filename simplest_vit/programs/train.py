"""Trains a model, or goes on with the run in --workdir.

simplest-vit train --config my_config.py --workdir runs/mine
"""

import json

from absl import flags

from simplest_vit import cli
from simplest_vit.programs import processes

flags.adopt_module_key_flags(processes)


def train(arguments: list[str]) -> None:
    """Train, and print what the run came to."""
    del arguments
    # Imported here, so that a mistyped flag is answered at once; likewise in the other programs.
    from simplest_vit.training import distributed, loop

    config = cli.CONFIG.value
    with processes.connected(config):
        outcome = loop.train_and_evaluate(config, str(cli.WORKDIR.value))
    if distributed.is_primary():
        print(json.dumps({name: value for name, value in outcome.items() if not isinstance(value, dict)}, indent=2))


def main() -> None:
    """Run as a program."""
    cli.run(train, "simplest-vit train --config FILE --workdir FOLDER")
