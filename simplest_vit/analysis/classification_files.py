"""Files of an evaluation: accuracy by class and the confusion matrix, as CSV and as a picture."""

import pathlib
from collections.abc import Sequence

import numpy as np

from simplest_vit.analysis import figures
from simplest_vit.files import write_csv, writing
from simplest_vit.training.evaluate import Evaluation
from simplest_vit.training.metrics import Classification


def write_classification(evaluation: Evaluation, folder: str) -> None:
    """Write `classes.csv`, `confusion.csv` and `confusion.png` to a folder.

    The picture has the names of up to 50 classes, and the numbers of images of up to 20.

    Raises:
      UserError: If the folder cannot be written.
    """
    path, result, names = pathlib.Path(folder), evaluation.classification, evaluation.class_names
    accuracy = ["" if np.isnan(value) else f"{value:.4f}" for value in result.class_accuracy]
    images = result.confusion.sum(axis=1).astype(int).tolist()
    matrix = result.confusion.astype(int).tolist()
    with writing(f"--output={folder}"):
        path.mkdir(parents=True, exist_ok=True)
        write_csv(path / "classes.csv", [["class", "images", "accuracy"], *zip(names, images, accuracy, strict=True)])
        rows = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        write_csv(path / "confusion.csv", [["class \\ predicted", *names], *rows])
        _draw_confusion(result, names, path / "confusion")


def _draw_confusion(result: Classification, class_names: Sequence[str], path: pathlib.Path) -> None:
    named = class_names if len(class_names) <= 50 else ()
    with figures.style(named):
        figure = figures.create(height=7.0)
        axes = figure.subplots()
        images = np.maximum(result.confusion.sum(axis=1, keepdims=True), 1)
        shares = result.confusion / images
        shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        if len(class_names) <= 20:
            for (row, column), count in np.ndenumerate(result.confusion):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=color)
        figure.colorbar(shown, ax=axes, label="share of the images of a class", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="class", title=f"accuracy {result.accuracy:.1%}")
        axes.grid(visible=False)
        if named:
            ticks = range(len(named)), named
            axes.set_xticks(*ticks, rotation=90, parse_math=False)  # a name may have two dollar signs
            axes.set_yticks(*ticks, parse_math=False)
        figures.save(figure, path)
