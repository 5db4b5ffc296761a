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
    for number, (column, indifferent) in enumerate(zip(COLUMNS[2:], half)):
        axes = (losses, outputs)[number // 2]
        thin, bold, dotted = axes.lines[number % 2 * 3:][:3]
        for line in (thin, bold):  # so few rows have no neighbours within 1 %
            assert numpy.array_equal(line.get_xdata(), log["step"])
            assert line.get_ydata() == pytest.approx(log[column])
        assert dotted.get_ydata() == pytest.approx([indifferent] * 2) and dotted.is_dashed()
        assert thin.get_color() == bold.get_color() == dotted.get_color()
        assert bold.get_label() == {"d_real": "D(x), real images",
                                    "d_fake": "D(G(z)), fakes"}.get(column, column)
    assert losses.get_ylabel() == "loss" and "D" in outputs.get_ylabel()


def test_bold_curve_is_the_mean_of_the_neighbours_within_one_percent(tmp_path):
    rows = [f"1,{20 * row},{row % 2},1,0.5,0.5" for row in range(200)]
    (tmp_path / "log.csv").write_text(HEADER + "\n".join(rows))
    bold = plot(tmp_path / "log.csv", "losses.png").axes[0].lines[1].get_ydata()
    assert len(bold) == 200
    assert bold[0] == pytest.approx(1 / 3) and bold[10] == pytest.approx(2 / 5)


def test_single_row_is_visible(tmp_path):
    (tmp_path / "log.csv").write_text(HEADER + "1,20,1.3,0.7,0.5,0.5\n")
    assert plot(tmp_path / "log.csv", "losses.png").axes[0].lines[1].get_marker() == "."


def test_command_puts_the_plot_beside_the_log_or_where_it_is_told(cli, tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "losses.csv").write_text(HEADER + "1,20,1,1,0.5,0.5\n2,40,1,1,0.5,0.5\n")
    status, printed, err = cli(plot_losses, "--csv", folder / "losses.csv")
    assert (status, err) == (0, "") and str(folder / "losses.png") in printed
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert cli(plot_losses, "--csv", folder / "losses.csv", "--out", "plot.svg")[0] == 0


@pytest.mark.filterwarnings("ignore:genfromtxt")
@pytest.mark.parametrize("log", [
    "", "some text", "epoch,step,d_loss\n1,20,1\n", HEADER + "1,20,1,1,0.5,0.5\n1,40,1"])
def test_file_that_is_no_loss_log_is_named(complaint, tmp_path, log):
    (tmp_path / "log.csv").write_text(log)
    assert "log.csv was not plotted" in complaint(plot_losses, "--csv", tmp_path / "log.csv")


def test_missing_log_and_unknown_kinds_of_picture_are_named(complaint, tmp_path):
    assert "nothing.csv" in complaint(plot_losses, "--csv", "nothing.csv")
    (tmp_path / "log.csv").write_text(HEADER + "1,20,1,1,0.5,0.5\n")
    assert "'xyz'" in complaint(plot_losses, "--csv", tmp_path / "log.csv", "--out", "plot.xyz")
