"""Evaluate the best and the latest checkpoint of a run.

    simplest-vit evaluate --workdir runs/mine
    simplest-vit evaluate --workdir runs/mine --split=test
    simplest-vit evaluate --workdir runs/mine --image_folder=/photos2 --output=report

The run's own config is used. If its data have moved, add --config.data.dir=FOLDER or --config.data.manual_dir=FOLDER.
"""

import json
import pathlib

from absl import flags

from simplest_vit import cli
from simplest_vit.commands import processes

flags.adopt_module_key_flags(processes)


def main() -> None:
    """Run the command."""
    split = flags.DEFINE_string("split", None, "Split to evaluate instead of the run's, such as test or test[:1000].")
    image_folder = cli.define_path(
        "image_folder", None, "Folder of the same classes to evaluate instead; if it has train/, its val/."
    )
    output = cli.define_path("output", None, "Folder for the best checkpoint's accuracy by class and confusion matrix.")

    def evaluate() -> None:
        import jax

        from simplest_vit.data.builders.image_folder import has_splits
        from simplest_vit.primary import is_primary
        from simplest_vit.training import evaluate

        config = cli.CONFIG.value
        other_data: dict[str, str | None] = {}
        own_flags = {}
        if image_folder.value:
            all_images = not has_splits(pathlib.Path(image_folder.value))
            other_data = {"name": "image_folder", "manual_dir": image_folder.value, "label": None}
            own_flags["data.manual_dir"] = "--image_folder"
            # Not the run's own split: all images of a folder with CLASS/*.jpg, or those in val/.
            other_data["validation_split"] = "all" if all_images else None
        if split.value:
            other_data["validation_split"] = split.value
            own_flags["data.validation_split"] = "--split"
        # JAX would handle SIGTERM so that all processes stop after the same step, but an evaluation has no steps.
        jax.config.update("jax_enable_preemption_service", False)
        with processes.connected(config), cli.naming(own_flags):
            outcome = evaluate.evaluate(str(cli.WORKDIR.value), config, other_data)
        if not is_primary():
            return
        print(json.dumps({name: evaluation.summary() for name, evaluation in outcome.items()}, indent=2))
        if output.value:
            # Imported here because matplotlib takes a second to import.
            from simplest_vit.analysis.classification_files import write_classification

            write_classification(outcome["best"], output.value)

    cli.run(evaluate, "simplest-vit evaluate --workdir FOLDER", required=("workdir",), optional=("config",))
