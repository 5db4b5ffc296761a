"""Draw the loss log of a run:  python plot_losses.py [--csv FILE] [--out FILE]

Top: the two losses. Bottom: what D answers for real images, D(x), and for fakes, D(G(z)). Dotted lines: a D that tosses
a coin, D(x) = D(G(z)) = ½, d_loss = −log ½ − log ½ = 2 ln 2, g_loss = −log ½ = ln 2. A log may still be growing.
"""
import argparse
import itertools
import math
import os
import sys
from pathlib import Path

COLUMNS = ["epoch", "step", "d_loss", "g_loss", "d_real", "d_fake"]
BLUE, ORANGE = "#0072B2", "#D55E00"  # a pair that stays apart for colour-blind readers


def write_whole(path, write):
    """Call write(file), then rename the file to `path`: that is the old one or the new one whole, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write the same path
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def begin_log(path, epoch=0):
    """A loss log with the rows up to `epoch`: those of an epoch that was broken off go, as it begins anew."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else [",".join(COLUMNS) + "\n"]
    kept = [line for line in lines if line.endswith("\n")
            and (not line[0].isdigit() or int(line.partition(",")[0]) <= epoch)]
    write_whole(path, lambda file: file.write("".join(kept).encode()))


def read_log(path):
    """The columns of a loss log as {name: list of numbers}; ValueError, in one line, where it is no such log."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rpartition("\n")[0].split("\n")  # less a half-written last line
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    if lines[0].split(",") != COLUMNS:
        raise ValueError(f"{path} is no loss log: its first line must be {','.join(COLUMNS)}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = [float(field) for field in line.split(",")]
            good = len(row) == len(COLUMNS) and 1 <= row[0] < math.inf and 1 <= row[1] < math.inf
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{path}, line {number}: not {len(COLUMNS)} numbers, epoch and step from 1: {line[:60]}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    return dict(zip(COLUMNS, zip(*rows)))


def smooth(values, window):
    """Mean of the `window` values around each one, of fewer at the ends."""
    sums = [0, *itertools.accumulate(values)]
    spans = [(max(0, i - window // 2), min(len(values), i + window // 2 + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def plot(log_path="out/losses.csv", out="out/losses.png"):
    """Draw the log at `log_path` into the picture `out`."""
    from matplotlib.figure import Figure  # here, as it is slow to import; and no pyplot, which looks for a display

    log = read_log(log_path)
    figure = Figure(figsize=(8, 6), layout="constrained")
    form = Path(out).suffix[1:].lower()
    if form not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--out {out}: not a type of picture; take a name that ends in .png, .svg or .pdf")

    steps_per_epoch = max(step for step, epoch in zip(log["step"], log["epoch"]) if epoch == log["epoch"][0])
    several = log["epoch"][-1] > log["epoch"][0]
    x = [step / steps_per_epoch if several else step for step in log["step"]]

    losses, answers = figure.subplots(2, 1, sharex=True)
    for axes, column, label, colour, level in (
        (losses, "d_loss", "d_loss", BLUE, 2 * math.log(2)),
        (losses, "g_loss", "g_loss", ORANGE, math.log(2)),
        (answers, "d_real", "D(x), real", BLUE, 0.5),
        (answers, "d_fake", "D(G(z)), fake", ORANGE, 0.5),
    ):
        axes.plot(x, log[column], color=colour, alpha=0.35, linewidth=0.6)
        axes.plot(x, smooth(log[column], max(1, len(x) // 50)), color=colour, linewidth=1.8, label=label)
        axes.axhline(level, color=colour if axes is losses else "0.3", linestyle=":", linewidth=1)
    losses.set_ylabel("loss (dotted: 2 ln 2, ln 2)")
    losses.set_ylim(bottom=0 if min(log["g_loss"]) >= 0 else None)  # the saturating loss is below 0
    answers.set_ylabel("D says real (dotted: 0.5)")
    answers.set_ylim(0, 1)
    answers.set_xlabel("epoch" if several else "step")
    for axes in (losses, answers):
        axes.legend(loc="upper right")
        axes.grid(alpha=0.2)
    write_whole(out, lambda file: figure.savefig(file, format=form, dpi=120))


def main():
    parser = argparse.ArgumentParser(description="Draw the loss log of a run.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--csv", default="out/losses.csv", help="the log that train.py wrote")
    parser.add_argument("--out", default="out/losses.png", help="the picture to write: .png, .svg, .pdf")
    args = parser.parse_args()
    try:
        plot(args.csv, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_losses.py: {error}")
    print(f"{args.out}: the losses of {args.csv}")


if __name__ == "__main__":
    main()
