"""What the tests share: small made-up data, broken checkpoints, and a way to call a script as the command line does."""
import os
import pickle
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the same bits here and in the processes that the tests start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

from gan import Generator

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
without_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")


def blobs(count, seed=0):
    """uint8 images (count, 28, 28): two round spots of ink each, no two images alike."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    y, x, size = 6 + 16 * torch.rand(3, count, 2, 1, 1, generator=random)
    spots = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size)
    return (255 * spots.amax(1)).round().to(torch.uint8)


def idx(array):
    """A uint8 tensor as the bytes of an IDX file, as yann.lecun.com described it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.numpy().tobytes()


def contents(folder):
    """Every file below a folder, as {path: bytes}."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def complaint(status, out, err):
    """The one line in which a script says what is wrong. argparse, which exits with 2, puts the usage before it."""
    lines = err.splitlines()
    assert status in (1, 2) and out == "" and lines
    assert len(lines) == 1 if status == 1 else lines[0].startswith("usage:")
    return lines[-1]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls a script's main() with arguments; its exit status, what it wrote to stdout, and to stderr."""
    def call(script, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        status = 0
        try:
            script.main()
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):  # as Python itself does after sys.exit("text")
                print(status, file=sys.stderr)
                status = 1
        except KeyboardInterrupt:  # which would end pytest
            pytest.fail("Ctrl-C came through")
        return status, *capsys.readouterr()
    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with 102 images."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train-images-idx3-ubyte").write_bytes(idx(blobs(102)))
    return folder


@pytest.fixture(scope="session")
def generator():
    """A generator that has seen some batches, so that its batch norm has statistics to use or to change."""
    torch.manual_seed(0)
    network = Generator()
    with torch.no_grad():
        for _ in range(5):
            network(3 + 2 * torch.randn(32, 64))
    return network


@pytest.fixture
def trained(tmp_path, generator):
    """The path of a generator.pt."""
    path = tmp_path / "generator.pt"
    torch.save({"settings": {"latent_dim": 64}, "average": generator.state_dict()}, path)
    return path


class Code:
    """Unpickled with pickle's own rules, it makes a folder where there must be none."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


BROKEN = {  # ways to make a checkpoint that no script may accept; `good` is one that sample.py would
    "missing": lambda path, good: None,
    "folder": lambda path, good: path.mkdir(),
    "empty": lambda path, good: path.touch(),
    "text": lambda path, good: path.write_text("epoch 3\n" * 100),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:-1000]),
    "list": lambda path, good: torch.save([1, 2, 3], path),
    "other settings": lambda path, good: torch.save({"settings": {"depth": 3}, "model": {}}, path),
    "other networks": lambda path, good: torch.save({"settings": {"latent_dim": 64}, "average": {}}, path),
    "code": lambda path, good: torch.save(torch.load(good) | {"more": Code(path.with_name("it ran"))}, path),
    "bare code": lambda path, good: path.write_bytes(pickle.dumps(Code(path.with_name("it ran")), protocol=2)),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path, trained):
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    BROKEN[request.param](path, trained)
    yield path
    assert not path.with_name("it ran").exists()
