"""Figures as SVG whose colours are variables of CSS, so that one file serves light and dark."""

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distill.errors import UserError
from distill.files import checkpoint
from distill.report.measures import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people who are colour-blind can tell apart: on white, and on black.
SERIES = (
    ("#0072b2", "#56b4e9"),
    ("#e69f00", "#e69f00"),
    ("#009e73", "#1cc79a"),
    ("#cc79a7", "#cc79a7"),
    ("#d55e00", "#f0803c"),
    ("#56b4e9", "#f0e442"),
)
DASHES = ("", "5 2", "1.5 1.5", "5 2 1.5 2")  # so that lines differ in print without colour as well
INK, GRID = "#1b1b1c", "#d0d0d1"  # in figures of matplotlib; no series has these
LIGHT = {"paper": "#ffffff", "ink": INK, "grid": "#d8d8d8", **{f"s{k}": pair[0] for k, pair in enumerate(SERIES)}}
DARK = {"paper": "#15181b", "ink": "#e8e8e8", "grid": "#44484c", **{f"s{k}": pair[1] for k, pair in enumerate(SERIES)}}
PAPER = "background: var(--paper);"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "report",  # the same figure is the same file
    "text.parse_math": False,  # a class may be called $
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
WIDTH, HEIGHT = 4.2, 2.7  # inches; a page makes a figure as wide as its column
LONGEST = 24  # letters of a name inside a figure


class Line(NamedTuple):
    """A network's line in figures: its name, and the place among all networks that gives it colour and dashes."""

    name: str
    place: int

    @property
    def colour(self) -> str:
        """The colour on white."""
        return SERIES[self.place % len(SERIES)][0]

    @property
    def dashes(self) -> str:
        """Lengths of dashes and gaps, as SVG wants them; nothing for a whole line."""
        return DASHES[self.place % len(DASHES)]


def check_packages(*names: str) -> None:
    """Raises UserError if one of these packages is absent."""
    for name in names:
        if not find_spec(name):
            raise UserError(f"this needs the package {name}: pip install {' '.join(names)}")


