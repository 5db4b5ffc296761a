"""Training runs: what they write, how they stop and go on, and what images they read."""
import copy
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageSequence

import train
from conftest import COLUMNS, ROOT, SETTINGS, blobs, contents, equal, idx, real_images
from gan import (Discriminator, Generator, InputError, adversarial_step, generate, make_optimizer,
                 sample_latent, update_average)
from sample import draw_grid

STEPS = 25  # per epoch: 102 images in batches of 4


@pytest.fixture
def again(run, data):
    """Copy the run of two epochs. Return a function that calls train() on the copy."""
    shutil.copytree(run, "copy")
    return lambda **others: train.train(**(
        SETTINGS | {"epochs": 2, "data": data, "out": "copy"} | others))


@pytest.fixture
def command(data):
    """The options of the small run."""
    return f"--epochs 2 --data {data} --device cpu --batch-size 4 --lr 0.002 --seed 3".split()


@pytest.fixture
def at_step(monkeypatch):
    """Call at_step(number, action): after this step, action(generator) is called, once."""
    def set_action(number, action):
        def step_with_action(generator, *others):
            losses = adversarial_step(generator, *others)
            if others[-1] == number:
                monkeypatch.setattr(train, "adversarial_step", adversarial_step)
                action(generator)
            return losses

        monkeypatch.setattr(train, "adversarial_step", step_with_action)

    return set_action


def interrupt(*_):
    raise KeyboardInterrupt


def everything(out):
    """Return all that a run has written, its checkpoint as the values in it."""
    return contents(out) | {Path("checkpoint.pt"): torch.load(Path(out, "checkpoint.pt"))}


