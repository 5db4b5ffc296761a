"""Drawing digits with a trained generator, and the files that they are written to."""
import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import sample
from conftest import DAMAGES, blobs, equal
from gan import N_CATEGORIES, Generator, InputError, generate
from sample import draw_grid, draw_latents, interpolate, load_generator, sample_digits


@pytest.fixture(scope="session")
def generator(run):
    return load_generator(run / "checkpoint.pt")


@pytest.fixture
def out(run):
    """Copy the small run to out/, where sample.py looks for a checkpoint."""
    shutil.copytree(run, "out")


def read(path):
    with Image.open(path) as picture:
        return numpy.array(picture)


def test_loaded_generator_is_the_average_of_the_run_in_evaluation_mode(generator, run):
    assert equal(generator.state_dict(), torch.load(run / "checkpoint.pt")["average"])
    assert not generator.training


def test_same_seed_draws_the_same_digits_and_another_seed_or_category_others(generator):
    digits = sample_digits(generator, 30, seed=1)
    assert digits.shape == (30, 1, 28, 28) and digits.dtype == torch.uint8
    assert torch.equal(digits, sample_digits(generator, 30, seed=1))
    others = [sample_digits(generator, 30, seed=2), sample_digits(generator, 30, 1, category=3)]
    assert not any(torch.equal(digits, other) for other in others)
    assert torch.equal(digits, generate(generator, draw_latents(30, seed=1)))
    assert len(sample_digits(generator, 2001)) == 2001


def test_interpolation_is_a_closed_smooth_curve_of_noise_of_normal_length(monkeypatch, generator):
    latents = []
    monkeypatch.setattr(
        sample, "generate", lambda _, z: latents.append(z) or generate(generator, z))
    frames = interpolate(generator, 200, seed=4)
    z = torch.stack(latents)
    assert frames.shape == (60, 200, 1, 28, 28)
    assert torch.equal(frames[0], sample_digits(generator, 200, seed=4))
    category, noise = z[:, :, :N_CATEGORIES], z[:, :, N_CATEGORIES:]
    assert (category == category[0]).all()
    assert ((noise.std((1, 2)) - 1).abs() < 0.03).all()
    distances = (noise - noise.roll(1, 0)).norm(dim=2).mean(1)  # also from the last to the first
    assert (distances / distances.mean() - 1).abs().max() < 0.01 < distances.min()


def test_grid_shows_the_images_row_by_row():
    images = blobs(5)
    grid = numpy.array(draw_grid(images))
    assert grid.shape == (2 * 30 + 2, 3 * 30 + 2)
    for number, image in enumerate(images):
        top, left = 2 + 30 * (number // 3), 2 + 30 * (number % 3)
        assert numpy.array_equal(grid[top:top + 28, left:left + 28], image[0])
    colour = torch.cat([images, 255 - images, images // 2], dim=1)
    assert numpy.array_equal(numpy.array(draw_grid(colour))[2:30, 2:30], colour[0].permute(1, 2, 0))


def test_command_writes_a_picture_an_array_or_an_animation(out, cli, generator):
    digits = sample_digits(generator, 9, seed=5)
    for name in ("grid.png", "digits.npy", "walk.gif"):
        status, printed, err = cli(sample, "--out", name, "--count", 9, "--seed", 5)
        assert (status, err) == (0, "") and name in printed and "out/checkpoint.pt" in printed
    assert numpy.array_equal(read("grid.png"), draw_grid(digits))
    assert numpy.array_equal(numpy.load("digits.npy"), digits.squeeze(1))
    with Image.open("walk.gif") as walk:
        assert walk.info["loop"] == 0 and walk.info["duration"] == 50
        assert numpy.array_equal(walk.convert("L"), draw_grid(digits))
    cli(sample, "--out", "four.npy", "--count", 9, "--seed", 5, "--category", 4)
    assert numpy.array_equal(numpy.load("four.npy"), sample_digits(generator, 9, 5, 4).squeeze(1))


def test_shipped_generator_draws_white_strokes_on_black_without_a_run(cli):
    status, printed, _ = cli(sample)
    assert status == 0 and "generator.pt" in printed and "100 digits" in printed
    assert read("grid.png").shape == (302, 302)
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
