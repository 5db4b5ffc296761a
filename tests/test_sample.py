"""Sampling: the same seed gives the same digits, whatever else is generated with them."""
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import DAMAGES, ROOT, blobs, complaint, contents, idx, readme_code
from gan import Generator


def pixels(path):
    with Image.open(path) as picture:
        return numpy.array(picture)


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


@pytest.mark.parametrize("name", ["new/digits.npy", "DIGITS.NPY"])
def test_numpy_file_holds_the_digits_and_can_be_drawn(cli, checkpoint, generator, name):
    status, out, err = cli(sample, "--out", name, "--count", 12, "--seed", 2, "--category", 3,
                           "--checkpoint", checkpoint)
    assert (status, err) == (0, "") and str(checkpoint) in out
    digits = sample.sample_digits(generator, 12, numpy.int64(2), category=numpy.int64(3))
    assert numpy.load(name).dtype == numpy.uint8
    assert numpy.array_equal(numpy.load(name), digits.squeeze(1))
    for images in (torch.from_numpy(numpy.load(name)), digits):
        sample.save_grid(images, "grid.png")
        assert pixels("grid.png").shape == (92, 122)  # three rows of four digits


@pytest.mark.parametrize("count, columns, rows", [
    (1, 1, 1), (2, 2, 1), (7, 3, 3), (100, 10, 10), (101, 11, 10)])
def test_picture_is_a_grid_as_square_as_possible(cli, checkpoint, generator, count, columns, rows):
    assert cli(sample, "--count", count, "--checkpoint", checkpoint)[0] == 0
    picture = pixels("grid.png")
    border = 2
    if count == 1:  # make_grid leaves a single image as it is
        border = 0
    assert picture.shape == ((28 + border) * rows + border, (28 + border) * columns + border)
    top = border + (28 + border) * ((count - 1) // columns)
    left = border + (28 + border) * ((count - 1) % columns)
    last = sample.sample_digits(generator, count)[-1, 0]
    assert numpy.array_equal(picture[top:top + 28, left:left + 28], last)


def test_colour_images_keep_their_colours_in_every_kind_of_file():
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    sample.save_grid(images, "grid.png")
    assert numpy.array_equal(pixels("grid.png")[2:18, 2:18], images[0].permute(1, 2, 0))
    sample.save_array(images, "images.npy")
    assert numpy.array_equal(numpy.load("images.npy"), images.permute(0, 2, 3, 1))
    two = torch.stack([torch.zeros_like(images), images // 255 * 255])  # few colours, as in a GIF
    sample.save_animation([sample.draw_grid(frame) for frame in two], "walk.gif", 50)
    with Image.open("walk.gif") as picture:
        picture.seek(1)
        shown = numpy.array(picture.convert("RGB"))[2:18, 2:18]
    assert numpy.array_equal(shown, two[1, 0].permute(1, 2, 0))


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
    frames = sample.interpolate(generator, 2)
    with Image.open("walk.gif") as picture:
        assert picture.n_frames == sample.FRAMES and picture.info["loop"] == 0
        for number in (0, 1, sample.FRAMES - 1):
            picture.seek(number)
            shown = numpy.array(picture.convert("L"))[2:30, 32:60]
            assert numpy.array_equal(shown, frames[number, 1, 0])


@pytest.mark.parametrize("count, frames", [(1, 1), (100, 100), (101, 51), (201, 67)])
def test_animation_of_a_training_has_at_most_a_hundred_frames_and_the_last_epoch(
        tmp_path, count, frames):
    for epoch in range(count):
        Image.new("L", (4, 4), epoch).save(tmp_path / f"epoch_{epoch:04d}.png")
    sample.save_training_animation(tmp_path, "film.gif")
    with Image.open("film.gif") as picture:
        assert picture.n_frames == frames
        picture.seek(frames - 1)
        assert picture.convert("L").getpixel((0, 0)) == count - 1


def test_shipped_generator_is_taken_until_there_is_a_run_of_ones_own(cli):
    shipped = sample.load_generator()
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and "results/generator.pt" in out and "no out/generator.pt" in out
    expected = sample.sample_digits(shipped, 100).squeeze(1)
    assert numpy.array_equal(numpy.load("digits.npy"), expected)
    own = Generator()
    Path("out").mkdir()
    torch.save({"average": own.state_dict()}, "out/generator.pt")
    status, out, _ = cli(sample, "--out", "digits.npy")
    assert status == 0 and "the generator out/generator.pt\n" in out
    assert numpy.array_equal(numpy.load("digits.npy"), sample.sample_digits(own, 100).squeeze(1))


# The last cell opens a picture for the notebook, which reads and closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
            assert pixels(path).std() > 0


def test_folder_of_pictures_becomes_a_data_set_as_the_readme_says(capsys):
    code, = readme_code("Your own images")
    Path("my-images", "more").mkdir(parents=True)
    Path("my-images", "notes.txt").write_text("no picture")
    with pytest.raises(SystemExit, match="no pictures"):
        exec(code, {})
    large = [Image.fromarray(image.numpy()).resize((56, 56), 0) for image in blobs(6)]
    ink = Image.new("L", (56, 56), 255)
    large[0].convert("RGB").save("my-images/0.png")
    large[1].save("my-images/1.JPEG")
    Image.fromarray(numpy.array(large[2]).astype(numpy.uint16) * 257).save("my-images/2.PNG")
    Image.merge("LA", (ink, large[3])).save("my-images/3.png")
    Image.merge("RGBA", (ink, ink, ink, large[4])).save("my-images/4.png")
    large[5].convert("P").save("my-images/more/5.png")
    exec(code, {})
    difference = train.load_images(Path("my-images.idx")).int() - blobs(6).unsqueeze(1)
    assert difference.abs().float().mean() < 8 and "(6, 28, 28)" in capsys.readouterr().out


@pytest.mark.parametrize("options", [
    "--out grid.jpg", "--out grid", "--count 0", "--count 2.5", "--count 100001", "--seed -1",
    "--out walk.gif --count 401", "--category 10", "--category -1", "--category three",
    f"--seed {2**63}", "--device tpu", "--device cuda:99", "--checkpoint none.pt",
    "--out file/grid.png", "--out folder.png"])
def test_bad_options_are_named_in_one_line_and_nothing_is_written(cli, checkpoint, options):
    Path("file").write_text("a file")
    Path("folder.png").mkdir()
    line = complaint(cli, sample, "--checkpoint", checkpoint, *options.split())
    assert options.split()[-1].partition("/")[0] in line


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoint_that_does_not_fit_is_one_line(cli, checkpoint, how):
    DAMAGES[how](checkpoint, torch.load(checkpoint))
    assert str(checkpoint) in complaint(cli, sample, "--checkpoint", checkpoint)
