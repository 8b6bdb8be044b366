"""Classifies images with the best checkpoint of a run.

simplest-vit predict --workdir runs/mine --images photo.jpg folder/
"""

import json

from absl import flags

from simplest_vit import cli

IMAGES = flags.DEFINE_multi_string("images", [], "For predict: image files and folders; more may follow the first.")
JSON = flags.DEFINE_bool("json", False, "For predict: print JSON lines instead of text.")
ROLLOUT = flags.DEFINE_string("attention_rollout", None, "For predict: folder for a picture of attention an image.")


def predict(arguments: list[str]) -> None:
    """Predict, and print the classes of each image."""
    from simplest_vit import predict

    images = [*IMAGES.value, *arguments]
    for prediction in predict.predict(str(cli.WORKDIR.value), images, ROLLOUT.value, cli.CONFIG.value):
        print(json.dumps(prediction) if JSON.value else predict.as_text(prediction), flush=True)


def main() -> None:
    """Run as a program."""
    usage = "simplest-vit predict --workdir FOLDER --images FILE..."
    cli.run(predict, usage, required=("workdir",), optional=("config",), positional=True)
