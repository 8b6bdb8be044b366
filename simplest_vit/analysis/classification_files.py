"""Files of an evaluation: accuracy by class and the confusion matrix, as CSV and as a picture."""

import pathlib

import numpy as np

from simplest_vit.analysis import figures
from simplest_vit.files import write_csv, writing
from simplest_vit.training.evaluate import Evaluation


def write_classification(evaluation: Evaluation, folder: str) -> None:
    """Write `classes.csv`, `confusion.csv` and `confusion.png` to a folder.

    The picture has the names of up to 50 classes, and the numbers of images of up to 20.

    Raises:
      UserError: If the folder cannot be written.
    """
    path, names = pathlib.Path(folder), evaluation.class_names
    accuracy = ["" if np.isnan(value) else f"{value:.4f}" for value in evaluation.class_accuracy]
    images = evaluation.confusion.sum(axis=1).astype(int).tolist()
    matrix = evaluation.confusion.astype(int).tolist()
    with writing(f"--output={folder}"):
        path.mkdir(parents=True, exist_ok=True)
        write_csv(path / "classes.csv", [["class", "images", "accuracy"], *zip(names, images, accuracy, strict=True)])
        rows = [[name, *row] for name, row in zip(names, matrix, strict=True)]
        write_csv(path / "confusion.csv", [["class \\ predicted", *names], *rows])
        _draw_confusion(evaluation, path / "confusion")


def _draw_confusion(evaluation: Evaluation, path: pathlib.Path) -> None:
    confusion, class_names = evaluation.confusion, evaluation.class_names
    named = class_names if len(class_names) <= 50 else ()
    with figures.style(named):
        figure = figures.create(height=7.0)
        axes = figure.subplots()
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        if len(class_names) <= 20:
            for (row, column), count in np.ndenumerate(confusion):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=color)
        figure.colorbar(shown, ax=axes, label="share of the images of a class", shrink=0.8)
        axes.set(xlabel="predicted class", ylabel="class", title=f"accuracy {evaluation.accuracy:.1%}")
        axes.grid(visible=False)
        if named:
            ticks = range(len(named)), named
            axes.set_xticks(*ticks, rotation=90, parse_math=False)  # a name may have two dollar signs
            axes.set_yticks(*ticks, parse_math=False)
        figures.save(figure, path)
