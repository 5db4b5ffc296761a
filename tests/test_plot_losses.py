"""Drawing the loss log, also of a run that goes on, and refusing what is no loss log."""
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
def test_log_of_any_length_is_drawn_in_two_colours(cli, log, rows):
    log.write_text(HEADER + "".join(ROWS[:rows]))
    out = log.with_name("new") / "plot.png"
    assert cli(plot_losses, "--csv", log, "--out", out) == (0, f"{out}: the losses of {log}\n", "")
    assert len({plot_losses.BLUE, plot_losses.ORANGE} & colours(out)) == 2


def test_growing_log_is_drawn_without_a_display(log):
    log.write_text(HEADER + ROWS[0] + "1,40,1.2")
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run([sys.executable, ROOT / "plot_losses.py", "--csv", log.name, "--out", "plot.png"],
                          cwd=log.parent, env=environment | {"MPLBACKEND": "tkagg"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert plot_losses.BLUE in colours(log.with_name("plot.png"))


@pytest.mark.parametrize("end", ["1", "5,500", "5,500,1.3,0.7,0.5,0.4", "5,500,1.3,,"])
def test_half_written_last_line_is_skipped(log, end):
    complete = plot_losses.read_log(log)
    assert complete["step"] == tuple(range(20, 401, 20)) and complete["d_fake"][0] == 0.48
    log.write_text(HEADER + "".join(ROWS) + end)
    assert plot_losses.read_log(log) == complete


def test_smoothing_is_the_mean_of_the_neighbours_and_keeps_the_length():
    assert plot_losses.smooth([1, 2, 6, 3], 1) == [1, 2, 6, 3]
    assert plot_losses.smooth([1, 2, 6, 3], 3) == [1.5, 3, 11 / 3, 4.5]


@pytest.mark.parametrize("form, start", [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_type_of_the_picture_follows_its_name(cli, log, form, start):
    assert cli(plot_losses, "--csv", log, "--out", log.with_name(f"plot.{form}"))[0] == 0
    assert log.with_name(f"plot.{form}").read_bytes().startswith(start)


def test_log_that_ends_in_losses_which_are_not_finite_is_drawn(cli, log):
    log.write_text(HEADER + "".join(ROWS) + "5,420,nan,inf,nan,nan\n")
    status, _, err = cli(plot_losses, "--csv", log, "--out", log.with_name("plot.png"))
    assert (status, err) == (0, "") and plot_losses.BLUE in colours(log.with_name("plot.png"))


@pytest.mark.parametrize("text, word", [
    (None, "losses.csv"),
    ("", "first line"),
    ("\n", "first line"),
    (HEADER, "no rows"),
    (HEADER + "1,20,1.3", "no rows"),
    ("epoch,step,loss\n1,20,1.3\n", "first line"),
    ("Once upon a time\nthere was a loss.\n", "first line"),
    (HEADER + "Once upon a time, in a loss, far, far, away\n", "line 2"),
    (HEADER + ROWS[0] + "1,40,1.3,0.7\n", "line 3"),
    (HEADER + ROWS[0] + "1,40,1.3,0.7,0.5,0.5,0.5\n", "line 3"),
    (HEADER + ROWS[0] + "\n" + ROWS[1], "line 3"),
    (HEADER + ROWS[0] + "x" * 200_000 + "\n", "line 3"),
    (HEADER + '1,20,"1.3,0.7,0.5,0.5\n', "line 2"),
    (HEADER + "0,0,1.3,0.7,0.5,0.5\n1,0,1.3,0.7,0.5,0.5\n", "line 2"),
    (HEADER + "nan,20,1.3,0.7,0.5,0.5\n", "line 2"),
    (bytes(range(256)), "text"),
], ids=range(16))
def test_file_that_is_no_loss_log_is_one_line(cli, log, text, word):
    log.unlink()
    if text is not None:
        log.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(log.parent)
    line = complaint(*cli(plot_losses, "--csv", log, "--out", log.with_name("plot.png")))
    assert str(log) in line and word in line and len(line) < 300
    assert contents(log.parent) == before


@pytest.mark.parametrize("name", ["plot", "plot.npy", "plot.", "losses.csv/plot.png", "folder.png"])
def test_out_that_cannot_be_written_is_one_line(cli, log, name):
    log.with_name("folder.png").mkdir()
    assert log.parent.name in complaint(*cli(plot_losses, "--csv", log, "--out", log.parent / name))
    assert list(contents(log.parent)) == [log]


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    def write_half(file):
        file.write(b"new, but ")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    path = tmp_path / "file"
    plot_losses.write_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(KeyboardInterrupt):
        plot_losses.write_whole(path, write_half)
    assert contents(tmp_path) == {path: b"old"}
