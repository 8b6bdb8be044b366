"""Classify images with the best checkpoint of a run.

simplest-vit predict --workdir runs/mine --images photo.jpg folder/
"""

import json

from absl import flags

from simplest_vit import cli


def main() -> None:
    """Run the command."""
    images = flags.DEFINE_multi_string("images", [], "Image files and folders; more may follow the first.")
    as_json = flags.DEFINE_bool("json", False, "Print JSON lines instead of text.")
    rollout = flags.DEFINE_string("attention_rollout", None, "Folder for a picture of the attention over each image.")

    def predict(arguments: list[str]) -> None:
        from simplest_vit import predict

        paths = [*images.value, *arguments]
        for prediction in predict.predict(str(cli.WORKDIR.value), paths, rollout.value, cli.CONFIG.value):
            print(json.dumps(prediction) if as_json.value else predict.as_text(prediction), flush=True)

    usage = "simplest-vit predict --workdir FOLDER --images FILE..."
    cli.run(predict, usage, required=("workdir",), optional=("config",), positional=True)
