"""The figure of signal propagation: one panel for each quantity, one colour for each model, theory dashed."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from simplest_vit.analysis import figures
from simplest_vit.analysis.propagation import Propagation

# Quantity -> title, label of the y axis, logarithmic.
PANELS = {
    "token_cosine": ("Difference between tokens of an image", "1 - cosine of two tokens, mean", True),
    "image_cosine": ("Difference between images", "1 - cosine of two images, mean", True),
    "mean_square": ("Size of the signal", "mean squared activation q", True),
    "kernel_error": ("Distance of token cosines from theory", "largest |cosine - theory|", True),
    "attention_entropy": ("Width of attention", "entropy of a row (nats)", False),
    "attention_distance": ("Distance of attention from initialization", "$\\|A - A_0\\| \\, / \\, \\|A_0\\|$", True),
    "token_gradient": ("Gradient at the tokens", "gradient norm", True),
    "parameter_gradient": ("Gradient at the parameters", "gradient norm", True),
}


# Differences below this are rounding errors of float32. Singular values, relative to the largest, are square roots of
# computed values.
_FLOOR = 1e-7
_JACOBIAN_FLOOR = 3e-4


def plotted_values(quantity: str, values: np.ndarray) -> np.ndarray:
    """Return the values to plot: 1 - cosine for a cosine; on a logarithmic axis, nothing below rounding error."""
    values = 1 - values if quantity.endswith("cosine") else values
    return np.maximum(values, _FLOOR) if PANELS[quantity][2] else values


def draw(results: list[Propagation], title: str) -> Figure:
    """Draw all quantities over the blocks: the tokens of the first model, `PANELS` and the Jacobian, in that order."""
    figure = figures.create(height=13.5)
    tokens, *quantities, jacobian = figure.subplots(5, 2).flat
    _draw_tokens(tokens, results[0])
    for axis, quantity in zip(quantities, PANELS, strict=True):
        draw_quantity(axis, quantity, results)
    draw_jacobian(jacobian, results)
    _add_legend(figure, results, f"Signal propagation of {results[0].name}: {title}")
    return figure


def draw_overview(results: list[Propagation], title: str) -> Figure:
    """Draw the differences of tokens, those of images, and the Jacobian: the figure in docs/."""
    figure = figures.create(height=4.0)
    *cosines, jacobian = figure.subplots(1, 3)
    for axis, quantity in zip(cosines, ("token_cosine", "image_cosine"), strict=True):
        draw_quantity(axis, quantity, results)
    draw_jacobian(jacobian, results)
    for axis, name in zip((*cosines, jacobian), ("Tokens of an image", "Images", "Jacobian"), strict=True):
        axis.set_title(name)
    _add_legend(figure, results, title)
    return figure


def _styled(results: list[Propagation]) -> list[tuple[Propagation, str, str]]:
    """Pair each result with the colour and the marker of its name."""
    styles = figures.styled(result.name for result in results)
    return [(result, color, marker) for result, (_, color, marker) in zip(results, styles, strict=True)]


def _add_legend(figure: Figure, results: list[Propagation], title: str) -> None:
    """Add one legend for all panels, above them and under the title."""
    handles = [
        Line2D([], [], color=color, marker=marker, label=result.name) for result, color, marker in _styled(results)
    ]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="theory, infinite width"))
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1.2, label="C-map alone, no attention"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, title=title, title_fontproperties={"size": 11})


def draw_quantity(axis: Axes, quantity: str, results: list[Propagation]) -> None:
    """Draw one quantity over the blocks: measurements with markers, theory dashed, the C-map alone dotted."""
    title, label, logarithmic = PANELS[quantity]
    # The first model is drawn last, over the others.
    for result, color, marker in _styled(results)[::-1]:
        if quantity not in result.measured:
            continue
        y = plotted_values(quantity, result.measured[quantity])
        blocks = np.arange(len(y))
        axis.plot(blocks, y, color=color, marker=marker, markevery=max(len(y) // 13, 1))
        if quantity in result.theory:
            theory = plotted_values(quantity, result.theory[quantity])
            axis.plot(blocks, theory, color=color, linestyle="--", linewidth=1, alpha=0.8)
        if f"{quantity}_c_map" in result.theory and result is results[0]:
            c_map = plotted_values(quantity, result.theory[f"{quantity}_c_map"])
            axis.plot(blocks, c_map, color=color, linestyle=":", linewidth=1.2)
    if logarithmic:
        axis.set_yscale("log")
    axis.set(title=title, ylabel=label, xlabel="block (0: embedding)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_jacobian(axis: Axes, results: list[Propagation]) -> None:
    """Draw the quantiles of the Jacobian's singular values, without rounding errors."""
    for result, color, _ in _styled(results)[::-1]:
        values, weights = result.jacobian
        steps = np.array([values[0], *values])
        steps[steps < _JACOBIAN_FLOOR * values[-1]] = np.nan
        axis.step([0, *np.cumsum(weights)], steps, color=color)
    axis.set(
        title="Jacobian from tokens to features",
        xlabel="share of directions",
        ylabel="singular value, at most",
    )
    axis.set_yscale("log")


def _draw_tokens(axis: Axes, result: Propagation) -> None:
    """Draw the middle token's cosines at four depths: measured as dots, theory dashed."""
    axis.set(title="Cosines of tokens against theory", xlabel="token", ylabel="with the middle token")
    depth = len(result.token_rows) - 1
    for block, color in zip(sorted({0, -(-depth // 4), depth // 2, depth}), figures.COLORS[1:], strict=False):
        axis.plot(result.token_rows[block], ".", color=color, label=f"block {block}")
        if result.theory_rows is not None:
            axis.plot(result.theory_rows[block], "--", color=color, linewidth=1)
    axis.legend(fontsize=8, ncols=2, frameon=True, framealpha=0.8, edgecolor="none")
