"""One style for all figures, with colours that colour-blind readers can distinguish."""

import contextlib
import itertools
import logging
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from simplest_vit.data.preview import find_font, has_letters

log = logging.getLogger("simplest_vit")

# Okabe and Ito, "Color Universal Design" (2008): black first, without the yellow that is invisible on white.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Networks that have the colour and marker at their place in all figures.
NETWORKS = ("isometric", "shift MLP", "SimpleViT", "SimpleViT, constant shifts", "E-SPA + TAT")

# 8.3 inches are 830 px at 100 dpi, the width of a README; saved at twice that, for dense screens.
WIDTH = 8.3
_STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.hashsalt": "simplest-vit",  # the same figure gives the same file
}


def styled(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each name with a colour and a marker, which are the same in all figures for `NETWORKS`.

    Other names take what no network has, then what no network among the names has, and repeat after that.
    """
    names, styles = list(names), list(zip(COLORS, MARKERS, strict=True))
    own = dict(zip(NETWORKS, styles, strict=False))
    free = [style for network, style in own.items() if network not in names]
    others = itertools.cycle(styles[len(own) :] + free)
    for name in names:
        yield (name, *(own.get(name) or next(others)))


def create(height: float) -> Figure:
    """Create an empty figure of README width and `height` inches, in the style of the project, without a display."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


@contextlib.contextmanager
def style(names: Iterable[str] = ()) -> Iterator[None]:
    """Open a context in which figures are drawn and saved, with fonts that have the letters of some names."""
    fonts = {name: find_font(name) for name in names}
    if lacking := [name for name, font in fonts.items() if not has_letters(font, name)]:
        log.warning("no installed font has all letters of %s; the picture shows boxes instead", ", ".join(lacking))
    families = dict.fromkeys(["DejaVu Sans", *(str(font.getname()[0]) for font in fonts.values())])
    with matplotlib.rc_context(_STYLE | {"font.family": [*families]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # reported above
        yield


def save(figure: Figure, path: pathlib.Path) -> None:
    """Save a figure as PNG and SVG; `path` has no suffix."""
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
