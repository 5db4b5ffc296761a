"""Plot the loss log of a run:  python plot_losses.py [--csv FILE] [--out FILE]

The upper plot shows the two losses, the lower one the mean output of the discriminator for real
images, D(x), and for fakes, D(G(z)). The dotted lines show the values if D outputs 0.5 for every
image. The script can be called while the training is in progress.
"""
import argparse
import math
from pathlib import Path

import numpy
from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"  # colour-blind readers can distinguish these


def plot(csv_path, out):
    """Plot the loss log `csv_path` into the file `out`, and return the matplotlib Figure.

    Raises ValueError if `csv_path` is no loss log or matplotlib does not know the type of `out`,
    and OSError if a file cannot be read or written.
    """
    rows = Path(csv_path).read_text().splitlines()
    if len(rows) < 2:
        raise ValueError("it has no rows yet")
    log = numpy.genfromtxt(rows, delimiter=",", names=True, ndmin=1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, outputs = figure.subplots(2, sharex=True)
    draw_curve(losses, log, "d_loss", "d_loss", BLUE, 2 * math.log(2))
    draw_curve(losses, log, "g_loss", "g_loss", ORANGE, math.log(2))
    draw_curve(outputs, log, "d_real", "D(x), real images", BLUE, 0.5)
    draw_curve(outputs, log, "d_fake", "D(G(z)), fakes", ORANGE, 0.5)
    losses.set_ylabel("loss")
    outputs.set_ylabel("mean output of D")
    outputs.set_xlabel("step")
    figure.savefig(out, dpi=120)
    return figure


def draw_curve(axes, log, column, label, colour, indifferent):
    """Draw a column of the log, thin, and the mean of each value and its neighbours, bold."""
    radius = len(log) // 100  # 1 % of all values, on either side
    means = [log[column][max(0, i - radius):i + radius + 1].mean() for i in range(len(log))]
    axes.plot(log["step"], log[column], color=colour, alpha=0.35, linewidth=0.6)
    axes.plot(log["step"], means, color=colour, label=label, marker="." if len(log) == 1 else "")
    axes.axhline(indifferent, color=colour, linestyle=":")
    axes.legend(loc="upper right")


def main():
    parser = argparse.ArgumentParser(description="Plot the loss log of a run.")
    parser.add_argument("--csv", type=Path, default=Path("out/losses.csv"),
                        help="the log that train.py wrote (default: %(default)s)")
    parser.add_argument("--out", type=Path,
                        help="output: .png, .svg or .pdf (default: losses.png beside the log)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.csv.with_name("losses.png")
    try:
        plot(arguments.csv, out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"plot_losses.py: {arguments.csv}: {' '.join(str(error).split())}\n")
    print(f"{out}: wrote the plot of {arguments.csv}")


if __name__ == "__main__":
    main()
