"""Training runs: what they write, how they stop, and how they go on as if they had never stopped."""
import contextlib
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import sample
import train
from conftest import ROOT, complaint, contents, without_cuda, without_mps
from gan import PENALTY_EVERY
from plot_losses import COLUMNS, begin_log, read_log

STEPS = 25  # per epoch: 102 images in batches of 4
SMALL = ["--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """A run of three epochs, and what it said into a pipe. Read only."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    done = subprocess.run([sys.executable, ROOT / "train.py", "--epochs", "3", "--data", data, "--out", out, *SMALL],
                          capture_output=True, text=True)
    return out, done


@pytest.fixture
def short(tmp_path, data):
    """A run of one epoch, to go on with."""
    out = tmp_path / "short"
    train.train("cpu", out, epochs=1, batch_size=4, data=str(data))
    return out


def stop_at(monkeypatch, stop, end):
    """Call `end` once, after the step numbered `stop` from here on."""
    def step(*players, **options):
        nonlocal stop
        values = real_step(*players, **options)
        stop -= 1
        if stop == 0:
            end(*players)
        return values

    real_step = train.adversarial_step
    monkeypatch.setattr(train, "adversarial_step", step)


def press_ctrl_c(*_):
    raise KeyboardInterrupt


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(out, expected):
    assert (out / "losses.csv").read_bytes() == (expected / "losses.csv").read_bytes()
    for name in ("checkpoint.pt", "generator.pt"):
        assert same(torch.load(out / name), torch.load(expected / name))
    pictures = [{path.name: path.read_bytes() for path in run.glob("samples/*")} for run in (out, expected)]
    assert pictures[0] == pictures[1]


def test_run_writes_its_files(finished):
    out, done = finished
    assert done.returncode == 0
    assert {str(path.relative_to(out)) for path in contents(out)} == {
        "checkpoint.pt", "generator.pt", "losses.csv", "losses.png",
        "samples/epoch_0001.png", "samples/epoch_0002.png", "samples/epoch_0003.png"}
    assert (out / "losses.csv").read_text().startswith("epoch,step,d_loss,g_loss,d_real,d_fake\n1,20,")
    log = read_log(out / "losses.csv")
    assert list(zip(log["epoch"], log["step"])) == [(1, 20), (1, 25), (2, 45), (2, 50), (3, 70), (3, 75)]
    assert all(map(math.isfinite, log["d_loss"] + log["g_loss"]))
    assert all(0 <= answer <= 1 for answer in log["d_real"] + log["d_fake"])
    assert Image.open(out / "samples" / "epoch_0001.png").size == (242, 242)  # 8 by 8 digits
    assert numpy.array(Image.open(out / "losses.png")).std() > 0


def test_progress_does_not_flood_a_pipe(finished):
    lines = finished[1].stdout.splitlines()
    assert finished[1].stderr == "" and len(lines) == 4
    for epoch, line in enumerate(lines[:3], start=1):
        assert re.fullmatch(rf"epoch {epoch}/3: d_loss [\d.]+, g_loss [\d.]+, .*, \d+ images/s", line)
    assert "sample.py --checkpoint" in lines[3] and str(finished[0]) in lines[3]


def test_bar_on_a_terminal_shows_epoch_speed_losses_and_time_left(cli, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "tqdm", lambda **options: tqdm(**options | {"disable": False}))
    status, _, err = cli(train, "--epochs", 1, "--data", data, "--out", tmp_path / "out", *SMALL)
    assert status == 0
    assert re.search(r"epoch 1/1: .*\[\d\d:\d\d<\d\d:\d\d, .* images/s, d_loss [\d.]+, g_loss [\d.]+\]", err)


def test_epoch_shows_each_image_once_scaled_to_the_range_of_tanh_and_logs_means(data, tmp_path, monkeypatch):
    def step(*players, penalise):
        batches.append(players[-1].clone())
        penalised.append(penalise)
        values.append(real_step(*players, penalise=penalise))
        return values[-1]

    real_step, batches, penalised, values = train.adversarial_step, [], [], []
    monkeypatch.setattr(train, "adversarial_step", step)
    train.train("cpu", tmp_path / "out", epochs=2, batch_size=4, data=str(data))
    assert penalised == [step % PENALTY_EVERY == 0 for step in range(1, 2 * STEPS + 1)]
    first, second = torch.cat(batches[:STEPS]), torch.cat(batches[STEPS:])
    images = train.load_images(data).float()
    for epoch in (first, second):
        shown = [(epoch[i] == images / 127.5 - 1).all((1, 2, 3)).nonzero().item() for i in range(100)]
        assert epoch.shape == (100, 1, 28, 28) and len(set(shown)) == 100
    assert not torch.equal(first, second)
    log = read_log(tmp_path / "out" / "losses.csv")
    for row, (start, end) in enumerate([(0, 20), (20, 25), (25, 45), (45, 50)]):
        means = torch.tensor(values[start:end]).mean(0).tolist()
        assert [log[column][row] for column in COLUMNS[2:]] == pytest.approx(means, abs=1e-5)


