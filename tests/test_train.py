"""Training runs: what they write, how they stop and continue, and what data they read."""
import gzip
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import train
from conftest import DAMAGES, ROOT, blobs, complaint, contents, damage, idx, readme_code
from gan import InputError, from_pixels
from plot_losses import COLUMNS, read_log

STEPS = 25  # per epoch: 102 images in batches of 4
SMALL = ["--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="session")
def straight(tmp_path_factory, data):
    """A run of three epochs that is never stopped, and what it printed. No test may change it."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    command = [sys.executable, ROOT / "train.py", "--epochs", "3", "--data", data, "--out", out]
    return out, subprocess.run(command + SMALL, capture_output=True, text=True)


@pytest.fixture
def short(tmp_path, data):
    """A run of one epoch."""
    train.train(epochs=1, device="cpu", batch_size=4, data=data, out=tmp_path / "short")
    return tmp_path / "short"


def at_step(monkeypatch, number, action):
    """Call action(generator) after the training step of this number."""
    original = train.adversarial_step

    def adversarial_step(generator, *others):
        losses = original(generator, *others)
        if others[-1] == number:
            action(generator)
        return losses

    monkeypatch.setattr(train, "adversarial_step", adversarial_step)


def fail(error):
    def function(*_):
        raise error

    return function


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same_run(out, expected):
    assert (out / "losses.csv").read_bytes() == (expected / "losses.csv").read_bytes()
    for name in ("checkpoint.pt", "generator.pt"):
        assert equal(torch.load(out / name), torch.load(expected / name))
    assert ({path.name: path.read_bytes() for path in out.glob("samples/*")}
            == {path.name: path.read_bytes() for path in expected.glob("samples/*")})


def test_run_writes_its_files(straight):
    out, process = straight
    assert process.returncode == 0
    assert {str(path.relative_to(out)) for path in contents(out)} == {
        "checkpoint.pt", "generator.pt", "losses.csv", "losses.png", "samples/epoch_0000.png",
        "samples/epoch_0001.png", "samples/epoch_0002.png", "samples/epoch_0003.png"}
    log = read_log(out / "losses.csv")
    assert list(log) == list(COLUMNS)
    assert list(zip(log["epoch"], log["step"])) == [
        (1, 20), (1, 25), (2, 45), (2, 50), (3, 70), (3, 75)]
    for path in out.glob("samples/*"):
        assert Image.open(path).size == (242, 242)  # 8 by 8 digits


def test_run_says_what_it_trains_and_prints_the_means_of_each_epoch(straight):
    out, process = straight
    first, *epochs, last = process.stdout.splitlines()
    assert process.stderr == "" and len(epochs) == 3
    assert all(word in first for word in ("cpu", "238,529", "205,713", "3 epochs of 25 steps"))
    log = read_log(out / "losses.csv")
    for epoch, line in enumerate(epochs, start=1):
        shown = re.fullmatch(rf"epoch {epoch}/3: d_loss (.*), g_loss (.*), D\(x\) (.*), "
                             r"D\(G\(z\)\) (.*), \d+ images/s", line).groups()
        for name, mean in zip(COLUMNS[2:], shown):
            row = 2 * epoch - 2  # of the two rows of an epoch, one is the mean of 20 steps
            expected = (20 * log[name][row] + 5 * log[name][row + 1]) / 25
            assert float(mean) == pytest.approx(expected, abs=0.006)
    assert "sample.py --checkpoint" in last and str(out) in last


def test_terminal_shows_a_bar_with_speed_time_left_and_losses(cli, data, tmp_path, monkeypatch):
    original = train.tqdm

    def visible(*arguments, **options):
        options["disable"] = False  # as in a terminal
        return original(*arguments, mininterval=0, **options)

    monkeypatch.setattr(train, "tqdm", visible)
    status, _, err = cli(train, "--epochs", 1, "--data", data, "--out", tmp_path / "out", *SMALL)
    assert status == 0
    assert re.search(r"epoch 1/1: .*\[\d+:\d+<\d+:\d+, .*step/s, d_loss .*, g_loss .*\]", err)


def test_epoch_shows_each_image_once_in_the_range_of_fakes_and_logs_mean_losses(
        data, tmp_path, monkeypatch):
    batches, steps, losses = [], [], []
    original = train.adversarial_step

    def adversarial_step(*arguments):
        batches.append(arguments[-2].clone())
        steps.append(arguments[-1])
        result = original(*arguments)
        losses.append(torch.stack(list(result.values())))
        return result

    monkeypatch.setattr(train, "adversarial_step", adversarial_step)
    train.train(epochs=2, device="cpu", batch_size=4, data=data, out=tmp_path / "out")
    images = from_pixels(train.load_images(data))
    orders = []
    for epoch in (batches[:STEPS], batches[STEPS:]):
        shown = torch.cat(epoch)
        orders.append([(image == images).all((1, 2, 3)).nonzero().item() for image in shown])
        assert len(set(orders[-1])) == 4 * STEPS
    assert orders[0] != orders[1]
    assert steps == list(range(1, 2 * STEPS + 1))
    log = read_log(tmp_path / "out" / "losses.csv")
    for row, (start, end) in enumerate([(0, 20), (20, 25), (25, 45), (45, 50)]):
        means = torch.stack(losses[start:end]).mean(0).tolist()
        assert [log[column][row] for column in COLUMNS[2:]] == pytest.approx(means, abs=1e-5)


def test_training_returns_the_average_that_it_saves(data, tmp_path):
    average = train.train(epochs=1, device="cpu", batch_size=51, data=Path(data), out=tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert equal(average.state_dict(), checkpoint["average"])
    assert equal(torch.load(tmp_path / "generator.pt"), {"average": checkpoint["average"]})
    assert not equal(checkpoint["generator"], checkpoint["average"])


def test_same_seed_gives_the_same_run_and_another_seed_another_one(data, tmp_path):
    settings = {"epochs": 1, "device": "cpu", "batch_size": 34, "data": data}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        train.train(**settings, seed=seed, out=tmp_path / name)
    assert_same_run(tmp_path / "again", tmp_path / "one")
    logs = [(tmp_path / name / "losses.csv").read_text() for name in ("one", "other")]
    assert logs[0] != logs[1]


def test_more_epochs_continue_a_run_to_the_same_bits(cli, short, straight):
    assert cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")[0] == 0
    assert_same_run(short, straight[0])


@pytest.mark.parametrize("steps", [3, 22, 47])
def test_ctrl_c_says_how_to_continue_and_nothing_is_lost(
        cli, data, tmp_path, straight, monkeypatch, steps):
    out = tmp_path / "it's new"
    with monkeypatch.context() as patch:
        at_step(patch, steps, fail(KeyboardInterrupt))
        status, _, err = cli(train, "--epochs", 3, "--data", data, "--out", out, *SMALL)
    assert status == 130 and len(err.splitlines()) == 1 and "--resume" in err
    command = shlex.split(err.partition("python ")[2])
    assert command[0] == "train.py" and cli(train, *command[1:])[0] == 0
    assert_same_run(out, straight[0])


def test_longer_run_that_is_stopped_keeps_its_new_length(cli, short, straight, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 3, fail(KeyboardInterrupt))
        assert cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")[0] == 130
    assert cli(train, "--resume", "--out", short, "--device", "cpu")[0] == 0
    assert_same_run(short, straight[0])


def test_longer_run_that_is_stopped_as_it_begins_is_continued_by_the_printed_command(
        cli, short, straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_images", fail(KeyboardInterrupt))
        status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")
    command = shlex.split(err.partition("python train.py ")[2])
    assert status == 130 and cli(train, *command)[0] == 0
    assert_same_run(short, straight[0])


def test_mistake_in_an_edited_network_keeps_its_traceback(cli, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "adversarial_step", fail(ValueError("expected 4D input")))
    with pytest.raises(ValueError, match="expected 4D input"):
        cli(train, "--data", data, "--out", tmp_path / "out", *SMALL)


def test_ctrl_c_before_the_training_says_that_nothing_is_saved(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_images", fail(KeyboardInterrupt))
    status, _, err = cli(train, "--out", tmp_path / "out")
    assert status == 130 and "nothing was saved" in err and len(err.splitlines()) == 1
    assert not contents(tmp_path)


def test_killed_process_continues_as_if_it_had_never_been_stopped(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "train.py", "--epochs", "5000", "--data", data, "--out", out]
    process = subprocess.Popen(command + SMALL, stdout=subprocess.DEVNULL)
    while not (out / "samples" / "epoch_0002.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    epochs = torch.load(out / "checkpoint.pt")["epoch"] + 1
    settings = {"epochs": epochs, "device": "cpu", "batch_size": 4, "data": data}
    train.train(**settings, out=out, resume=True)
    train.train(**settings, out=tmp_path / "straight")
    assert_same_run(out, tmp_path / "straight")


@pytest.mark.parametrize("kept", ["checkpoint.pt", "generator.pt", "losses.csv", "samples"])
def test_folder_that_holds_a_run_is_not_overwritten(cli, data, short, kept):
    for path in short.iterdir():
        if path.name == kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    before = contents(short)
    line = complaint(cli(train, "--data", data, "--out", short, *SMALL))
    assert str(short) in line and "--resume" in line and "--out" in line
    assert before and contents(short) == before


@pytest.mark.parametrize("options, words", [
    ("--batch-size 8", ["--batch-size 8", "--batch-size 4"]),
    ("--lr 0.5", ["--lr 0.5", "--lr 0.001"]),
    ("--seed 77", ["--seed 77", "--seed 0"]),
    ("--data other", ["other images", "--data"]),
    ("--epochs 2", ["--epochs 2", "3"]),
])
def test_resuming_refuses_what_contradicts_the_run(
        cli, straight, tmp_path, monkeypatch, options, words):
    out = shutil.copytree(straight[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    Path("other").write_bytes(idx(blobs(103)[1:]))  # as many images, but not the same
    before = contents(out)
    line = complaint(cli(train, "--resume", "--out", out, *options.split()))
    assert all(word in line for word in words)
    assert contents(out) == before


def test_run_whose_images_have_moved_goes_on_once_it_is_told_where_they_are(
        cli, data, tmp_path, straight):
    images = Path(shutil.copytree(data, tmp_path / "d"))
    out = tmp_path / "out"
    assert cli(train, "--epochs", 1, "--data", images, "--out", out, *SMALL)[0] == 0
    images.rename(tmp_path / "e")
    options = ["--resume", "--epochs", 3, "--out", out, "--device", "cpu"]
    assert "--data" in complaint(cli(train, *options))
    assert cli(train, *options, "--data", tmp_path / "e")[0] == 0
    assert (out / "losses.csv").read_bytes() == (straight[0] / "losses.csv").read_bytes()
    assert cli(train, "--resume", "--epochs", 4, "--out", out, "--device", "cpu")[0] == 0


def test_notebook_resumes_with_the_settings_of_the_run(data, tmp_path, straight):
    lr = numpy.float64(0.001)  # an element of an array
    train.train(epochs=1, device="cpu", batch_size=4, lr=lr, data=data, out=tmp_path)
    train.train(epochs=3, device="cpu", out=tmp_path, resume=True)
    assert_same_run(tmp_path, straight[0])


@pytest.mark.parametrize("options", [
    "--epochs 0", "--epochs 1.5", "--batch-size 0", "--batch-size 103", "--lr 0", "--lr nan",
    "--lr inf", "--seed -1", f"--seed {2**63}", "--device tpu", "--device cuda:99", "--out=",
    "--out file", "--out file/run", "--data file", "--data nowhere", "--resume"])
def test_bad_options_are_named_in_one_line_and_nothing_is_written(
        cli, data, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    line = complaint(cli(train, "--data", data, "--epochs", 1, *SMALL, *options.split()))
    name, _, place = options.replace("=", " ").partition(" ")
    assert name in line or f"{tmp_path}/{place}" in line or f"'{place}" in line
    assert list(contents(tmp_path)) == [tmp_path / "file"]


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("epochs", 1.5), ("batch_size", 0), ("lr", -1.0), ("seed", 2**63), ("out", "")])
def test_notebook_is_told_of_bad_arguments_and_nothing_is_written(
        tmp_path, monkeypatch, data, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} "):
        train.train(**{"data": data, "batch_size": 4, "device": "cpu", name: value})
    assert not contents(tmp_path)


@pytest.mark.parametrize("change", [
    lambda log: log.unlink(),
    lambda log: log.write_bytes(b""),
    lambda log: log.write_text("epoch;step\n"),
    lambda log: log.write_text(log.read_text(), encoding="utf-16"),
], ids=["deleted", "emptied", "rewritten", "in another encoding"])
def test_log_that_is_changed_in_mid_run_is_put_right(
        cli, data, tmp_path, straight, monkeypatch, change):
    out = tmp_path / "out"
    at_step(monkeypatch, 2 * STEPS + 3, lambda _: change(out / "losses.csv"))
    status, _, err = cli(train, "--epochs", 3, "--data", data, "--out", out, *SMALL)
    assert (status, err) == (0, "")
    assert_same_run(out, straight[0])
    assert (out / "losses.png").read_bytes() == (straight[0] / "losses.png").read_bytes()


def test_log_that_was_deleted_after_the_run_is_written_and_plotted_again(cli, straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "out")
    (out / "losses.csv").unlink()
    (out / "losses.png").unlink()
    assert cli(train, "--resume", "--out", out, "--device", "cpu")[0] == 0
    assert_same_run(out, straight[0])
    assert (out / "losses.png").exists()


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), MemoryError(), KeyError("font")])
def test_plot_that_cannot_be_drawn_costs_one_line(cli, short, monkeypatch, error):
    monkeypatch.setattr(train, "plot", fail(error))
    status, out, err = cli(train, "--resume", "--out", short)
    assert (status, err) == (0, "")
    assert "was not drawn" in out and f"plot_losses.py --csv {short}" in out
    assert "the run is complete" in out


def test_run_and_plot_under_a_notebooks_backend_that_is_not_installed(data, tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    training = ["train.py", "--epochs", "1", "--data", data, "--out", "out", *SMALL]
    for script, *options in (training, ["plot_losses.py", "--csv", "out/losses.csv"]):
        process = subprocess.run([sys.executable, ROOT / script, *options], cwd=tmp_path,
                                 env=environment, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "out" / "losses.png").exists()


def test_of_two_processes_only_one_gets_the_folder(data, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--epochs", "1", "--data", data, "--out", "out"]
    pair = [subprocess.Popen(command + SMALL, cwd=tmp_path, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1]
    assert "already holds a run" in max(errors) and max(errors).count("\n") == 1


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(cli, data, tmp_path, monkeypatch, error):
    monkeypatch.setattr(train, "adversarial_step", fail(error))
    status, _, err = cli(train, "--data", data, "--out", tmp_path / "out", *SMALL)
    assert status == 1 and "--batch-size" in err and err.count("\n") == 1


def test_losses_that_are_not_finite_stop_the_run(cli, data, tmp_path):
    status, _, err = cli(train, "--lr", "1e30", "--data", data, "--out", tmp_path / "out", *SMALL)
    assert status == 1 and err.count("\n") == 1
    assert "diverged in epoch 1" in err and "--lr" in err
    # The run stops at the first row, not at the end of the epoch.
    assert (tmp_path / "out" / "losses.csv").read_text().count("\n") == 2


def test_weights_that_are_not_finite_never_reach_the_checkpoint(cli, short, monkeypatch):
    def poison(generator):
        next(generator.parameters()).data.fill_(math.nan)

    before = torch.load(short / "checkpoint.pt")
    at_step(monkeypatch, 2 * STEPS, poison)
    status, _, err = cli(train, "--resume", "--epochs", 2, "--out", short, "--device", "cpu")
    assert status == 1 and "diverged in epoch 2" in err
    before["settings"]["epochs"] = 2
    assert equal(torch.load(short / "checkpoint.pt"), before)


def test_full_disk_is_one_line_and_leaves_the_old_checkpoint(cli, data, short, straight):
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    before = contents(short)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))  # fails as on a full disk
    try:
        status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1 and len(err.splitlines()) == 1
    for name in ("checkpoint.pt", "generator.pt"):
        assert (short / name).read_bytes() == before[short / name]
    assert not list(short.glob("*.partial"))
    train.train(epochs=3, device="cpu", batch_size=4, data=data, out=short, resume=True)
    assert_same_run(short, straight[0])


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoint_that_cannot_be_resumed_is_one_line_and_stays(cli, short, how):
    damage(short / "checkpoint.pt", how)
    before = contents(short)
    assert "checkpoint.pt" in complaint(cli(train, "--resume", "--out", short))
    assert contents(short) == before


def test_shipped_data_set_is_mnist_and_needs_no_network(monkeypatch, capfd):
    monkeypatch.setattr(socket, "socket", fail(OSError("the network is off")))
    monkeypatch.setattr(socket, "getaddrinfo", fail(OSError("the network is off")))
    images = train.load_images(train.SHIPPED_DATA)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert round(images.float().mean().item(), 4) == 33.3184  # MNIST's well-known mean, 0.1307
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", [
    "train-images-idx3-ubyte",
    "train-images-idx3-ubyte.gz",
    "MNIST/raw/train-images-idx3-ubyte",
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
    for place in (tmp_path, path):  # a file may be given as well as its folder
        assert torch.equal(train.load_images(place), blobs(3).unsqueeze(1))
    assert contents(tmp_path) == {path: content}


def test_folder_of_pictures_becomes_a_data_set_as_the_readme_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("my-images").mkdir()
    for number, image in enumerate(blobs(3)):
        large = Image.fromarray(image.numpy()).resize((56, 56), Image.Resampling.NEAREST)
        large.convert("RGB").save(f"my-images/{number}.png")
    exec(readme_code("Your own images")[0], {})
    difference = train.load_images(tmp_path).int() - blobs(3).unsqueeze(1)
    assert difference.abs().float().mean() < 8


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("content", [
    b"", b"These are no images.", idx(blobs(9))[:-1], idx(blobs(9)) + b"\n", idx(blobs(9))[:10],
    idx(blobs(9).flatten(1)), idx(blobs(9)[:, :20]), gzip.compress(idx(blobs(9)))[:-9],
    gzip.compress(b"No images.")], ids=range(9))
def test_file_that_does_not_hold_images_is_named(cli, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in complaint(cli(train, "--data", tmp_path, "--out", tmp_path / "out"))
    assert list(contents(tmp_path)) == [path]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_can_be_resumed(cli, data, tmp_path):
    options = ["--data", data, "--out", tmp_path, "--device", "cuda"]
    assert cli(train, "--epochs", 1, "--batch-size", 4, *options)[0] == 0
    assert cli(train, "--epochs", 2, "--resume", *options)[0] == 0
    log = read_log(tmp_path / "losses.csv")
    assert list(log["step"]) == [20, 25, 45, 50] and numpy.isfinite(log["g_loss"]).all()
