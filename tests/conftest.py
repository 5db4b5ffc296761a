"""What the tests share: a little made-up data, a small run, and a way to call a script."""
import os
import sys
from pathlib import Path

# One thread, in the tests and in the processes that they start, so that all of them round alike.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

import train

COLUMNS = ["epoch", "step", "d_loss", "g_loss", "d_real", "d_fake"]  # of losses.csv
SETTINGS = {"device": "cpu", "batch_size": 4, "lr": 0.002, "seed": 3}  # of the small run


def blobs(count):
    """Return images (count, 1, 28, 28), uint8, with two round spots each. No two are alike."""
    random = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    y, x, size = 6 + 16 * torch.rand(3, count, 2, 1, 1, generator=random)
    spots = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size)
    return (255 * spots.amax(dim=1, keepdim=True)).round().to(torch.uint8)


def real_images(count):
    """Return the blobs as train.py passes real images on: (count, 1, 28, 28) in [-1, 1]."""
    return blobs(count) / 127.5 - 1


def idx(images):
    """Return the bytes of an IDX file, the format of MNIST."""
    sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
    return bytes([0, 0, 8, images.ndim]) + sizes + images.numpy().tobytes()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def equal(one, other):
    """Compare nested dictionaries of tensors and other values."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# Ways to put a file that is no checkpoint, or not a whole one, in the place of a good one.
DAMAGES = {
    "missing": lambda path, good: path.unlink(),
    "truncated": lambda path, good: path.write_bytes(path.read_bytes()[:-1000]),
    "text": lambda path, good: path.write_text("no checkpoint"),
    "other keys": lambda path, good: torch.save({"weights": 1}, path),
    "code": lambda path, good: torch.save(good | {"code": Path("a class of Python's")}, path),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file with 102 images to train on."""
    path = tmp_path_factory.mktemp("data") / "images.idx"
    path.write_bytes(idx(blobs(102)))
    return str(path)


@pytest.fixture(scope="session")
def run(tmp_path_factory, data):
    """The folder of a run of two epochs, of 25 steps each. No test may change it."""
    out = tmp_path_factory.mktemp("runs") / "a run"
    train.train(epochs=2, data=data, out=out, **SETTINGS)
    return out


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call a script's main() with arguments. Return its exit status, stdout and stderr."""
    def call(script, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        try:
            status = script.main() or 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def complaint(cli):
    """Call a script with bad arguments. Return what it says is wrong.

    Fail if it prints anything else (but argparse's usage), or writes anything.
    """
    def call(script, *arguments):
        before = contents("..")
        status, out, err = cli(script, *arguments)
        assert status == 2 and out == "" and contents("..") == before
        usage, name, message = err.partition(f"{script.__name__}.py: ")
        assert name and (usage == "" or usage.startswith("usage: ")) and message.count("\n") == 1
        return message

    return call