def test_training_returns_the_average_that_it_saves(data, tmp_path):
    average = train.train("cpu", tmp_path, epochs=1, batch_size=51, data=str(data))
    checkpoint, small = torch.load(tmp_path / "checkpoint.pt"), torch.load(tmp_path / "generator.pt")
    assert same(average.state_dict(), checkpoint["average"])
    assert same(average.state_dict(), small["average"]) and small.keys() == {"settings", "average"}
    assert not same(checkpoint["generator"], checkpoint["average"])
    assert sample.generate(average, 3).shape == (3, 28, 28)


def test_seed_sets_everything_random(data, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        train.train("cpu", tmp_path / name, epochs=1, batch_size=34, seed=seed, data=str(data))
    assert_same_run(tmp_path / "again", tmp_path / "one")
    assert (tmp_path / "other" / "losses.csv").read_text() != (tmp_path / "one" / "losses.csv").read_text()


def test_batches_of_one_image_are_enough(data, tmp_path):
    train.train("cpu", tmp_path / "out", epochs=1, batch_size=1, data=str(data))
    assert len(read_log(tmp_path / "out" / "losses.csv")["step"]) == 6


def test_notebook_may_give_paths_and_a_wrong_name_is_an_error(data, tmp_path):
    train.train("cpu", tmp_path / "out", epochs=1, batch_size=51, data=data)
    assert sample.load_generator(tmp_path / "out" / "generator.pt").latent_dim == 64
    with pytest.raises(TypeError, match="setting epoch"):
        train.train("cpu", tmp_path / "other", epoch=1, data=data)
    assert not contents(tmp_path / "other")


def test_more_epochs_continue_the_run_to_the_last_bit(cli, short, finished):
    assert cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")[0] == 0
    assert_same_run(short, finished[0])


@pytest.mark.parametrize("steps", [3, 47])
def test_ctrl_c_says_in_one_line_how_to_go_on_and_nothing_is_lost(cli, short, finished, monkeypatch, steps):
    with monkeypatch.context() as patch:
        stop_at(patch, steps, press_ctrl_c)
        status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, *SMALL)
    assert status == 130 and len(err.splitlines()) == 1
    assert str(short / "checkpoint.pt") in err and f"epoch {1 + steps // STEPS}" in err
    command = shlex.split(err.partition("python ")[2])
    assert command[0] == "train.py" and "--device cpu" in err and cli(train, *command[1:])[0] == 0
    assert_same_run(short, finished[0])


def test_ctrl_c_in_the_first_epoch_keeps_its_beginning(cli, data, tmp_path, finished, monkeypatch):
    out = tmp_path / "it's new"
    with monkeypatch.context() as patch:
        stop_at(patch, 22, press_ctrl_c)
        status, _, err = cli(train, "--epochs", 3, "--data", data, "--out", out, *SMALL)
    assert status == 130 and "epoch 0" in err and (out / "losses.csv").read_text().count("\n") == 2
    command = shlex.split(err.partition("python ")[2])
    assert cli(train, *command[1:])[0] == 0
    assert_same_run(out, finished[0])


