"""Train a model, or resume the run in --workdir.

    simplest-vit train --config cifar10:model=isometric_vit --workdir runs/mine
    simplest-vit train --config cifar10:model=isometric_vit --config.epochs=10 --print_config
    simplest-vit train --workdir runs/mine

--config.FIELD=VALUE sets any field of the config; simplest_vit/config.py lists them. Without --config, the run in
--workdir is resumed with its own config and with fields that may change, such as --config.data.dir.
"""

import json

from absl import flags

from simplest_vit import cli, streams
from simplest_vit.commands import processes

flags.adopt_module_key_flags(processes)


def main() -> None:
    """Run the command."""
    printed = flags.DEFINE_bool("print_config", False, "Print the config as JSON instead of training.")
    usage = "simplest-vit train --config RECIPE --workdir FOLDER"

    def train() -> None:
        # Imported here so that a mistyped flag is reported immediately; the other commands do the same.
        from simplest_vit.primary import is_primary
        from simplest_vit.training import train
        from simplest_vit.training.workdir import read_run

        workdir = cli.WORKDIR.value
        if not workdir and not (printed.value and cli.CONFIG.present):
            raise cli.missing("workdir", usage)
        config = cli.CONFIG.value if cli.CONFIG.present else read_run(workdir)[1]
        if printed.value:
            print(json.dumps(config.to_dict(), indent=2, sort_keys=True))
            return
        with processes.connected(config):
            outcome = train.train(config, workdir, given=cli.given_fields())
        if is_primary():
            results = {name: value for name, value in outcome.items() if not isinstance(value, dict)}
            streams.print_saved(json.dumps(results, indent=2))

    cli.run(train, usage, required=(), optional=("config", "workdir"))
