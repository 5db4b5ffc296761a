"""Drawing digits with a trained generator, and the files that they are written to."""
import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import sample
from conftest import DAMAGES, equal
from gan import N_CATEGORIES, NOISE_DIM, Generator, InputError, generate
from sample import draw_grid, draw_latents, interpolate, load_generator, sample_digits


@pytest.fixture(scope="session")
def generator(run):
    return load_generator(run / "checkpoint.pt")


@pytest.fixture
def out(run):
    """Copy the small run to out/, where sample.py looks for a checkpoint."""
    shutil.copytree(run, "out")


def test_generator_is_the_average_of_a_run_and_draws_the_same_digits_for_the_same_seed(run):
    generator = load_generator(run / "checkpoint.pt")
    assert equal(generator.state_dict(), torch.load(run / "checkpoint.pt")["average"])
    assert not generator.training
    digits = sample_digits(generator, 30, seed=1)
    assert digits.shape == (30, 1, 28, 28) and digits.dtype == torch.uint8
    assert torch.equal(digits, generate(generator, draw_latents(30, seed=1)))
    others = [sample_digits(generator, 30, seed=2), sample_digits(generator, 30, 1, category=3)]
    assert not any(torch.equal(digits, other) for other in others)
    assert len(sample_digits(generator, 2001)) == 2001


def test_interpolation_is_a_closed_smooth_curve_of_noise_of_normal_length(monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda _, z: z)
    z = interpolate(None, 200, seed=4, category=3)
    category, noise = z.split([N_CATEGORIES, NOISE_DIM], dim=2)
    assert len(z) == 60 and torch.equal(z[0], draw_latents(200, seed=4, category=3))
    assert (category == category[0]).all() and ((noise.std((1, 2)) - 1).abs() < 0.03).all()
    distances = (noise - noise.roll(1, 0)).norm(dim=2).mean(1)  # also from the last to the first
    assert (distances / distances.mean() - 1).abs().max() < 0.01 < distances.min()


def test_command_writes_a_picture_an_array_or_an_animation(out, cli, generator):
    digits = sample_digits(generator, 9, seed=5)
    for name in ("grid.png", "digits.npy", "walk.gif"):
        status, printed, err = cli(sample, "--out", name, "--count", 9, "--seed", 5)
        assert (status, err) == (0, "") and name in printed and "out/checkpoint.pt" in printed
    assert numpy.array_equal(Image.open("grid.png"), draw_grid(digits))
    assert numpy.array_equal(numpy.load("digits.npy"), digits.squeeze(1))
    assert numpy.array_equal(numpy.array(draw_grid(digits))[2:30, 32:60], digits[1, 0])
    with Image.open("walk.gif") as walk:
        assert walk.info["loop"] == 0 and walk.info["duration"] == 50 and walk.n_frames > 30
        assert numpy.array_equal(walk.convert("L"), draw_grid(digits))
    cli(sample, "--out", "four.npy", "--count", 9, "--seed", 5, "--category", 4)
    assert numpy.array_equal(numpy.load("four.npy"), sample_digits(generator, 9, 5, 4).squeeze(1))


def test_shipped_generator_draws_white_strokes_on_black_without_a_run(cli):
    status, printed, _ = cli(sample)
    assert status == 0 and "generator.pt" in printed and "100 digits" in printed
    assert Image.open("grid.png").size == (302, 302)
    digits = sample_digits(load_generator(), 200) / 255
    assert 0.09 < digits.mean() < 0.17  # MNIST has 0.13
    assert digits[:, :, :3].mean() < 0.02 < 0.9 < digits.amax((1, 2, 3)).min()
    assert torch.cdist(digits.flatten(1), digits.flatten(1)).fill_diagonal_(math.inf).min() > 1


def test_checkpoint_of_another_network_is_named_with_the_layer_and_both_shapes(out, monkeypatch):
    edited = Generator()
    edited.layers[0] = torch.nn.Linear(1, 2)
    monkeypatch.setattr(sample, "Generator", lambda: edited)
    with pytest.raises(InputError, match=r"(?s)out/checkpoint.pt.*layers.0.weight.*\[2, 1\]"):
        load_generator("out/checkpoint.pt")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named(complaint, run, damage):
    path = Path(shutil.copy(run / "checkpoint.pt", "mine.pt"))
    DAMAGES[damage](path, torch.load(path))
    assert "mine.pt is no checkpoint" in complaint(sample, "--checkpoint", "mine.pt")


@pytest.mark.parametrize("options, word", [
    ("--count 0", "--count"), ("--count many", "'many'"), ("--seed -1", "--seed"),
    ("--seed 4294967296", "--seed"), ("--category 10", "10"), ("--category -1", "-1"),
    ("--out grid.xyz", ".xyz"), ("--out nowhere/grid.png", "nowhere")])
def test_bad_options_are_named(complaint, options, word):
    assert word in complaint(sample, *options.split())
