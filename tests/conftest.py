"""What the tests share: a little made-up data, and a way to call a script with arguments."""
import os
import re
import sys
from pathlib import Path

# One thread, in the tests and in the processes that they start, so that all of them round alike.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

import train
from gan import Generator, sample_latent


def blobs(count):
    """Return images (count, 28, 28), uint8, with two round spots each. No two are alike."""
    random = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    y, x, size = 6 + 16 * torch.rand(3, count, 2, 1, 1, generator=random)
    spots = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size)
    return (255 * spots.amax(dim=1)).round().to(torch.uint8)


def real_images(count):
    """Return the blobs as train.py passes real images on: (count, 1, 28, 28) in [-1, 1]."""
    return blobs(count).unsqueeze(1) / 127.5 - 1


def idx(images):
    """Return the bytes of an IDX file, the format of MNIST."""
    sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
    return bytes([0, 0, 8, images.ndim]) + sizes + images.numpy().tobytes()


def readme_code(section):
    """Return the blocks of Python code in a section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"\n##+ ", text.partition(f"## {section}\n")[2])[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def complaint(cli, script, *arguments):
    """Call a script with bad arguments. Return the line in which it says what is wrong.

    Fail if it prints anything else, or writes anything. argparse may print its usage first.
    """
    before = contents("..")
    status, out, err = cli(script, *arguments)
    *usage, line = err.splitlines()
    assert status in (1, 2) and out == "" and contents("..") == before
    assert not usage or usage[0].startswith("usage:")
    return line


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call a script's main() with arguments. Return its exit status, stdout and stderr."""
    def call(script, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        status = 0
        try:
            script.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


class Code:
    """Saved in a file, it leaves a file called "it ran" behind when it is loaded without care."""

    def __reduce__(self):
        return Path.touch, (Path("it ran"),)


# Ways to put a file that is no checkpoint, or not a whole one, in the place of a good one.
DAMAGES = {
    "missing": lambda path, good: path.unlink(),
    "truncated": lambda path, good: path.write_bytes(path.read_bytes()[:-1000]),
    "weights": lambda path, good: torch.save(good | {"average": {"w": torch.zeros(3)}}, path),
    "code": lambda path, good: torch.save(good | {"code": Code()}, path),
}


@pytest.fixture(autouse=True)
def nothing_real_by_accident(tmp_path, monkeypatch, data):
    """Work in an empty folder, and train on the small data if a test names no data."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(train, "SHIPPED_DATA", Path(data))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 102 images to train on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train-images-idx3-ubyte").write_bytes(idx(blobs(102)))
    return str(folder)


@pytest.fixture(scope="session")
def generator():
    """An untrained generator whose batch norm has seen some batches."""
    torch.manual_seed(0)
    network = Generator()
    with torch.no_grad():
        for _ in range(5):
            network(3 * sample_latent(32))
    return network


@pytest.fixture
def checkpoint(tmp_path, generator):
    """The path of a file that sample.py takes."""
    path = tmp_path / "generator.pt"
    torch.save({"average": generator.state_dict()}, path)
    return path


def equal(one, other):
    """Compare nested dictionaries and lists of tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