def curves(records: Mapping[Line, Sequence[Mapping[str, Any]]], key: str, title: str) -> "Figure | None":
    """Returns the value `key` of the records over the epochs, a line for each network; None where nobody has it."""
    series = {}
    for line, of_run in records.items():
        points = [(record["epoch"], record[key]) for record in of_run if record.get(key) is not None]
        if points:
            series[line] = points
    if not series:
        return None

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for line, points in series.items():
            epochs, values = zip(*points, strict=True)
            axes.plot(
                epochs,
                values,
                marker="o" if len(points) <= 30 else "",
                markersize=5 if len(points) == 1 else 3,
                **_look(line),
            )
        last = max(points[-1][0] for points in series.values())
        axes.set_xlim(0.5, max(1.5, last + 0.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("epoch")

    return _figure(title, draw)


def bars(names: Sequence[str], values: Mapping[Line, Tensor], title: str) -> "Figure":
    """Returns horizontal bars in percent: for each name one of each network, whose values are (len(names),)."""

    def draw(axes: "Axes") -> None:
        height = 0.84 / len(values)
        for k, (line, percents) in enumerate(values.items()):
            places = [n + (k - (len(values) - 1) / 2) * height for n in range(len(names))]
            known = torch.nan_to_num(percents).tolist()
            axes.barh(places, known, height=0.92 * height, color=line.colour, label=line.name)
            for place, percent in zip(places, percents.tolist(), strict=True):
                text = "-" if percent != percent else f"{percent:.1f}"
                axes.text(max(percent, 0) + 1 if text != "-" else 1, place, text, va="center", fontsize=6)
        axes.set_yticks(range(len(names)), [shortened(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 109)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("percent of the images of the class")

    return _figure(title, draw, height=0.7 + len(names) * (0.08 + 0.11 * len(values)))


def reliability(found: Mapping[Line, Calibration], least: float) -> "Figure":
    """Returns the accuracy over the confidence, a point for each bin; the diagonal is calibrated.

    least: share of the images that a bin must have, so that a few images do not look like much.
    """

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":")
        for line, of_network in found.items():
            some = of_network.share >= least
            confidence, accuracy = 100 * of_network.confidence[some], 100 * of_network.accuracy[some]
            axes.plot(confidence.tolist(), accuracy.tolist(), marker="o", markersize=3, **_look(line))
        axes.set_xlim(0, 101)
        axes.set_ylim(0, 101)
        axes.set_xlabel("mean confidence of the bin, percent")
        axes.set_ylabel("accuracy, percent")

    return _figure("reliability: below the dotted line is overconfident", draw, height=3.2)


def confidences(found: Mapping[Line, Calibration]) -> "Figure":
    """Returns how the images are distributed over the bins of confidence."""

    def draw(axes: "Axes") -> None:
        for line, of_network in found.items():
            bins = len(of_network.share)
            edges = [100 * k / bins for k in range(bins + 1)]
            axes.stairs((100 * of_network.share).tolist(), edges, **_look(line))
        axes.set_xlim(0, 101)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("confidence, percent")
        axes.set_ylabel("share of the images, percent")

    return _figure("how confident the answers are", draw, height=3.2)


def accuracies(points: Mapping[Line, Sequence[tuple[str, float, float]]], title: str) -> "Figure":
    """Returns accuracies as dots on one axis in percent, a row for each name.

    points: of each line (row, accuracy, deviation over seeds); rows come in the order of their first point.
    """
    rows = list(dict.fromkeys(row for of_line in points.values() for row, _, _ in of_line))

    def draw(axes: "Axes") -> None:
        for line, of_line in points.items():
            places = [rows.index(row) for row, _, _ in of_line]
            values, deviations = [value for _, value, _ in of_line], [spread for _, _, spread in of_line]
            marks: dict[str, Any] = {"fmt": "osD^"[line.place % 4], "markersize": 5, "capsize": 2}
            axes.errorbar(values, places, xerr=deviations, color=line.colour, label=line.name, **marks)
            for place, accuracy in zip(places, values, strict=True):
                above = (0, 5)  # points over the mark
                axes.annotate(f"{accuracy:.2f}", (accuracy, place), above, textcoords="offset points", ha="center")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel("accuracy on the test images, percent")

    return _figure(title, draw, height=1.0 + 0.42 * len(rows))


def shortened(name: str) -> str:
    """Returns a name of at most 24 letters."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _look(line: Line) -> dict[str, Any]:
    dashes = tuple(map(float, line.dashes.split()))
    return {"color": line.colour, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.5, "label": line.name}


def _figure(title: str, draw: "Callable[[Axes], None]", height: float = HEIGHT) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
    return figure


# ----------------------------------------------------------------------------------------------------------------- SVG
def palette(colours: Mapping[str, str]) -> str:
    """Returns colours as variables of CSS: `--ink: #1b1b1c; ...`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_numbers = count()


def to_svg(figure: "Figure", prefix: str | None = None) -> str:
    """Returns an <svg> element for a page that has the variables of `palette`.

    prefix: of its ids, by default one that no other figure of this process has.
    """
    import matplotlib

    prefix, buffer = f"f{next(_numbers)}-" if prefix is None else prefix, io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub("<[^>]+>", partial(_adapt, prefix=prefix), svg[svg.index("<svg") :])  # not the text between tags
    title = html.escape(figure.axes[0].get_title())
    return re.sub('<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)


def _adapt(tag: re.Match[str], prefix: str) -> str:
    """Returns a tag with its ids, and references to them, after `prefix`, and with variables for colours."""
    variables = {colour: f"var(--s{k})" for k, (colour, _) in enumerate(SERIES)}
    variables |= {INK: "var(--ink)", GRID: "var(--grid)"}
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])
    return re.sub("|".join(variables), lambda found: variables[found[0]], text)


def write_svg(figure: "Figure", path: Path) -> None:
    """Writes a figure as a file of its own: with a legend, and with colours for light and dark."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, [shortened(label) for label in labels], loc="outside lower center", frameon=False)
    light, dark = f"svg {{{palette(LIGHT)} {PAPER}}}", f"svg {{{palette(DARK)} {PAPER}}}"
    style = f"<style>{light} @media (prefers-color-scheme: dark) {{{dark}}}</style>"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = to_svg(figure, "").replace("<svg ", f"<svg {names} ", 1)
    svg = re.sub("(<svg [^>]*>)", rf"\1{style}", svg, count=1)
    checkpoint.write_atomically(path, svg.encode())
