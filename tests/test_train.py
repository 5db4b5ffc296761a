"""Training runs: what they write, how they stop and continue, and what data they read."""
import gzip
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import train
from conftest import DAMAGES, ROOT, blobs, complaint, contents, equal, idx
from gan import Discriminator, Generator, InputError, from_pixels
from plot_losses import read_log

STEPS = 25  # per epoch: 102 images in batches of 4
SMALL = ["--batch-size", "4", "--device", "cpu"]
COLUMNS = ["epoch", "step", "d_loss", "g_loss", "d_real", "d_fake"]


@pytest.fixture(scope="session")
def straight(tmp_path_factory, data):
    """A run of three epochs that is never stopped, and what it printed. No test may change it."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    command = [sys.executable, ROOT / "train.py", "--epochs", "3", "--data", data, "--out", out]
    return out, subprocess.run(command + SMALL, capture_output=True, text=True)


@pytest.fixture(scope="session")
def one_epoch(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("runs") / "short"
    train.train(epochs=1, device="cpu", batch_size=4, data=data, out=out)
    return out


@pytest.fixture
def short(one_epoch):
    """A run of one epoch, which the test may change."""
    return Path(shutil.copytree(one_epoch, "short"))


@pytest.fixture
def at_step(monkeypatch):
    """Call at_step(number, action): after this step, action(generator) is called, once."""
    original = train.adversarial_step

    def set_action(number, action):
        def adversarial_step(generator, *others):
            losses = original(generator, *others)
            if others[-1] == number:
                monkeypatch.setattr(train, "adversarial_step", original)
                action(generator)
            return losses

        monkeypatch.setattr(train, "adversarial_step", adversarial_step)

    return set_action


def fail(error):
    def function(*_):
        raise error

    return function


def assert_same_run(out, expected):
    assert (out / "losses.csv").read_bytes() == (expected / "losses.csv").read_bytes()
    for picture in out.glob("samples/*"):
        assert picture.read_bytes() == (expected / "samples" / picture.name).read_bytes()
    assert equal(torch.load(out / "generator.pt"), torch.load(expected / "generator.pt"))
    checkpoints = torch.load(out / "checkpoint.pt"), torch.load(expected / "checkpoint.pt")
    for checkpoint in checkpoints:
        del checkpoint["settings"]["data"]
    assert equal(*checkpoints)


def test_run_writes_its_files_and_prints_the_means_of_each_epoch(straight):
    out, process = straight
    assert (process.returncode, process.stderr) == (0, "")
    assert {str(path.relative_to(out)) for path in contents(out)} == {
        "checkpoint.pt", "generator.pt", "losses.csv", "losses.png", "digits_form.gif",
        *(str(Path("samples", f"epoch_000{epoch}.png")) for epoch in range(4))}
    log = read_log(out / "losses.csv")
    assert list(log) == COLUMNS
    assert list(zip(log["epoch"], log["step"])) == [
        (1, 20), (1, 25), (2, 45), (2, 50), (3, 70), (3, 75)]
    first, *epochs, last = process.stdout.splitlines()
    assert all(word in first for word in ("cpu", "238,529", "205,713", "3 epochs of 25 steps"))
    assert len(epochs) == 3 and "sample.py --checkpoint" in last and str(out) in last
    for epoch, line in enumerate(epochs, start=1):
        shown = re.fullmatch(rf"epoch {epoch}/3: d_loss (.*), g_loss (.*), D\(x\) (.*), "
                             r"D\(G\(z\)\) (.*), \d+ images/s", line).groups()
        for name, mean in zip(COLUMNS[2:], shown):
            row = 2 * epoch - 2  # of the two rows of an epoch, one is the mean of 20 steps
            expected = (20 * log[name][row] + 5 * log[name][row + 1]) / 25
            assert float(mean) == pytest.approx(expected, abs=0.006)


def test_epoch_shows_each_image_once_in_the_range_of_fakes_and_logs_mean_losses(data, monkeypatch):
    calls, original = [], train.adversarial_step

    def adversarial_step(*arguments):
        losses = original(*arguments)
        calls.append([arguments[-1], arguments[-2].clone(), torch.stack(list(losses.values()))])
        return losses

    monkeypatch.setattr(train, "adversarial_step", adversarial_step)
    settings = {"device": "cpu", "batch_size": 4, "data": data}
    train.train(epochs=2, **settings, out="two")
    train.train(epochs=1, **settings, out="other", seed=1)
    steps, batches, losses = zip(*calls)
    assert steps == (*range(1, 2 * STEPS + 1), *range(1, STEPS + 1))
    images = from_pixels(train.load_images(data))
    orders = []
    for start in (0, STEPS, 2 * STEPS):
        shown = torch.cat(batches[start:start + STEPS])
        orders.append([(image == images).all((1, 2, 3)).nonzero().item() for image in shown])
        assert len(set(orders[-1])) == 4 * STEPS
    assert orders[0] != orders[1] != orders[2] != orders[0]  # neither in epochs nor with seeds
    log = read_log("two/losses.csv")
    for row, (start, end) in enumerate([(0, 20), (20, 25), (25, 45), (45, 50)]):
        means = torch.stack(losses[start:end]).mean(0).tolist()
        assert [log[column][row] for column in COLUMNS[2:]] == pytest.approx(means, abs=1e-5)


def test_training_returns_the_average_that_it_saves(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(data, tmp_path / "images")
    average = train.train(epochs=1, device="cpu", batch_size=51, data="~/images", out="~/run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert not average.training and equal(average.state_dict(), checkpoint["average"])
    generator = torch.load(tmp_path / "run" / "generator.pt")
    assert equal(generator, {"average": checkpoint["average"]})
    assert not equal(checkpoint["generator"], checkpoint["average"]) and not contents(".")


def test_learning_rate_holds_for_both_networks():
    train.train(epochs=1, device="cpu", batch_size=51, lr=1e-30, out="out")
    checkpoint = torch.load("out/checkpoint.pt")
    torch.manual_seed(0)
    for name, network in (("generator", Generator()), ("discriminator", Discriminator())):
        for weight, value in network.named_parameters():
            torch.testing.assert_close(checkpoint[name][weight], value, rtol=0, atol=1e-25)


def test_limit_trains_on_the_first_images_and_another_seed_gives_another_run():
    Path("few").write_bytes(idx(blobs(102)[:40]))
    settings = {"epochs": 1, "device": "cpu", "batch_size": 20}
    train.train(**settings, limit=40, out="limited")
    train.train(**settings, data="few", out="few-run")
    train.train(**settings, data="few", out="other", seed=1)
    logs = [Path(out, "losses.csv").read_text() for out in ("limited", "few-run", "other")]
    assert logs[0] == logs[1] != logs[2]


def test_ctrl_c_says_how_to_continue_a_run_to_the_same_bits(cli, data, short, straight, at_step):
    (short / "losses.csv").unlink()
    shutil.rmtree(short / "samples")
    moved = shutil.copy(Path(data, "train-images-idx3-ubyte"), "moved")
    at_step(2 * STEPS + 3, fail(KeyboardInterrupt))
    status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, "--data", moved)
    assert status == 130 and err.count("\n") == 1 and "--resume" in err
    assert cli(train, "--resume", "--out", short)[0] == 0  # the new length and place are kept
    assert torch.load(short / "checkpoint.pt")["settings"]["data"] == str(Path(moved).resolve())
    assert len(list(short.glob("samples/*"))) == 3
    assert_same_run(short, straight[0])


@pytest.mark.parametrize("place", ["Generator", "generate", "adversarial_step"])
def test_run_without_a_complete_epoch_is_begun_again_by_the_same_command(
        cli, data, straight, monkeypatch, place):
    command = ["--epochs", 3, "--data", data, "--out", "out", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(train, place, fail(TypeError("a slip in an edit")))
        with pytest.raises(TypeError, match="a slip"):  # with its traceback
            cli(train, *command)
    assert cli(train, *command)[0] == 0
    assert_same_run(Path("out"), straight[0])


@pytest.mark.parametrize("kept", ["checkpoint.pt", "generator.pt", "samples"])
def test_folder_that_holds_a_run_is_not_overwritten(cli, short, kept):
    short.rename("whole")
    short.mkdir()
    Path("whole", kept).rename(short / kept)
    line = complaint(cli, train, "--out", short, *SMALL)
    assert str(short) in line and "--resume" in line and "--out" in line


@pytest.mark.parametrize("rows, seen, expected, word", [
    (1, True, 2, "already holds a run"), (2, True, 2, "already holds a run"),
    (2, False, 1, "exists")])
def test_process_that_comes_too_late_leaves_a_complete_run_alone(
        cli, data, straight, monkeypatch, rows, seen, expected, word):
    def overtake(*_):
        calls.append(1)
        if len(calls) == rows:  # the second row is the last one before the first saving
            shutil.rmtree("out")
            shutil.copytree(straight[0], "out")
            if not seen:  # the other process saves just after this one has looked
                monkeypatch.setattr(train, "refuse_taken", lambda out: None)

    calls = []
    monkeypatch.setattr(train, "check_finite", overtake)
    status, _, err = cli(train, "--data", data, "--out", "out", *SMALL)
    assert status == expected and word in err and err.count("\n") == 1
    assert_same_run(Path("out"), straight[0])


def test_notebook_resumes_with_the_settings_of_the_run_and_is_told_of_bad_ones(data, straight):
    for epochs in (0, 1.5, "1"):
        with pytest.raises(InputError, match=f"epochs {epochs!r}: use"):
            train.train(epochs=epochs, device="cpu", batch_size=4, data=data, out="run")
    one, lr = numpy.array([1]), numpy.array([0.001])  # elements of arrays are NumPy's numbers
    train.train(epochs=one[0], device="cpu", batch_size=4, lr=lr[0], data=data, out="run")
    train.train(epochs=3, device="cpu", out="run", resume=True)
    assert_same_run(Path("run"), straight[0])


@pytest.mark.parametrize("options", [
    "--epochs 0", "--epochs 1.5", "--batch-size 0", "--batch-size 103", "--lr 0",
    "--lr nan", "--lr inf", "--seed -1", f"--seed {2**63}", "--limit 0", "--device tpu",
    "--device cuda:99", "--out file", "--out file/run", "--data file", "--data nowhere",
    "--resume --out nowhere", "--resume --batch-size 8", "--resume --lr 0.5", "--resume --seed 77",
    "--resume --limit 50", "--resume --data other", "--resume --epochs 2"])
def test_bad_options_are_named_in_one_line_and_nothing_is_written(cli, straight, options):
    out = "new"
    if "--resume" in options:
        out = shutil.copytree(straight[0], "run")
    Path("file").write_text("a file")
    Path("other").write_bytes(idx(blobs(103)[1:]))  # as many images, but not the same
    line = complaint(cli, train, "--epochs", 3, "--out", out, "--device", "cpu", *options.split())
    name, value = options.replace("-size", "_size").rpartition("--")[2].split()
    assert name in line or name in ("data", "out")
    assert value in line or "checksum of the images" in line


@pytest.mark.parametrize("part", ["plot", "save_training_animation"])
def test_plot_or_animation_that_cannot_be_drawn_costs_one_line(cli, short, monkeypatch, part):
    monkeypatch.setattr(train, part, fail(ImportError("no matplotlib")))
    log = (short / "losses.csv").read_bytes()
    (short / "losses.csv").unlink()
    status, out, err = cli(train, "--resume", "--out", short)
    assert (status, err) == (0, "") and (short / "losses.csv").read_bytes() == log
    assert [line for line in out.splitlines() if "no matplotlib" in line and "not drawn" in line]


def test_losses_that_are_not_finite_stop_the_run_at_the_first_row(cli, data):
    status, _, err = cli(train, "--lr", "1e18", "--data", data, "--out", "out", *SMALL)
    assert status == 1 and err.count("\n") == 1
    assert "diverged in epoch 1" in err and "lr" in err
    assert Path("out", "losses.csv").read_text().count("\n") == 2


def test_weights_that_are_not_finite_never_reach_the_checkpoint(cli, short, at_step):
    def poison(generator):
        next(generator.parameters()).data.fill_(math.nan)

    before = torch.load(short / "checkpoint.pt")
    at_step(2 * STEPS, poison)
    status, _, err = cli(train, "--resume", "--epochs", 2, "--out", short, "--device", "cpu")
    assert status == 1 and "diverged in epoch 2" in err
    assert equal(torch.load(short / "checkpoint.pt"), before)


def test_full_disk_is_one_line_and_leaves_the_old_checkpoint(cli, short, straight):
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    names = ("checkpoint.pt", "generator.pt")
    before = [(short / name).read_bytes() for name in names]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))  # fails as on a full disk
    try:
        status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1 and err.count("\n") == 1
    assert [(short / name).read_bytes() for name in names] == before
    assert cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")[0] == 0
    assert_same_run(short, straight[0])


def test_checkpoint_is_never_ahead_of_the_generator(cli, short, monkeypatch):
    calls, original = [], os.replace

    def replace(*paths):
        calls.append(paths)
        if len(calls) == 2:  # the second file of the epoch
            raise KeyboardInterrupt
        original(*paths)

    monkeypatch.setattr(os, "replace", replace)
    assert cli(train, "--resume", "--epochs", 2, "--out", short, "--device", "cpu")[0] == 130
    checkpoint = torch.load(short / "checkpoint.pt")
    assert checkpoint["epoch"] == 1
    assert not equal(torch.load(short / "generator.pt")["average"], checkpoint["average"])


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoint_that_cannot_be_resumed_is_one_line_and_stays(cli, short, how):
    DAMAGES[how](short / "checkpoint.pt", torch.load(short / "checkpoint.pt"))
    assert "checkpoint.pt" in complaint(cli, train, "--resume", "--out", short)


def test_shipped_data_set_is_mnist_and_needs_no_network(monkeypatch, capfd):
    monkeypatch.setattr(socket, "socket", fail(OSError("the network is off")))
    monkeypatch.setattr(socket, "getaddrinfo", fail(OSError("the network is off")))
    images = train.load_images(ROOT / "data")
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert round(images.float().mean().item(), 4) == 33.3184  # MNIST's well-known mean, 0.1307
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", [
    "train-images-idx3-ubyte",
    "train-images-idx3-ubyte.gz",
    "MNIST/raw/train-images-idx3-ubyte.gz",
    "train-images-idx3-ubyte/train-images-idx3-ubyte",  # some downloads have such a folder
])
def test_images_are_found_compressed_or_not_and_nothing_is_written(tmp_path, name, compressed):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = idx(blobs(3))
    if compressed:
        content = gzip.compress(content)
    path.write_bytes(content)
    if path.suffix == ".gz":
        path.with_suffix("").touch()  # half unpacked; it does not hide the packed file
    before = contents(tmp_path)
    for place in (tmp_path, str(path)):  # a file may be given as well as its folder
        assert torch.equal(train.load_images(place), blobs(3).unsqueeze(1))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shape", [(5, 32, 32), (5, 64, 48), (5, 16, 16, 3)])
def test_images_of_any_size_and_colour_load_by_their_header(cli, shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    Path("images").write_bytes(idx(images))
    loaded = train.load_images(Path("images"))
    assert torch.equal(loaded, images.view(*shape[:3], -1).permute(0, 3, 1, 2))
    status, _, err = cli(train, "--data", "images", "--batch-size", 5)
    assert status == 2 and "(1, 28, 28)" in err and str(tuple(loaded.shape[1:])) in err


@pytest.mark.parametrize("content", [
    b"", b"These are no images.", idx(blobs(9))[:-1], idx(blobs(9)) + b"\n", idx(blobs(9))[:10],
    idx(blobs(9).flatten(1)), idx(blobs(0)), gzip.compress(idx(blobs(9)))[:-9],
    gzip.compress(b"No images.")], ids=range(9))
def test_file_that_does_not_hold_images_is_named(cli, content):
    Path("images").write_bytes(content)
    assert "images is damaged" in complaint(cli, train, "--data", "images", "--out", "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_can_be_resumed(cli):
    assert cli(train, "--epochs", 1, "--batch-size", 4, "--device", "cuda")[0] == 0
    assert cli(train, "--epochs", 2, "--resume", "--device", "cuda")[0] == 0
    log = read_log("out/losses.csv")
    assert list(log["step"]) == [20, 25, 45, 50] and numpy.isfinite(log["g_loss"]).all()