def test_command_writes_the_files_of_a_run_and_prints_the_means_of_each_epoch(command, data, run):
    process = subprocess.run([sys.executable, ROOT / "train.py", "--out", "out", *command],
                             capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert set(map(str, contents("out"))) == {
        "checkpoint.pt", "losses.csv", "losses.png", "digits_form.gif", "samples/epoch_0000.png",
        "samples/epoch_0001.png", "samples/epoch_0002.png"}
    assert equal(everything("out"), everything(run))  # whether from the shell or from Python
    log = numpy.genfromtxt("out/losses.csv", delimiter=",", names=True)
    assert list(log.dtype.names) == COLUMNS
    assert [(row["epoch"], row["step"]) for row in log] == [(1, 20), (1, 25), (2, 45), (2, 50)]
    first, *epochs = process.stdout.splitlines()
    assert all(word in first for word in ("cpu", "102 images", data))
    assert [line.partition(" d_loss")[0] for line in epochs] == ["epoch 1/2:", "epoch 2/2:"]


def test_run_equals_its_steps_one_by_one(run):
    torch.manual_seed(3)
    generator, discriminator = Generator(), Discriminator()
    average = copy.deepcopy(generator)
    optimizers = make_optimizer(generator, 0.002), make_optimizer(discriminator, 0.002)
    log, step = [], 0
    for epoch in (1, 2):
        torch.manual_seed(3 + 1_000_000 * epoch)
        for batch in torch.randperm(102)[:4 * STEPS].view(STEPS, 4):
            step += 1
            losses = adversarial_step(
                generator, discriminator, *optimizers, real_images(102)[batch], step)
            update_average(average, generator, step)
            log.append(list(losses.values()))
    checkpoint = torch.load(run / "checkpoint.pt")
    for name, network in (("generator", generator), ("discriminator", discriminator),
                          ("average", average)):
        assert equal(checkpoint[name], network.state_dict())
    assert checkpoint["epoch"] == 2 and checkpoint["log"] == (run / "losses.csv").read_text()
    written = numpy.loadtxt(run / "losses.csv", delimiter=",", skiprows=1)[:, 2:]
    for row, steps in zip(written, (log[:20], log[5:25], log[25:45], log[30:])):
        assert row.tolist() == pytest.approx(torch.tensor(steps).mean(0).tolist(), abs=1e-5)


def test_training_returns_the_average_and_animates_its_pictures(again, run):
    average, checkpoint = again(resume=True), torch.load(run / "checkpoint.pt")
    assert not average.training and equal(average.state_dict(), checkpoint["average"])
    z = sample_latent(64, random=torch.Generator().manual_seed(SETTINGS["seed"]))
    picture = draw_grid(generate(average, z))
    assert numpy.array_equal(Image.open(run / "samples/epoch_0002.png"), picture)
    with Image.open(run / "digits_form.gif") as animation:
        assert animation.n_frames == 3 and animation.info["duration"] == 300
        for epoch, frame in enumerate(ImageSequence.Iterator(animation)):
            picture = Image.open(run / f"samples/epoch_000{epoch}.png")
            assert numpy.array_equal(frame.convert("L"), picture)


def test_ctrl_c_says_how_to_go_on_to_the_same_bits(cli, command, run, at_step):
    at_step(STEPS + 22, interrupt)
    status, _, err = cli(train, *command)
    assert status == 130 and "--resume" in err
    status, out, _ = cli(train, *command, "--resume")
    assert status == 0 and "epoch 1/2" not in out and "epoch 2/2" in out
    assert equal(everything("out"), everything(run))


@pytest.mark.parametrize("killed", ["in a step", "before the file is whole", "before the rename"])
def test_run_that_is_killed_keeps_its_last_epoch_and_one_without_an_epoch_begins_again(
        again, run, at_step, monkeypatch, killed):
    def save_half(_, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    for epochs, out, resume in ((3, "copy", True), (1, "new", False)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if killed == "in a step":
                at_step(STEPS * epochs, interrupt)
            if killed == "before the file is whole":
                patch.setattr(torch, "save", save_half)
            if killed == "before the rename":
                patch.setattr(train.os, "replace", interrupt)
            again(epochs=epochs, out=out, resume=resume)
    assert equal(*(torch.load(f"{out}/checkpoint.pt") for out in ("copy", run)))
    again(epochs=1, out="new")
    again(out="new", resume=True)
    assert equal(everything("new"), everything(run))


def test_run_with_a_complete_epoch_is_never_overwritten(again, complaint, command):
    assert "copy already holds a run; use --resume" in complaint(train, "--out", "copy", *command)
    again(epochs=3, resume=True)
    assert torch.load("copy/checkpoint.pt")["epoch"] == 3


@pytest.mark.parametrize("setting", [
    {"batch_size": 5}, {"lr": 0.001}, {"seed": 1}, {"limit": 50}, {"epochs": 1}, {"data": "other"}])
def test_run_does_not_go_on_with_another_setting(again, setting):
    Path("other").write_bytes(idx(255 - blobs(102)))
    before = contents("copy")
    with pytest.raises(InputError, match="the run in copy has|epochs 1: use 2"):
        again(resume=True, **setting)
    assert contents("copy") == before


def test_training_that_diverges_ends_before_it_is_saved(again, run, at_step):
    at_step(STEPS * 2 + 3, lambda generator: generator.layers[0].weight.data.fill_(torch.nan))
    with pytest.raises(InputError, match="diverged in epoch 3"):
        again(epochs=4, resume=True)
    assert equal(torch.load("copy/checkpoint.pt"), torch.load(run / "checkpoint.pt"))


@pytest.mark.parametrize("options, word", [
    ("--epochs 0", "epochs 0"), ("--epochs one", "'one'"), ("--batch-size 0", "batch_size 0"),
    ("--batch-size 103", "102"), ("--lr 0", "lr 0.0"), ("--lr nan", "lr nan"), ("--lr -1", "lr -1"),
    ("--seed -1", "seed -1"), ("--limit -1", "limit -1"), ("--limit 3", "use 1 to 3"),
    ("--device gpu", "'gpu'"), ("--data nofile", "nofile"), ("--data ..", ".."),
    ("--resume", "out/checkpoint.pt"), ("--epoch-size 3", "--epoch-size")])
def test_bad_options_are_named_in_one_line(complaint, data, options, word):
    options = options if "--data" in options else f"{options} --data {data}"
    assert word in complaint(train, *options.split())


@pytest.mark.parametrize("content", [
    b"", b"text", idx(blobs(5))[:-1], idx(torch.zeros(9)), gzip.compress(idx(blobs(5)))[:-9],
    gzip.compress(b"text")], ids=["empty", "text", "short", "labels", "gzip cut off", "gzip"])
def test_damaged_images_are_named(complaint, content):
    Path("images").write_bytes(content)
    assert "images is damaged, or holds no images" in complaint(train, "--data", "images")


def test_images_are_read_with_and_without_gzip_in_grey_and_in_colour():
    colour = torch.cat([blobs(5), 255 - blobs(5), blobs(5) // 2], dim=1)
    for images, stored in ((blobs(5), blobs(5).squeeze(1)), (colour, colour)):
        for content in (idx(stored), gzip.compress(idx(stored))):
            Path("images").write_bytes(content)
            assert torch.equal(train.load_images("images"), images)
    mnist = train.load_images(train.MNIST)
    assert mnist.shape == (60_000, 1, 28, 28) and mnist.dtype == torch.uint8


def test_mistake_in_an_edit_keeps_its_traceback_and_the_folder_free(cli, command, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="mat1 and mat2"):
        patch.setattr(train, "Generator", lambda: torch.nn.Linear(1, 784))
        cli(train, *command)
    assert cli(train, *command)[0] == 0


def test_importing_runs_nothing():
    code = f"import sys; sys.path.append({str(ROOT)!r}); import gan, train, sample, plot_losses"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not contents(".")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_cuda_trains_and_goes_on(again):
    again(epochs=1, out="out", device="cuda")
    assert next(again(out="out", device="cuda", resume=True).parameters()).is_cuda
