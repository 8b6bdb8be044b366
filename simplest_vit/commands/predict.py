"""Classify images with the best checkpoint of a run.

simplest-vit predict --workdir runs/mine --images photo.jpg folder/ --csv predictions.csv
"""

import json

from absl import flags

from simplest_vit import cli
from simplest_vit.files import local_path


def main() -> None:
    """Run the command."""
    images = cli.define_paths("images", "Image files and folders, separated by spaces.")
    as_json = flags.DEFINE_bool("json", False, "Print JSON lines instead of text.")
    table = cli.define_path(
        "csv", None, "CSV file for the most probable class of each image: file, class, probability."
    )

    def predict(arguments: list[str]) -> None:
        from simplest_vit import predict

        paths = [*images.value, *map(local_path, arguments)]
        for prediction in predict.predict(str(cli.WORKDIR.value), paths, table.value):
            print(json.dumps(prediction) if as_json.value else predict.as_text(prediction), flush=True)

    usage = "simplest-vit predict --workdir FOLDER --images FILE..."
    cli.run(predict, usage, required=("workdir",), positional=True)
