"""Drawing digits: the same seed gives the same digits, whatever else is drawn with them."""
import copy
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT, complaint, contents, without_cuda, without_mps
from gan import Generator


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_importing_the_modules_runs_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import gan, plot_losses, sample, train"], capture_output=True,
                          cwd=tmp_path / "here", env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr, contents(tmp_path)) == (0, b"", b"", {})


def test_same_seed_same_digits_and_another_seed_others(generator):
    first, again, other = (sample.generate(generator, 5, seed) for seed in (3, 3, 4))
    assert first.dtype == torch.uint8 and first.shape == (5, 28, 28)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_digit_does_not_depend_on_how_many_are_drawn_with_it(generator, count):
    assert torch.equal(sample.generate(generator, count), sample.generate(generator, 250)[:count])


@pytest.mark.parametrize("training", [True, False])
def test_sampling_changes_neither_the_generator_nor_the_randomness_of_others(generator, training):
    weights, randomness = copy.deepcopy(generator.state_dict()), torch.get_rng_state()
    generator.train(training)
    sample.generate(generator, 3)
    assert all(layer.training == training for layer in generator.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in generator.state_dict().items())
    assert torch.equal(torch.get_rng_state(), randomness)


def test_digits_are_the_generators_images_with_the_statistics_of_its_training(generator):
    z = torch.randn(100, 64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        pixels = (generator.eval()(z).squeeze(1) + 1) / 2 * 255
    assert (sample.generate(generator, 100, seed=7) - pixels).abs().max() < 0.51


def test_numpy_file_holds_the_digits_themselves(cli, trained, generator):
    status, out, err = cli(sample, "--out", "new/digits.npy", "--count", 12, "--seed", 2, "--checkpoint", trained)
    digits = numpy.load("new/digits.npy")
    assert status == 0 and err == "" and str(trained) in out and out.count("\n") == 1
    assert digits.dtype == numpy.uint8
    assert numpy.array_equal(digits, sample.generate(generator, 12, 2).numpy())


@pytest.mark.parametrize("count, columns, rows", [(2, 2, 1), (7, 3, 3), (100, 10, 10), (101, 11, 10)])
def test_picture_is_a_grid_as_near_to_a_square_as_can_be(cli, trained, generator, count, columns, rows):
    assert cli(sample, "--out", "grid.png", "--count", count, "--checkpoint", trained)[0] == 0
    picture = Image.open("grid.png")
    assert picture.size == (30 * columns + 2, 30 * rows + 2) and picture.mode == "L"
    last = numpy.array(picture)[30 * ((count - 1) // columns) + 2:, 30 * ((count - 1) % columns) + 2:][:28, :28]
    assert numpy.array_equal(last, sample.generate(generator, count)[-1].numpy())


def test_grid_of_one_digit_shows_it(cli, trained):
    assert cli(sample, "--out", "one.PNG", "--count", 1, "--checkpoint", trained)[0] == 0
    assert numpy.array(Image.open("one.PNG")).std() > 0


def test_walk_goes_smoothly_round_and_comes_back(generator):
    frames = sample.walk(generator, 3, seed=5)
    assert frames.shape == (sample.FRAMES, 3, 28, 28) and frames.dtype == torch.uint8
    assert torch.equal(frames[0], sample.generate(generator, 3, seed=5))
    steps = (frames.float() - frames.roll(1, 0).float()).square().mean((2, 3)).sqrt()  # the first: from the last frame
    half = (frames.float() - frames.roll(sample.FRAMES // 2, 0).float()).square().mean((2, 3)).sqrt()
    assert (steps > 0).all() and steps.max() < half.max() / 3


def test_animation_shows_the_walk_for_ever(cli, trained, generator):
    assert cli(sample, "--out", "walk.gif", "--count", 2, "--checkpoint", trained)[0] == 0
    picture, frames = Image.open("walk.gif"), sample.walk(generator, 2)
    assert picture.n_frames == sample.FRAMES and picture.info["loop"] == 0
    for number in (0, 1, sample.FRAMES - 1):
        picture.seek(number)
        assert numpy.array_equal(numpy.array(picture.convert("L"))[2:30, 32:60], frames[number, 1].numpy())


def test_own_run_is_taken_by_default_and_before_there_is_one_the_shipped_generator(cli, trained, monkeypatch):
    monkeypatch.setattr(sample, "SHIPPED", trained.with_name("none.pt"))
    assert "none.pt" in complaint(*cli(sample, "--out", "digits.npy"))
    monkeypatch.setattr(sample, "SHIPPED", trained)
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and str(trained) in out and numpy.load("digits.npy").shape == (100, 28, 28)
    own = Generator()
    Path("out").mkdir()
    torch.save({"settings": {"latent_dim": 64}, "average": own.state_dict()}, "out/checkpoint.pt")
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and "out/checkpoint.pt" in out
    assert numpy.array_equal(numpy.load("digits.npy"), sample.generate(own, 100).numpy())


def test_size_of_the_noise_comes_from_the_checkpoint(cli, tmp_path):
    torch.save({"settings": {"latent_dim": 15}, "average": Generator(15).state_dict()}, tmp_path / "small.pt")
    assert cli(sample, "--out", "grid.png", "--checkpoint", tmp_path / "small.pt")[0] == 0


@pytest.mark.parametrize("options, word", [
    ("--out grid.jpg", "grid.jpg"),
    ("--out grid", ".npy"),
    ("--out .png", ".npy"),
    ("--count 0", "--count"),
    ("--count -5", "--count"),
    ("--count 2.5", "2.5"),
    ("--count 100001", "100000"),
    ("--out walk.gif --count 401", "400"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--device tpu", "tpu"),
    ("--device cuda:", "cuda:"),
    pytest.param("--device cuda", "--device cpu", marks=without_cuda),
    pytest.param("--device mps", "--device cpu", marks=without_mps),
    ("--checkpoint none.pt", "none.pt"),
    ("--out file/grid.png", "file"),
    ("--out folder.png", "folder.png"),
])
def test_bad_options_are_one_line_and_write_nothing(cli, trained, tmp_path, options, word):
    (tmp_path / "here" / "file").write_text("a file")
    (tmp_path / "here" / "folder.png").mkdir()
    before = contents(tmp_path)
    assert word in complaint(*cli(sample, "--out", "grid.png", "--checkpoint", trained, *options.split()))
    assert contents(tmp_path) == before


def test_device_is_taken_if_it_is_there(monkeypatch):
    assert sample.pick_device("cpu") == torch.device("cpu")
    found = {"cuda", "cuda:0", "cuda:1", "mps", "cpu"}

    def zeros(count, device):
        if device not in found:
            raise RuntimeError("invalid device ordinal")
        return torch.tensor([0.0])

    monkeypatch.setattr(sample.torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in found)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in found)
    assert sample.pick_device("auto") == sample.pick_device("cuda") == torch.device("cuda")
    assert sample.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:2"):
        sample.pick_device("cuda:2")
    found -= {"cuda", "cuda:0", "cuda:1"}
    assert sample.pick_device("auto") == sample.pick_device("mps") == torch.device("mps")
    found.remove("mps")
    assert sample.pick_device("auto") == torch.device("cpu")


def test_broken_checkpoint_is_one_line(cli, broken):
    assert str(broken) in complaint(*cli(sample, "--out", "grid.png", "--checkpoint", broken))
    assert not contents(".")
