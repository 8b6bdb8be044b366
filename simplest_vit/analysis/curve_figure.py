"""Training curves: loss and accuracy over the steps, training dashed, validation solid.

A training loss is of the labels that are trained on, mixed and smoothed; a validation loss is of the labels alone.
"""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simplest_vit.analysis import figures
from simplest_vit.analysis.runs import Curve

PANELS = {"Loss": ("train_loss", "validation_loss"), "Accuracy": ("train_accuracy", "validation_accuracy")}


def draw_curves(curves: dict[str, dict[str, Curve]], title: str) -> Figure:
    """Draw runs over one another.

    Args:
      curves: For each run, by its label, the curves of `runs.read_curves`; a tag that is missing is not drawn.
      title: Of the figure.

    Returns:
      A figure with the axes of `PANELS`, in that order.
    """
    figure = figures.create(height=3.6 + 0.2 * (len(curves) // 2))
    for axis, (panel, (train, validation)) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for tags, color, marker in figures.styled(curves.values()):
            if train in tags:
                axis.plot(*tags[train], color=color, linestyle="--", linewidth=1, alpha=0.8)
            if validation in tags:
                axis.plot(*tags[validation], color=color, marker=marker)
        axis.set(title=panel, xlabel="step", ylabel=panel.lower() + (" (nats)" if panel == "Loss" else " (top-1)"))
    handles = [
        Line2D([], [], color=color, marker=marker, label=label) for label, color, marker in figures.styled(curves)
    ]
    handles.append(
        Line2D([], [], color="black", linestyle="--", linewidth=1, label="training (its loss with smoothed labels)")
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=2, title=title, title_fontproperties={"size": 11})
    return figure
