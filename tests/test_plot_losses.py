"""The plot of the loss log."""
import math

import numpy
import pytest

import plot_losses
from conftest import COLUMNS
from plot_losses import plot

HEADER = ",".join(COLUMNS) + "\n"


def test_plot_shows_each_column_and_its_value_for_a_discriminator_that_always_outputs_one_half(run):
    log = numpy.genfromtxt(run / "losses.csv", delimiter=",", names=True)
    losses, outputs = plot(run / "losses.csv", "losses.png").axes
    half = 2 * math.log(2), math.log(2), 0.5, 0.5
    labels = "d_loss", "g_loss", "D(x), real images", "D(G(z)), fakes"
    for number, (column, label, indifferent) in enumerate(zip(COLUMNS[2:], labels, half)):
        thin, bold, dotted = (losses, outputs)[number // 2].lines[number % 2 * 3:][:3]
        for line in (thin, bold):  # so few rows have no neighbours within 1 %
            assert numpy.array_equal(line.get_xdata(), log["step"])
            assert line.get_ydata() == pytest.approx(log[column])
        assert dotted.get_ydata() == pytest.approx([indifferent] * 2) and dotted.is_dashed()
        assert thin.get_color() == bold.get_color() == dotted.get_color()
        assert bold.get_label() == label
    assert losses.lines[0].get_color() != losses.lines[3].get_color() and losses.get_legend()


def test_bold_curve_is_the_mean_of_the_neighbours_and_a_single_row_is_a_dot(tmp_path):
    rows = [f"1,{20 * row},{row % 2},1,0.5,0.5\n" for row in range(200)]
    for count, ends in ((200, [1 / 3, 2 / 5]), (1, [0])):
        (tmp_path / "log.csv").write_text(HEADER + "".join(rows[:count]))
        bold = plot(tmp_path / "log.csv", "losses.png").axes[0].lines[1]
        assert bold.get_ydata()[[0, 10][:len(ends)]] == pytest.approx(ends)
        assert (bold.get_marker() == ".") == (count == 1)


def test_command_puts_the_plot_beside_the_log_or_where_it_is_told(cli, tmp_path):
    (tmp_path / "losses.csv").write_text(HEADER + "1,20,1,1,0.5,0.5\n2,40,1,1,0.5,0.5\n")
    status, printed, err = cli(plot_losses, "--csv", tmp_path / "losses.csv")
    assert (status, err) == (0, "") and str(tmp_path / "losses.png") in printed
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert cli(plot_losses, "--csv", tmp_path / "losses.csv", "--out", "plot.svg")[0] == 0


@pytest.mark.filterwarnings("ignore:genfromtxt")
@pytest.mark.parametrize("log, options, words", [
    ("", [], "log.csv"), ("some text", [], "log.csv"), ("epoch,step,d_loss\n1,2,1\n", [], "g_loss"),
    (HEADER + "1,20,1,1,0.5,0.5\n1,40,1", [], "log.csv"),
    (HEADER + "1,20,1,1,.5,.5\n", ["--out", "plot.xyz"], "'xyz'"), ("", ["--csv", "none"], "none")])
def test_file_that_is_no_loss_log_or_no_picture_is_named(complaint, tmp_path, log, options, words):
    (tmp_path / "log.csv").write_text(log)
    assert words in complaint(plot_losses, "--csv", tmp_path / "log.csv", *options)
