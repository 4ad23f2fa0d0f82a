"""Draw the picture of the front page, results/overview.png: python results/overview.py"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tasks import satellite  # noqa: E402

BLUE, ORANGE, GREY, DARK = "#2463a8", "#c65a11", "#d9d9d9", "#222222"
GREEN, PURPLE = "#2e7d32", "#7b3fa0"


def box(axis, x, y, width, height, text, colour, note):
    """A part of the model: its symbol, and below it what it is."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch((x, y), width, height, "round,pad=0.06", fc=colour, ec=DARK, lw=1.5)
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height * 0.62, text, ha="center", va="center", size=22)
    axis.text(x + width / 2, y + height * 0.2, note, ha="center", va="center", size=12)


def arrow(axis, start, end, colour=DARK):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 2, "color": colour})


def patches(axis, x, y, colours):
    """Embedded patches, one square each, from top to bottom."""
    from matplotlib.patches import Rectangle

    for i, colour in enumerate(colours):
        axis.add_patch(Rectangle((x, y - 0.3 * i), 0.24, 0.24, fc=colour, ec=DARK, lw=1))


def method(axis, x, place, colour, name, text):
    """What a method does, and an arrow to the place where it acts."""
    arrow(axis, (x, 1.95), place, colour)
    axis.text(x, 1.85, name, ha="center", va="top", size=18, weight="bold", color=colour)
    axis.text(x, 1.35, text, ha="center", va="top", size=14, color=colour, linespacing=1.25)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.9))
    axis.set(xlim=(0, 10), ylim=(0.3, 6.4))
    axis.axis("off")
    # the source, above
    axis.text(0.9, 5.7, "text or images\n(the source)", ha="center", va="center", size=13)
    box(axis, 2.1, 5.15, 1.2, 1.1, "$f^{\\,s}$", GREY, "pretrained")
    arrow(axis, (1.75, 5.7), (2.02, 5.7))
    arrow(axis, (3.4, 5.7), (3.9, 5.7))
    patches(axis, 3.98, 6.15, [ORANGE] * 4)
    axis.text(4.45, 5.7, "embedded\npatches", va="center", size=13)
    # the target, and the model
    x = satellite.simulate(24, 3)[0][:, 0][[0, 7, 15]]
    for series, colour in zip(x, (BLUE, "#5b8fc7", "#9dbde0"), strict=True):
        scaled = (series - x.min()) / (x.max() - x.min())
        axis.plot(np.linspace(0.15, 1.65, len(series)), 3.2 + 1.1 * scaled, color=colour, lw=2)
    axis.text(0.9, 2.95, "your data", ha="center", va="top", size=13)
    box(axis, 2.1, 3.15, 1.2, 1.1, "$f^{\\,t}$", "white", "new")
    box(axis, 5.05, 2.95, 2.0, 1.5, "$g$", GREY, "body, pretrained")
    box(axis, 8.2, 3.15, 1.2, 1.1, "$h^t$", "white", "new")
    for a, b in ((1.75, 2.02), (3.4, 3.9), (4.35, 4.95), (7.15, 8.1), (9.5, 9.95)):
        arrow(axis, (a, 3.7), (b, 3.7))
    patches(axis, 3.98, 4.15, [BLUE, ORANGE, BLUE, ORANGE])
    arrow(axis, (4.1, 4.9), (4.1, 4.48), ORANGE)
    axis.text(9.35, 2.95, "predictions", ha="center", va="top", size=13)
    # the methods
    orca = "train $f^{\\,t}$ first, until\nits outputs resemble\nthose of $f^{\\,s}$"
    pare = "mix patches of the\nsource in, fewer from\nepoch to epoch"
    proposal = "train $h^t$ first, on\nnoisy outputs of $g$,\nby contrast"
    method(axis, 1.75, (2.5, 3.0), GREEN, "ORCA", orca)
    method(axis, 5.0, (4.15, 3.1), ORANGE, "PaRe", pare)
    method(axis, 8.2, (7.6, 3.5), PURPLE, "the proposal", proposal)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "overview.png")
    draw(parser.parse_args().out)
