"""Prepare a data set ahead of time, from the original files to TFDS's array_record files, without TensorFlow.

    simplest-vit prepare cifar10
    simplest-vit prepare imagenet --data_dir=/data/tfds --manual_dir=/data/tars
    simplest-vit prepare image_folder --manual_dir=/photos --skip_corrupt

A prepared data set is either complete or absent. Prints its splits, classes and checksums.
"""

from absl import flags

from simplest_vit import cli
from simplest_vit.errors import UserError


def main() -> None:
    """Run the command."""
    data_dir = cli.define_path("data_dir", None, "Folder of TFDS data sets (default: ~/tensorflow_datasets).")
    manual_dir = cli.define_path("manual_dir", None, "Folder with the original files; if absent, they are downloaded.")
    skip_corrupt = flags.DEFINE_bool("skip_corrupt", False, "Skip damaged images instead of failing.")
    usage = "simplest-vit prepare NAME"

    def prepare(arguments: list[str]) -> None:
        from simplest_vit.data.builders import BUILDERS
        from simplest_vit.data.prepare import describe, prepare

        if len(arguments) != 1:
            raise UserError(f"{len(arguments)} data sets given, expected one of {', '.join(BUILDERS)}; usage: {usage}")
        with cli.naming({"data.name": "NAME", "data.dir": "--data_dir", "data.manual_dir": "--manual_dir"}):
            prepared = prepare(arguments[0], data_dir.value, manual_dir.value, skip_corrupt=skip_corrupt.value)
        print(describe(prepared))

    cli.run(prepare, usage, required=(), positional=True)
