"""Train a model, or resume the run in --workdir.

    simplest-vit train --config cifar10:model=isometric_vit --workdir runs/mine
    simplest-vit train --workdir runs/mine

Without --config, the run in --workdir is resumed by its own config.
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
    from simplest_vit.config import from_settings
    from simplest_vit.training import distributed, train
    from simplest_vit.training.workdir import read_run

    workdir = str(cli.WORKDIR.value)
    config = cli.CONFIG.value if cli.CONFIG.present else from_settings(read_run(workdir)[1])
    with processes.connected(config):
        outcome = train.train(config, workdir)
    if distributed.is_primary():
        results = {name: value for name, value in outcome.items() if not isinstance(value, dict)}
        streams.print_saved(json.dumps(results, indent=2))


def main() -> None:
    """Run the command."""
    cli.run(train, "simplest-vit train --config RECIPE --workdir FOLDER", required=("workdir",), optional=("config",))
