"""Train a model, or resume the run in --workdir.

simplest-vit train --config my_config.py --workdir runs/mine
"""

import json

from absl import flags

from simplest_vit import cli, streams
from simplest_vit.commands import processes

flags.adopt_module_key_flags(processes)


def train(arguments: list[str]) -> None:
    """Train, and print the results."""
    del arguments
    # Imported here so that a mistyped flag is reported immediately; the other commands do the same.
    from simplest_vit.training import distributed, train

    config = cli.CONFIG.value
    with processes.connected(config):
        outcome = train.train(config, str(cli.WORKDIR.value))
    if distributed.is_primary():
        results = {name: value for name, value in outcome.items() if not isinstance(value, dict)}
        streams.print_saved(json.dumps(results, indent=2))


def main() -> None:
    """Run the command."""
    cli.run(train, "simplest-vit train --config FILE --workdir FOLDER")
