"""The plot of a loss log, which may still be growing, and the refusal of other files."""
from pathlib import Path

import numpy
import pytest
from PIL import Image

import plot_losses
from conftest import complaint

HEADER = "epoch,step,d_loss,g_loss,d_real,d_fake\n"
ROWS = [f"{1 + step // 101},{step},{1.3 + step % 3 / 9:.5f},{0.7 + step % 7 / 9:.5f},0.51,0.48\n"
        for step in range(20, 401, 20)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text(HEADER + "".join(ROWS))
    return path


def colours(path):
    with Image.open(path) as picture:
        pixels = numpy.array(picture.convert("RGB")).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in numpy.unique(pixels, axis=0)}


@pytest.mark.parametrize("rows", [1, 20])
def test_log_of_any_length_is_plotted_in_two_colours(cli, log, rows):
    log.write_text(HEADER + "".join(ROWS[:rows]))
    out = log.parent / "new" / "plot.png"
    message = f"{out}: wrote the plot of {log}\n"
    assert cli(plot_losses, "--csv", log, "--out", out) == (0, message, "")
    assert {plot_losses.BLUE, plot_losses.ORANGE} <= colours(out)


def test_curves_are_the_columns_over_epochs_once_there_are_several(log):
    read = plot_losses.read_log(log)
    losses, outputs = plot_losses.plot(log, log.with_name("plot.png")).axes
    assert outputs.get_xlabel() == "epoch" and outputs.get_ylim() == (0, 1)
    assert list(losses.lines[0].get_xdata()) == [step / 100 for step in range(20, 401, 20)]
    drawn = [list(line.get_ydata()) for axes in (losses, outputs) for line in axes.lines]
    assert all(drawn.count(list(read[column])) == 2 for column in plot_losses.CURVES)  # thin, bold
    log.write_text(HEADER + "".join(ROWS[:5]))
    losses, outputs = plot_losses.plot(log, log.with_name("plot.png")).axes
    assert outputs.get_xlabel() == "step"
    assert list(losses.lines[0].get_xdata()) == [20, 40, 60, 80, 100]


def test_row_that_is_still_being_written_is_left_out(log):
    log.write_text(HEADER + "".join(ROWS) + "5,500,1.3,0.7,0.5,0.4")
    read = plot_losses.read_log(log)
    assert list(read["step"]) == list(range(20, 401, 20)) and read["d_fake"][0] == 0.48


@pytest.mark.parametrize("count, radius", [(1, 0), (99, 0), (100, 1), (250, 2)])
def test_smoothing_is_the_mean_of_the_neighbours(count, radius):
    values = numpy.random.default_rng(0).random(count)
    means = [values[max(0, i - radius):i + radius + 1].mean() for i in range(count)]
    assert plot_losses.smooth(values) == pytest.approx(means)


@pytest.mark.parametrize("row, bottom", [
    ("2,40,nan,inf,nan,nan\n", None), ("2,40,-3,-5,0,1\n", -5)])
def test_losses_that_diverge_or_are_negative_are_plotted(log, row, bottom):
    log.write_text(HEADER + ROWS[0] + row)
    losses, _ = plot_losses.plot(log, log.with_name("plot.svg")).axes
    assert bottom is None or losses.get_ylim()[0] < bottom
    assert log.with_name("plot.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("content, word", [
    (HEADER.encode(), "no rows"),
    (b"epoch,step,loss\n1,20,1.3\n", "d_loss"),
    ((HEADER + "x" * 200_000 + "\n").encode(), "xxx"),
    ((HEADER + ROWS[0] + "1,40,1.3,0.7\n").encode(), "columns"),
    ((HEADER + "1,40,1.3,0.7,0.5,0.5,0.5\n").encode(), "longer"),
    (bytes(range(256)), "utf-8"),
], ids=range(6))
def test_file_that_is_no_loss_log_is_one_line(cli, log, content, word):
    log.write_bytes(content)
    line = complaint(cli, plot_losses, "--csv", log)
    assert str(log) in line and word in line and len(line) < 400


@pytest.mark.parametrize("options", [
    "--csv .", "--csv none.csv", "--out plot", "--out plot.npy", "--out file/plot.png",
    "--out folder.png"])
def test_file_that_cannot_be_read_or_written_is_one_line(cli, log, options):
    Path("folder.png").mkdir()
    Path("file").touch()
    line = complaint(cli, plot_losses, "--csv", log, *options.split())
    assert options.split()[1].partition("/")[0] in line