def test_ctrl_c_before_the_training_says_that_there_is_nothing_to_go_on_with(cli, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_images", press_ctrl_c)
    status, _, err = cli(train, "--data", data, "--out", tmp_path / "out")
    assert status == 130 and "nothing is saved" in err and err.count("\n") == 1
    assert not contents(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_process_that_is_stopped_goes_on_as_if_it_had_not_been(data, tmp_path, number):
    out, said, straight = tmp_path / "out", tmp_path / "said", tmp_path / "straight"
    command = [sys.executable, ROOT / "train.py", "--epochs", "5000", "--data", data, "--out", out, *SMALL]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a process that ignores it ignore it
    with open(said, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=buffered)
    signal.signal(signal.SIGINT, before)
    for _ in range(6000):
        if (out / "samples" / "epoch_0002.png").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(30)

    done = torch.load(out / "checkpoint.pt")["epoch"]
    lines = said.read_text().splitlines()
    assert len(lines) >= 1 and lines[0].startswith("epoch 1/5000: ")  # not only once the pipe is full
    if number == signal.SIGINT:
        assert process.returncode == 130 and len(lines) in (done, done + 1)
        assert f"holds epoch {done}. Go on: python train.py " in lines[-1] and "--resume" in lines[-1]
    train.train("cpu", out, resume=True, epochs=done + 1)
    train.train("cpu", straight, epochs=done + 1, batch_size=4, data=str(data))
    assert_same_run(out, straight)


def test_row_that_was_broken_off_does_not_stay_in_the_log(tmp_path):
    log, rows = tmp_path / "losses.csv", "epoch,step,d_loss,g_loss,d_real,d_fake\n9,225,1,1,.5,.5\n10,250,1,1,.5,.5\n"
    for end in ("", "1", "11,2", "11,270,1,1,.5,.5\n11,275,1,1,.5,.5\n12"):
        log.write_text(rows + end)
        begin_log(log, 10)
        assert log.read_text() == rows


@pytest.mark.parametrize("name", ["checkpoint.pt", "losses.csv", "samples"])
def test_folder_that_holds_a_run_is_refused(cli, data, short, name):
    for path in short.iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(short)
    line = complaint(*cli(train, "--data", data, "--out", short, *SMALL))
    assert str(short) in line and "--resume" in line and "--out" in line
    assert before and contents(short) == before


@pytest.mark.parametrize("option, value, old", [
    ("--batch-size", "8", "4"), ("--lr", "0.5", "0.0015"), ("--seed", "77", "0"), ("--data", "elsewhere", "data")])
def test_contradiction_on_resume_names_both_values(cli, short, option, value, old):
    before = contents(short)
    line = complaint(*cli(train, "--resume", "--out", short, option, value))
    assert f"{option} {value} " in line and re.search(rf"{option} \S*{re.escape(old)}", line.replace(value, ""))
    assert contents(short) == before


def test_repeating_the_settings_on_resume_is_no_contradiction(cli, short, data):
    assert cli(train, "--resume", "--out", short, "--lr", "1.5e-3", "--seed", 0, "--data", data, *SMALL)[0] == 0


def test_fewer_epochs_than_there_are_already_are_refused(cli, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    before = contents(out)
    line = complaint(*cli(train, "--resume", "--epochs", 2, "--out", out, "--device", "cpu"))
    assert "--epochs 2" in line and "3" in line
    assert contents(out) == before


def test_losses_that_are_no_longer_finite_stop_the_run(cli, data, tmp_path):
    line = complaint(*cli(train, "--lr", "1e30", "--data", data, "--out", tmp_path / "out", *SMALL))
    assert "finite" in line and "epoch 1" in line and "--lr" in line
    assert torch.load(tmp_path / "out" / "checkpoint.pt")["epoch"] == 0
    assert (tmp_path / "out" / "losses.csv").read_text().count("\n") == 2  # at the first row, not after the epoch


@pytest.mark.parametrize("step", [3, STEPS])
def test_weights_that_are_no_longer_finite_never_reach_the_checkpoint(cli, short, monkeypatch, step):
    def poison(generator, *_):
        next(generator.parameters()).data.fill_(math.nan)

    before = contents(short)
    stop_at(monkeypatch, step, poison)
    status, _, err = cli(train, "--resume", "--epochs", 2, "--out", short, "--device", "cpu")
    assert status == 1 and err.count("\n") == 1 and "epoch 2" in err
    for name in ("checkpoint.pt", "generator.pt"):
        assert (short / name).read_bytes() == before[short / name]


@pytest.mark.parametrize("room", [500_000, 400])
def test_full_disk_is_one_line_and_leaves_the_old_checkpoint(cli, short, finished, room):
    before = contents(short)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))  # writing more to a file fails as on a full disk
    try:
        status, _, err = cli(train, "--resume", "--epochs", 3, "--out", short, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert status == 1 and err.count("\n") == 1 and err.startswith("train.py: ")
    assert (short / "checkpoint.pt").read_bytes() == before[short / "checkpoint.pt"]
    assert not [path for path in contents(short) if path.name.startswith(".")]
    train.train("cpu", short, resume=True, epochs=3)
    assert_same_run(short, finished[0])


@pytest.mark.parametrize("options, word", [
    ("--epochs 0", "--epochs"),
    ("--epochs -1", "--epochs"),
    ("--epochs 1.5", "1.5"),
    ("--batch-size 0", "--batch-size"),
    ("--batch-size 103", "102 images"),
    ("--lr 0", "--lr"),
    ("--lr -0.1", "--lr"),
    ("--lr nan", "nan"),
    ("--lr inf", "inf"),
    ("--lr fast", "fast"),
    ("--seed -1", "--seed"),
    ("--seed 9223372036854775808", "--seed"),
    ("--device tpu", "tpu"),
    pytest.param("--device cuda", "--device cpu", marks=without_cuda),
    pytest.param("--device cuda:0", "--device cpu", marks=without_cuda),
    pytest.param("--device mps", "--device cpu", marks=without_mps),
    ("--out file/run", "file"),
    ("--out file", "file"),
    ("--data file", "file"),
    ("--data file/data", "file"),
    ("--resume", "checkpoint.pt"),
    ("--latent 3", "--latent"),
])
def test_bad_options_are_one_line_and_write_nothing(cli, data, tmp_path, monkeypatch, options, word):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    assert word in complaint(*cli(train, "--data", data, "--epochs", 1, "--batch-size", 4, *options.split()))
    assert list(contents(tmp_path)) == [tmp_path / "file"]


def test_broken_checkpoint_is_one_line_and_stays(cli, data, broken):
    before = contents(broken.parent)
    complaint(*cli(train, "--resume", "--data", data, "--out", broken.parent))
    assert contents(broken.parent) == before


def test_generator_alone_cannot_be_resumed(cli, short):
    shutil.copy(short / "generator.pt", short / "checkpoint.pt")
    before = contents(short)
    complaint(*cli(train, "--resume", "--out", short))
    assert contents(short) == before


def test_help_shows_every_default(cli):
    status, text, _ = cli(train, "--help")
    assert status == 0
    for option, default in (("epochs", "8"), ("device", "auto"), ("batch-size", "128"), ("lr", "0.0015"), ("seed", "0"),
                            ("data", "data"), ("out", "out")):
        assert re.search(rf"--{option} [^-]*\(default:\s+{default}\b", text)


@pytest.fixture
def recorder(monkeypatch):
    """torch.cuda's streams and graphs, played by Python: a step that is recorded does nothing until it is replayed."""
    class Graph:
        def replay(self):
            self.recorded()

    @contextlib.contextmanager
    def graph(one):
        recording.append(one)
        yield
        recording.pop()

    recording = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock)
    return recording


def test_recorded_steps_are_those_that_were_asked_for(recorder):
    def step(batch, penalise):
        values = torch.zeros(4)

        def do():
            taken.append((batch.tolist(), penalise))
            values.fill_(len(taken))

        if recorder:
            assert all(optimizer.param_groups[0]["capturable"] for optimizer in optimizers)
            recorder[-1].recorded = do
        else:
            do()
        return values

    taken, optimizers = [], [mock.Mock(param_groups=[{}]) for _ in range(2)]
    play = train.replayed(step, optimizers)
    asked = [([i, i + 1], i % 8 == 0) for i in range(1, 30)]
    values = [play(torch.tensor(batch), penalise) for batch, penalise in asked]
    assert taken == asked and not any(optimizer.param_groups[0]["capturable"] for optimizer in optimizers)
    assert [value.tolist() for value in values] == [[i] * 4 for i in range(1, 30)]  # and none changes afterwards


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_training_is_the_plain_one(data, tmp_path, monkeypatch):
    train.train("cuda", tmp_path / "recorded", epochs=2, batch_size=4, data=data)
    monkeypatch.setattr(train, "replayed", lambda step, _: step)
    train.train("cuda", tmp_path / "plain", epochs=2, batch_size=4, data=data)
    logs = [read_log(tmp_path / name / "losses.csv") for name in ("recorded", "plain")]
    assert logs[0]["d_loss"] == pytest.approx(logs[1]["d_loss"], rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_continues_and_draws_on_the_cpu(cli, data, tmp_path):
    options = ["--data", data, "--out", tmp_path, "--device", "cuda"]
    assert cli(train, "--epochs", 1, "--batch-size", 4, *options)[0] == 0
    assert cli(train, "--epochs", 2, "--resume", *options)[0] == 0
    log = read_log(tmp_path / "losses.csv")
    assert log["step"] == (20, 25, 45, 50) and all(map(math.isfinite, log["g_loss"]))
    assert sample.generate(sample.load_generator(tmp_path / "generator.pt"), 3).float().std() > 0
