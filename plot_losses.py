"""Plot the loss log of a run:  python plot_losses.py [--csv FILE] [--out FILE]

The upper plot shows the two losses. The lower one shows the mean output of the discriminator for
real images, D(x), and for fakes, D(G(z)). The dotted lines show the values for a discriminator that
outputs 0.5 for every image: 2 log 2 for d_loss, log 2 for g_loss, and 0.5 for D(x) and D(G(z)). The
script also works while the training is in progress.
"""
import argparse
import math
import os
import sys
from pathlib import Path

import numpy

COLUMNS = ("epoch", "step", "d_loss", "g_loss", "d_real", "d_fake")
BLUE = "#0072B2"  # colour-blind readers can distinguish these two colours
ORANGE = "#D55E00"


def plot(csv_path, out):
    """Plot the loss log `csv_path` into the file `out`, and return the matplotlib Figure.

    Raises ValueError if `csv_path` is not a loss log or matplotlib does not know the file type of
    `out`, and OSError if a file cannot be read or written.
    """
    # Imported here because it takes half a second, which train.py would spend at its start.
    from matplotlib.figure import Figure

    log = read_log(csv_path)
    epoch, x, x_label = log["epoch"], log["step"], "step"
    if epoch[-1] > epoch[0]:
        steps_per_epoch = x[epoch == epoch[0]].max() / epoch[0]
        x, x_label = x / steps_per_epoch, "epoch"

    # pyplot would choose a backend for the display, and keep a reference to every figure.
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, outputs = figure.subplots(2, 1, sharex=True)
    draw_curve(losses, x, log["d_loss"], "d_loss", BLUE)
    draw_curve(losses, x, log["g_loss"], "g_loss", ORANGE)
    losses.axhline(2 * math.log(2), color=BLUE, linestyle=":", linewidth=1)
    losses.axhline(math.log(2), color=ORANGE, linestyle=":", linewidth=1)
    losses.set_ylabel("loss (dotted: 2 log 2, log 2)")
    if not (log["g_loss"] < 0).any():  # the saturating loss is negative and would be cut off
        losses.set_ylim(bottom=0)

    draw_curve(outputs, x, log["d_real"], "D(x), real images", BLUE)
    draw_curve(outputs, x, log["d_fake"], "D(G(z)), fakes", ORANGE)
    outputs.axhline(0.5, color="black", linestyle=":", linewidth=1)
    outputs.set_ylabel("mean output of D (dotted: 0.5)")
    outputs.set_ylim(0, 1)
    outputs.set_xlabel(x_label)
    for axes in (losses, outputs):
        axes.legend(loc="upper right")
        axes.grid(alpha=0.2)

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return figure


def draw_curve(axes, x, values, label, colour):
    """Draw the values as a thin line, and their moving average (over 2 % of them) as a bold one."""
    radius = len(values) // 100
    axes.plot(x, values, color=colour, alpha=0.35, linewidth=0.6)
    axes.plot(x, smooth(values, radius), color=colour, linewidth=1.8, label=label)


def smooth(values, radius):
    """Return the mean of each value and its neighbours, at most `radius` on either side."""
    index = numpy.arange(len(values))
    start = numpy.maximum(index - radius, 0)
    end = numpy.minimum(index + radius + 1, len(values))
    sums = numpy.concatenate([[0], numpy.cumsum(values)])  # sums[i] is the sum of the first i
    with numpy.errstate(invalid="ignore"):  # a training that diverged ends in infinity or NaN
        return (sums[end] - sums[start]) / (end - start)


def read_log(path):
    """Read a loss log: a dictionary from the name of each column to an array of its numbers.

    Raises ValueError if the file is not a loss log, and OSError if it cannot be read.
    """
    try:
        # "-sig" skips the mark that Excel puts at the beginning of a file.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        lines.pop()  # the text after the last newline: empty, or a row that is still being written
        if not any(lines[1:]):
            raise ValueError("it has no rows yet; try again later")
        table = numpy.loadtxt(lines[1:], delimiter=",", ndmin=2)
        names = lines[0].split(",")
        if not set(COLUMNS) <= set(names) or len(names) != table.shape[1]:
            raise ValueError(f"its first line does not name the columns {', '.join(COLUMNS)}")
    except ValueError as error:
        raise ValueError(f"{path} cannot be plotted: {str(error)[:150]}") from None
    return dict(zip(names, table.T))


def main():
    # This script shows no window. A notebook that starts it may have chosen a backend for windows
    # that is not installed here.
    os.environ["MPLBACKEND"] = "agg"
    parser = argparse.ArgumentParser(description="Plot the loss log of a run.")
    parser.add_argument("--csv", default="out/losses.csv",
                        help="the log that train.py wrote (default: %(default)s)")
    parser.add_argument("--out",
                        help="output: .png, .svg or .pdf (default: losses.png beside the log)")
    arguments = parser.parse_args()
    out = arguments.out
    if out is None:
        out = Path(arguments.csv).parent / "losses.png"
    if Path(out).suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {out}: the name must end in .png, .svg or .pdf")
    try:
        plot(arguments.csv, out)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"plot_losses.py: {error}")
    print(f"{out}: wrote the plot of {arguments.csv}")


if __name__ == "__main__":
    main()
