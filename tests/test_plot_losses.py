"""The plot of a loss log, which may still be growing, and the refusal of other files."""
import os
import subprocess
import sys

import numpy
import pytest
from PIL import Image

import plot_losses
from conftest import ROOT, complaint, contents

HEADER = "epoch,step,d_loss,g_loss,d_real,d_fake\n"
ROWS = [f"{1 + step // 101},{step},{1.3 + step % 3 / 9:.5f},{0.7 + step % 7 / 9:.5f},0.51,0.48\n"
        for step in range(20, 401, 20)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text(HEADER + "".join(ROWS))
    return path


def colours(path):
    pixels = numpy.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in numpy.unique(pixels, axis=0)}


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_log_of_any_length_is_plotted_in_two_colours(cli, log, rows):
    log.write_text(HEADER + "".join(ROWS[:rows]))
    out = log.parent / "new" / "plot.png"
    message = f"{out}: wrote the plot of {log}\n"
    assert cli(plot_losses, "--csv", log, "--out", out) == (0, message, "")
    assert {plot_losses.BLUE, plot_losses.ORANGE} <= colours(out)


def test_axis_counts_epochs_once_there_are_several(log):
    losses, outputs = plot_losses.plot(log, log.with_name("plot.png")).axes
    assert outputs.get_xlabel() == "epoch" and outputs.get_ylim() == (0, 1)
    assert list(losses.lines[0].get_xdata()) == [step / 100 for step in range(20, 401, 20)]
    log.write_text(HEADER + "".join(ROWS[:5]))
    losses, outputs = plot_losses.plot(log, log.with_name("plot.png")).axes
    assert outputs.get_xlabel() == "step"
    assert list(losses.lines[0].get_xdata()) == [20, 40, 60, 80, 100]


def test_growing_log_is_plotted_without_a_display(log):
    log.write_text(HEADER + ROWS[0] + "1,40,1.2")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    process = subprocess.run(
        [sys.executable, ROOT / "plot_losses.py", "--csv", log.name, "--out", "plot.png"],
        cwd=log.parent, env=environment | {"MPLBACKEND": "tkagg"}, capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")
    assert plot_losses.BLUE in colours(log.with_name("plot.png"))


@pytest.mark.parametrize("end", ["1", "5,500", "5,500,1.3,0.7,0.5,0.4", "5,500,1.3,,"])
def test_row_that_is_still_being_written_is_left_out(log, end):
    log.write_text(HEADER + "".join(ROWS) + end)
    read = plot_losses.read_log(log)
    assert list(read["step"]) == list(range(20, 401, 20)) and read["d_fake"][0] == 0.48


@pytest.mark.parametrize("radius", [0, 1, 2, 20])
def test_smoothing_is_the_mean_of_the_neighbours(radius):
    values = numpy.random.default_rng(0).random(9)
    means = [values[max(0, i - radius):i + radius + 1].mean() for i in range(9)]
    assert plot_losses.smooth(values, radius) == pytest.approx(means)


@pytest.mark.parametrize("form, start", [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_type_of_the_picture_follows_its_name(cli, log, form, start):
    out = log.with_name(f"plot.{form}")
    assert cli(plot_losses, "--csv", log, "--out", out)[0] == 0
    assert out.read_bytes().startswith(start)


def test_log_of_a_training_that_diverged_is_plotted(cli, log):
    log.write_text(HEADER + "".join(ROWS) + "5,420,nan,inf,nan,nan\n")
    status, _, err = cli(plot_losses, "--csv", log, "--out", log.with_name("plot.png"))
    assert (status, err) == (0, "")


@pytest.mark.parametrize("content, word", [
    (None, "losses.csv"),
    (b"", "no rows"),
    (HEADER.encode(), "no rows"),
    (b"epoch,step,loss\n1,20,1.3\n", "d_loss"),
    ((HEADER + "Once upon a time, in a loss, far, far, away\n").encode(), "Once upon a time"),
    ((HEADER + ROWS[0] + "1,40,1.3,0.7\n").encode(), "columns"),
    ((HEADER + "1,40,1.3,0.7,0.5,0.5,0.5\n").encode(), "d_loss"),
    ((HEADER + ROWS[0] + "x" * 200_000 + "\n").encode(), "columns"),
    ((HEADER + "x" * 200_000 + "\n").encode(), "xxx"),
    ((HEADER + "\n\n").encode(), "no rows"),
    ("".join([HEADER, *ROWS]).encode("utf-16"), "utf-8"),
    (bytes(range(256)), "utf-8"),
], ids=range(12))
def test_file_that_is_no_loss_log_is_one_line(cli, log, content, word):
    log.unlink()
    if content is not None:
        log.write_bytes(content)
    before = contents(log.parent)
    line = complaint(cli(plot_losses, "--csv", log, "--out", log.with_name("plot.png")))
    assert str(log) in line and word in line and len(line) < 300
    assert contents(log.parent) == before


@pytest.mark.parametrize("options", [["--csv", "."], ["--csv", ""], ["--csv", ".", "--out", ""]])
def test_folder_in_the_place_of_a_log_is_one_line(cli, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    complaint(cli(plot_losses, *options))
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", ["plot", "plot.npy", "losses.csv/plot.png", "folder.png"])
def test_picture_that_cannot_be_written_is_one_line(cli, log, name):
    log.with_name("folder.png").mkdir()
    out = log.parent / name
    assert str(log.parent) in complaint(cli(plot_losses, "--csv", log, "--out", out))
    assert list(contents(log.parent)) == [log]
