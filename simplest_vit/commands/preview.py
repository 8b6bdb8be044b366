"""Draw a grid of augmented training images with their labels.

simplest-vit preview --config my_config.py --output preview.png
"""

import os
import pathlib

from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.files import writing


def main() -> None:
    """Run the command."""
    picture = cli.define_path("output", "preview.png", "The picture to write.")

    def preview() -> None:
        from PIL import Image

        from simplest_vit.data import input_pipeline
        from simplest_vit.data.preview import image_grid

        config, output = cli.CONFIG.value, pathlib.Path(picture.value)
        written = Image.registered_extensions().get(output.suffix.lower()) in Image.SAVE
        if not written or not os.access(output.parent, os.W_OK | os.X_OK):
            raise UserError(
                f"--output={output} cannot be written; expected a picture in a folder you may write to, such as a.png"
            )
        dataset = input_pipeline.load(config.data)
        batch_size = input_pipeline.fit_batch_size(config.batch_size, dataset.train_size, config.accumulation_steps)
        options = {"batch_size": batch_size, "seed": config.seed, "start_step": 0, "sharding": None}
        batch = next(input_pipeline.train_batches(dataset, config.data, **options))
        with writing(f"--output={output}"):
            Image.fromarray(image_grid(dataset, batch)).save(output)
        print(f"wrote {output}")

    cli.run(preview, "simplest-vit preview --config FILE", required=("config",))
