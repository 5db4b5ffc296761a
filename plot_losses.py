"""Plot the loss log of a run:  python plot_losses.py [--csv FILE] [--out FILE]

The upper plot shows the two losses. The lower one shows the mean output of the discriminator for
real images, D(x), and for fakes, D(G(z)). The dotted lines show the values for a discriminator that
outputs 0.5 for every image: 2 log 2 for d_loss, log 2 for g_loss, and 0.5 for D(x) and D(G(z)). The
script also works while the training is in progress.
"""
import argparse
import math
import sys
from pathlib import Path

COLUMNS = ["epoch", "step", "d_loss", "g_loss", "d_real", "d_fake"]  # the header of losses.csv
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
    x = log["step"]
    x_label = "step"
    first_epoch, last_epoch = log["epoch"][0], log["epoch"][-1]
    if last_epoch > first_epoch:
        # The last row of an epoch has the step epoch * steps_per_epoch.
        rows_of_first_epoch = log["epoch"].count(first_epoch)
        steps_per_epoch = log["step"][rows_of_first_epoch - 1] / first_epoch
        x = [step / steps_per_epoch for step in log["step"]]
        x_label = "epoch"

    # pyplot would choose a backend for the display, and keep a reference to every figure.
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, outputs = figure.subplots(2, 1, sharex=True)
    draw_curve(losses, x, log["d_loss"], "d_loss", BLUE)
    draw_curve(losses, x, log["g_loss"], "g_loss", ORANGE)
    losses.axhline(2 * math.log(2), color=BLUE, linestyle=":", linewidth=1)
    losses.axhline(math.log(2), color=ORANGE, linestyle=":", linewidth=1)
    losses.set_ylabel("loss (dotted: 2 log 2, log 2)")
    if min(log["g_loss"]) >= 0:  # the saturating loss is negative and would be cut off
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
    means = []
    for i in range(len(values)):
        neighbours = values[max(0, i - radius):i + radius + 1]
        means.append(sum(neighbours) / len(neighbours))
    return means


def read_log(path):
    """Read a loss log: a dictionary with a list of numbers for each of COLUMNS."""
    try:
        # "-sig" skips the mark that Excel puts at the beginning of a file.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    lines.pop()  # the text after the last newline: empty, or an incomplete row
    if not lines or lines[0] != ",".join(COLUMNS):
        raise ValueError(f"{path} is not a loss log: its first line is not {','.join(COLUMNS)}")
    if len(lines) == 1:
        raise ValueError(f"{path} has no rows yet; try again later")
    log = {name: [] for name in COLUMNS}
    for number, line in enumerate(lines[1:], start=2):
        try:
            for name, field in zip(COLUMNS, line.split(","), strict=True):
                log[name].append(float(field))
        except ValueError:
            raise ValueError(f"{path}, line {number} is not a row of a loss log: "
                             f"{line[:60]}") from None
    if not all(1 <= number < math.inf for number in log["epoch"] + log["step"]):
        raise ValueError(f"{path} is not a loss log: its epochs and steps must be 1 or more")
    return log


def main():
    parser = argparse.ArgumentParser(description="Plot the loss log of a run.")
    parser.add_argument("--csv", default="out/losses.csv",
                        help="the log that train.py wrote (default: %(default)s)")
    parser.add_argument("--out",
                        help="output: .png, .svg or .pdf (default: losses.png beside the log)")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = Path(arguments.csv).with_name("losses.png")
    if Path(arguments.out).suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {arguments.out}: the name must end in .png, .svg or .pdf")
    try:
        plot(arguments.csv, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_losses.py: {error}")
    print(f"{arguments.out}: wrote the plot of {arguments.csv}")


if __name__ == "__main__":
    main()
