"""Sampling: the same seed gives the same digits, whatever else is generated with them."""
import copy
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import benchmark
import sample
import train
from conftest import DAMAGES, ROOT, blobs, complaint, contents, damage, idx, readme_code
from gan import N_CATEGORIES, Generator, generate, sample_latent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_importing_runs_nothing(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", "import gan, plot_losses, sample, train"], capture_output=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")
    assert not contents(tmp_path)


def test_same_seed_gives_the_same_digits_and_another_seed_others(generator):
    first, again, other = (sample.sample_digits(generator, 5, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_digit_does_not_depend_on_how_many_are_generated(generator, count):
    many = sample.sample_digits(generator, 250)
    assert torch.equal(sample.sample_digits(generator, count), many[:count])


def test_category_is_the_same_for_all_digits_and_their_noise_is_as_without_it(generator):
    z = sample.draw_latents(7, seed=3)
    one = sample.draw_latents(7, seed=3, category=4)
    assert torch.equal(one[:, N_CATEGORIES:], z[:, N_CATEGORIES:])
    assert (one[:, :N_CATEGORIES].argmax(dim=1) == 4).all()
    same = z[:, 4] > 0  # these digits have the category 4 anyway
    assert torch.equal(one[same], z[same]) and 0 < same.sum() < len(z)
    assert torch.equal(sample.sample_digits(generator, 7, 3, category=4),
                       generate(generator, one)[:7])


@pytest.mark.parametrize("name", ["grid.png", "walk.gif", "digits.npy"])
def test_category_works_for_every_kind_of_output(cli, checkpoint, name):
    options = ["--count", 3, "--checkpoint", checkpoint, "--out", name]
    pictures = []
    for category in (0, 9):
        assert cli(sample, *options, "--category", category)[0] == 0
        pictures.append(Path(name).read_bytes())
    assert pictures[0] != pictures[1]


def test_bare_command_draws_grid_png(cli):
    assert cli(sample)[0] == 0
    assert list(contents(".")) == [Path("grid.png")]


def test_loaded_generator_is_ready_to_use_and_using_it_changes_nothing(checkpoint):
    network = sample.load_generator(checkpoint)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        network(sample_latent(9))
    assert not network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_running_a_script_in_a_session_leaves_ctrl_c_alone(monkeypatch, checkpoint, data):
    handler = signal.getsignal(signal.SIGINT)
    for command in (f"sample.py --checkpoint {checkpoint}",
                    f"train.py --epochs 1 --batch-size 51 --device cpu --data {data}",
                    "plot_losses.py"):
        script, *options = command.split()
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert signal.getsignal(signal.SIGINT) is handler


def test_benchmark_looks_at_the_files_before_it_trains_a_classifier(cli):
    assert "nofile.pt" in complaint(cli(benchmark, "quality", "nofile.pt"))


def test_numpy_file_holds_the_digits(cli, checkpoint, generator):
    for name in ("new/digits.npy", "DIGITS.NPY"):
        status, out, err = cli(sample, "--out", name, "--count", 12, "--seed", 2,
                               "--checkpoint", checkpoint)
        assert (status, err) == (0, "") and str(checkpoint) in out
        digits = numpy.load(name)
        assert digits.dtype == numpy.uint8
        assert numpy.array_equal(digits, sample.sample_digits(generator, 12, 2).squeeze(1))


@pytest.mark.parametrize("count, columns, rows", [
    (1, 1, 1), (2, 2, 1), (7, 3, 3), (100, 10, 10), (101, 11, 10)])
def test_picture_is_a_grid_as_square_as_possible(cli, checkpoint, generator, count, columns, rows):
    assert cli(sample, "--out", "grid.png", "--count", count, "--checkpoint", checkpoint)[0] == 0
    picture = numpy.array(Image.open("grid.png").convert("L"))
    border = 2
    if count == 1:  # make_grid leaves a single image as it is
        border = 0
    assert picture.shape == ((28 + border) * rows + border, (28 + border) * columns + border)
    top = border + (28 + border) * ((count - 1) // columns)
    left = border + (28 + border) * ((count - 1) % columns)
    last = sample.sample_digits(generator, count)[-1, 0]
    assert numpy.array_equal(picture[top:top + 28, left:left + 28], last)


def test_interpolation_changes_the_noise_smoothly_and_comes_back(generator):
    frames = sample.interpolate(generator, 3, seed=5).float()
    assert (frames[0] - sample.sample_digits(generator, 3, seed=5)).abs().max() <= 1
    assert frames.shape == (sample.FRAMES, 3, 1, 28, 28)

    def change(distance):
        return (frames - frames.roll(distance, dims=0)).square().mean((2, 3, 4)).sqrt()

    assert (change(1) > 0).all()  # the first frame is compared with the last one
    assert change(1).max() < change(sample.FRAMES // 2).max() / 3


def test_animation_shows_the_interpolation_for_ever(cli, checkpoint, generator):
    assert cli(sample, "--out", "walk.gif", "--count", 2, "--checkpoint", checkpoint)[0] == 0
    picture = Image.open("walk.gif")
    frames = sample.interpolate(generator, 2)
    assert picture.n_frames == sample.FRAMES and picture.info["loop"] == 0
    for number in (0, 1, sample.FRAMES - 1):
        picture.seek(number)
        pixels = numpy.array(picture.convert("L"))
        assert numpy.array_equal(pixels[2:30, 32:60], frames[number, 1, 0])


def test_shipped_generator_is_taken_until_there_is_a_run_of_ones_own(cli):
    shipped = sample.load_generator()
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and "results/generator.pt" in out
    expected = sample.sample_digits(shipped, 100).squeeze(1)
    assert numpy.array_equal(numpy.load("digits.npy"), expected)
    own = Generator()
    Path("out").mkdir()
    torch.save({"average": own.state_dict()}, "out/generator.pt")
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and "out/generator.pt" in out
    assert numpy.array_equal(numpy.load("digits.npy"), sample.sample_digits(own, 100).squeeze(1))


def test_cells_of_the_readme_run_in_a_notebook(monkeypatch, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(blobs(130)))  # in place of MNIST
    monkeypatch.setattr(train, "SHIPPED_DATA", tmp_path)
    cells = readme_code("In a notebook")
    assert len(cells) >= 3
    names = {}
    for cell in cells:
        exec(re.sub(r"^%.*$", "", cell, flags=re.MULTILINE), names)
    for path in contents("."):
        if path.suffix == ".png":
            assert numpy.array(Image.open(path)).std() > 0


@pytest.mark.parametrize("options", [
    "--out grid.jpg", "--out grid", "--count 0", "--count 2.5", "--count 100001", "--seed -1",
    "--out walk.gif --count 401", "--category 10", "--category -1", "--category three",
    f"--seed {2**63}", "--device tpu", "--device cuda:99", "--checkpoint none.pt",
    "--out file/grid.png", "--out folder.png"])
def test_bad_options_are_named_in_one_line_and_nothing_is_written(
        cli, checkpoint, tmp_path, options):
    Path("file").write_text("a file")
    Path("folder.png").mkdir()
    before = contents(tmp_path)
    line = complaint(cli(sample, "--checkpoint", checkpoint, *options.split()))
    assert options.split()[-1].partition("/")[0] in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoint_that_does_not_fit_is_one_line(cli, checkpoint, how):
    damage(checkpoint, how)
    line = complaint(cli(sample, "--out", "grid.png", "--checkpoint", checkpoint))
    assert str(checkpoint) in line and not contents(".")
