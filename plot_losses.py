"""Plot the loss log of a run:  python plot_losses.py [--csv FILE] [--out FILE]

The upper plot shows the two losses, the lower one the mean output of the discriminator for real
images, D(x), and for fakes, D(G(z)). The script also works while the training is in progress.
"""
import argparse
import math
import os
from pathlib import Path

import numpy

BLUE = "#0072B2"  # colour-blind readers can distinguish these two colours
ORANGE = "#D55E00"
CURVES = {  # column of the log: label, colour, and the value if D outputs 0.5 for every image
    "d_loss": ("d_loss", BLUE, 2 * math.log(2)),
    "g_loss": ("g_loss", ORANGE, math.log(2)),
    "d_real": ("D(x), real images", BLUE, 0.5),
    "d_fake": ("D(G(z)), fakes", ORANGE, 0.5),
}


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
    for axes, columns in ((losses, ("d_loss", "g_loss")), (outputs, ("d_real", "d_fake"))):
        for column in columns:
            label, colour, indifferent = CURVES[column]
            axes.plot(x, log[column], color=colour, alpha=0.35, linewidth=0.6)
            axes.plot(x, smooth(log[column]), color=colour, linewidth=1.8, label=label)
            # These values belong to the losses in gan.py (BCE). Other losses have other ones.
            axes.axhline(indifferent, color=colour, linestyle=":", linewidth=1)
        axes.legend(loc="upper right")
        axes.grid(alpha=0.2)
    losses.set_ylabel("loss (dotted: D outputs 0.5)")
    if (log["g_loss"] >= 0).all():  # other losses can be negative, and would be cut off
        losses.set_ylim(bottom=0)
    outputs.set_ylabel("mean output of D")
    outputs.set_ylim(0, 1)
    outputs.set_xlabel(x_label)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return figure


def smooth(values):
    """Return the mean of each value and its neighbours, up to 1 % of all values on either side."""
    window = numpy.ones(2 * (len(values) // 100) + 1)
    sums = numpy.convolve(values, window, mode="same")
    counts = numpy.convolve(numpy.ones(len(values)), window, mode="same")  # fewer at the ends
    return sums / counts


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
        log = dict(zip(lines[0].split(","), table.T, strict=True))
        if not {"epoch", "step", *CURVES} <= log.keys():
            raise ValueError(f"its first line does not name epoch, step, {', '.join(CURVES)}")
    except ValueError as error:
        raise ValueError(f"{path} cannot be plotted: {str(error)[:150]}") from None
    return log


def main():
    parser = argparse.ArgumentParser(description="Plot the loss log of a run.")
    parser.add_argument("--csv", default="out/losses.csv",
                        help="the log that train.py wrote (default: %(default)s)")
    parser.add_argument("--out",
                        help="output: .png, .svg or .pdf (default: losses.png beside the log)")
    arguments = parser.parse_args()
    csv_path = Path(os.path.expanduser(arguments.csv))
    out = csv_path.parent / "losses.png"
    if arguments.out is not None:
        out = Path(os.path.expanduser(arguments.out))
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {out}: the name must end in .png, .svg or .pdf")
    try:
        plot(csv_path, out)
    except ValueError as error:
        parser.exit(2, f"plot_losses.py: {error}\n")
    except (ImportError, OSError) as error:
        parser.exit(1, f"plot_losses.py: {error}\n")
    print(f"{out}: wrote the plot of {csv_path}")


if __name__ == "__main__":
    main()
