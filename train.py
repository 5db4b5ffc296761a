"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...

The training loop is in train(). The functions below it keep the files of a run, load the images,
and read the command line.
"""
import argparse
import copy
import gzip
import io
import math
import os
import shlex
import struct
import sys
import time
import zlib
from pathlib import Path

# On Linux, PyTorch's threads wait for one another in a busy loop. With the default length of this
# loop, training is more than ten times slower while another program keeps one of the cores busy
# (results/README.md, "Speed"). PyTorch reads the setting when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from tqdm.auto import tqdm

from gan import (Discriminator, Generator, InputError, adversarial_step, from_pixels, generate,
                 load_checkpoint, make_optimizer, pick_device, sample_latent, update_average)
from plot_losses import plot
from sample import save_grid

SHIPPED_DATA = Path(__file__).resolve().parent / "data"
DEFAULTS = {
    "epochs": 10,
    "batch_size": 64,
    "lr": 0.001,   # DCGAN uses 0.0002 for its larger networks
    "seed": 0,
    "data": "",    # SHIPPED_DATA, wherever this repository is
}
LOG_EVERY = 20     # steps in a row of losses.csv; the last row of an epoch can have fewer


def train(epochs=None, device="auto", batch_size=None, lr=None, seed=None, data=None, out="out",
          resume=False):
    """Train a GAN, save the files of the run in the folder `out`, and return the generator.

    The arguments are the options of train.py. None stands for the setting of the run that is
    resumed, or else for the default. The returned generator has the averaged weights, and is in
    evaluation mode.

    Raises InputError for unsuitable arguments and files, OSError for files that cannot be read or
    written, and FloatingPointError if the training diverges.
    """
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "data": data}
    device = pick_device(device)
    settings, images, checkpoint = prepare_run(out, given, resume)
    epochs, batch_size, seed = settings["epochs"], settings["batch_size"], settings["seed"]
    images = images.to(device)                                        # uint8 (60000, 1, 28, 28)
    steps_per_epoch = len(images) // batch_size  # images that do not fill a batch are left out

    torch.manual_seed(seed)  # for the first weights; each epoch has a seed of its own
    generator = Generator().to(device, memory_format=memory_format(device))
    discriminator = Discriminator().to(device, memory_format=memory_format(device))
    average = copy.deepcopy(generator).eval()  # the running average; the samples come from it
    g_optimizer = make_optimizer(generator, settings["lr"])
    d_optimizer = make_optimizer(discriminator, settings["lr"])
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    out = Path(out)
    if resume:
        epochs_done, log = restore(out, checkpoint, parts)
    else:
        epochs_done, log = 0, ""
        claim(out)
    # The same z after each epoch: the pictures in samples/ differ only because G has changed.
    fixed_z = sample_latent(64, random=torch.Generator().manual_seed(seed))
    # Save now, so that a run can be resumed even if it stops in its first epoch, and so that a
    # resumed run keeps a new --epochs or --data. epoch_0000.png shows an untrained generator.
    save_run(out, epochs_done, log, settings, parts, generate(average, fixed_z))
    g_size, d_size = [sum(weight.numel() for weight in network.parameters())
                      for network in (generator, discriminator)]
    print(f"training on {device} for {epochs} epochs of {steps_per_epoch} steps; weights: "
          f"{g_size:,} in G, {d_size:,} in D", flush=True)

    weights = [*generator.parameters(), *discriminator.parameters()]
    for epoch in range(epochs_done + 1, epochs + 1):
        # This seed alone determines the order of the images and the latent vectors of an epoch. A
        # resumed run therefore continues with the same random numbers as an uninterrupted one. The
        # factor keeps runs with neighbouring seeds from sharing the seed of an epoch.
        torch.manual_seed(seed + 1_000_000 * epoch)
        order = torch.randperm(len(images), device=device)[:steps_per_epoch * batch_size]
        # Steps are counted over all epochs, because the penalty and the average depend on them.
        first_step = (epoch - 1) * steps_per_epoch + 1
        last_step = epoch * steps_per_epoch
        epoch_losses, row_losses = [], []
        started = time.perf_counter()
        # disable=None hides the bar if stderr is not a terminal.
        bar = tqdm(order.split(batch_size), f"epoch {epoch}/{epochs}", unit="step", leave=False,
                   disable=None)
        for step, indices in enumerate(bar, start=first_step):
            real = from_pixels(images[indices])                       # (batch_size, 1, 28, 28)
            losses = adversarial_step(
                generator, discriminator, g_optimizer, d_optimizer, real, step)
            update_average(average, generator, step)

            epoch_losses.append(losses)
            row_losses.append(losses)
            if len(row_losses) == LOG_EVERY or step == last_step:
                means = mean_losses(row_losses)
                row_losses = []
                log = add_row(log, epoch, step, means)
                (out / "losses.csv").write_text(log)
                check_finite(epoch, means.values())
                bar.set_postfix_str(f"d_loss {means['d_loss']:.2f}, g_loss {means['g_loss']:.2f}",
                                    refresh=False)

        check_finite(epoch, [weight.sum().item() for weight in weights])
        speed = len(order) / (time.perf_counter() - started)
        save_run(out, epoch, log, settings, parts, generate(average, fixed_z))
        means = mean_losses(epoch_losses)
        print(f"epoch {epoch}/{epochs}: d_loss {means['d_loss']:.3f}, g_loss {means['g_loss']:.3f},"
              f" D(x) {means['d_real']:.2f}, D(G(z)) {means['d_fake']:.2f}, {speed:.0f} images/s",
              flush=True)

    try:
        plot(out / "losses.csv", out / "losses.png")
    except Exception as error:  # whatever is wrong with matplotlib, the run is complete
        print(f"{out}/losses.png was not drawn ({error!r}); draw it later with: "
              f"python plot_losses.py --csv {shlex.quote(str(out / 'losses.csv'))}", flush=True)
    return average


def memory_format(device):
    """Return the order in which weights and feature maps are stored in memory."""
    if device.type == "cpu":
        # The channels of a pixel are adjacent, because convolutions are then faster on some CPUs
        # (results/README.md, "Speed").
        return torch.channels_last
    return torch.contiguous_format


def mean_losses(steps):
    """Average the dictionaries that adversarial_step returned, name by name."""
    # The losses of a step stay on the device until here. Reading them in every step would make the
    # CPU wait for a GPU each time.
    names = list(steps[0])
    losses = torch.stack([losses[name] for losses in steps for name in names])
    means = losses.view(len(steps), len(names)).mean(dim=0)
    return dict(zip(names, means.tolist()))


def add_row(log, epoch, step, means):
    """Add a row of mean losses to the log, the text of losses.csv. Returns the new text."""
    if not log:
        log = ",".join(["epoch", "step", *means]) + "\n"
    return log + ",".join([f"{epoch},{step}", *(f"{mean:.5f}" for mean in means.values())]) + "\n"


def check_finite(epoch, numbers):
    """Stop a run whose losses or weights are infinite or NaN, before they reach a checkpoint."""
    if not all(map(math.isfinite, numbers)):
        raise FloatingPointError(
            f"training diverged in epoch {epoch}: a loss or a weight is infinite or NaN. The "
            "last checkpoint is kept. Begin a new run with a lower --lr and another --out")


def require(condition, message):
    if not condition:
        raise InputError(message)


def prepare_run(out, given, resume):
    """Return the settings of a run, its images, and the checkpoint to resume (None for a new run).

    given: the settings that the user chose. The others are None. Writes nothing.
    """
    require(str(out), "--out is empty; name a folder")
    checkpoint, saved = None, {}
    if resume:
        path = Path(out) / "checkpoint.pt"
        require(path.exists(), f"{out} has no checkpoint.pt, so there is no run to resume; to "
                               "begin one, leave --resume out and choose another --out")
        checkpoint = load_checkpoint(path, "epoch", "log", "settings")
        saved = checkpoint["settings"]
        require(isinstance(saved, dict) and saved.keys() == {*DEFAULTS, "images"},
                f"{path} was saved by another version of this program and cannot be resumed")
    settings = DEFAULTS | saved
    if given["data"] is not None:
        given["data"] = Path(given["data"]).resolve()  # so that --resume works anywhere
    for name, value in given.items():
        if value is not None:
            # load_checkpoint refuses NumPy's numbers, so each becomes one of the default's type.
            settings[name] = type(DEFAULTS[name])(value)
            require(not isinstance(DEFAULTS[name], int) or settings[name] == value,
                    f"{option(name)} {value}: use a whole number")
    images = load_images(settings["data"] or SHIPPED_DATA)
    settings["images"] = f"{len(images)} {zlib.crc32(images.numpy())}"

    require(settings["epochs"] >= 1, f"--epochs {settings['epochs']}: use 1 or more")
    require(1 <= settings["batch_size"] <= len(images), f"--batch-size {settings['batch_size']}: "
            f"use 1 to {len(images)}, because there are {len(images)} images")
    # Adam computes lr / (1 - beta1), which must fit float32.
    require(0 < settings["lr"] < 1e38, f"--lr {settings['lr']}: use a number between 0 and 1e38")
    require(0 <= settings["seed"] < 2**63, f"--seed {settings['seed']}: use 0 to 2**63 - 1")
    if resume:
        for name in ("batch_size", "lr", "seed"):
            require(settings[name] == saved[name], f"{option(name)} {settings[name]}: the run in "
                    f"{out} has {option(name)} {saved[name]}; for another value, use another --out")
        require(settings["images"] == saved["images"], f"the run in {out} began with other images "
                f"than those in {settings['data'] or SHIPPED_DATA}; say with --data where they are")
        require(settings["epochs"] >= checkpoint["epoch"], f"--epochs {settings['epochs']}: the "
                f"run in {out} already has {checkpoint['epoch']} epochs; give a larger number")
    return settings, images, checkpoint


def option(name):
    return "--" + name.replace("_", "-")


def claim(out):
    """Make the folder of a new run. Of several processes, only one can do this."""
    taken = f"{out} already holds a run; continue it (--resume), or choose another --out"
    for name in ("checkpoint.pt", "generator.pt", "losses.csv", "losses.png"):
        require(not (out / name).exists(), taken)
    try:
        (out / "samples").mkdir(parents=True)
    except FileExistsError:
        raise InputError(taken) from None


def restore(out, checkpoint, parts):
    """Load the networks and optimizers of a run. Returns its number of epochs and its log."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{out}/checkpoint.pt does not fit the networks in gan.py, which may have "
                         "been edited since then") from None
    (out / "samples").mkdir(exist_ok=True)
    return checkpoint["epoch"], checkpoint["log"]


def save_run(out, epoch, log, settings, parts, samples):
    """Save the files of a run. checkpoint.pt holds everything that --resume needs."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_grid(samples, out / "samples" / f"epoch_{epoch:04d}.png")
    (out / "losses.csv").write_text(log)  # this removes the rows of an unfinished epoch
    if epoch > 0:
        save_atomically({"average": states["average"]}, out / "generator.pt")
    save_atomically({"epoch": epoch, "log": log, "settings": settings, **states},
                    out / "checkpoint.pt")


def save_atomically(content, path):
    """Save like torch.save, but keep the old file if interrupted or if the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # torch.save to a path does not raise OSError for a full disk
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(buffer.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_images(place):
    """Load the training images in a file or in a folder: uint8 (N, 1, 28, 28).

    The file is in the format of MNIST, and may be compressed with gzip. In a folder, its name is
    train-images-idx3-ubyte, or the same with the ending .gz. Raises InputError if there are no such
    images.
    """
    path = find_images(Path(place))
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):  # every gzip file begins with these bytes
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise InputError(f"{path} is damaged") from None
    # The file begins with four numbers: 0x803, the number of images, their height and their width.
    # Each byte after that is a pixel.
    count, rest = divmod(len(content) - 16, 28 * 28)
    header = struct.pack(">4i", 0x803, max(count, 1), 28, 28)
    require(rest == 0 and content.startswith(header),
            f"{path} is damaged, or it does not contain 28x28 images in the format of MNIST")
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16)
    return pixels.view(count, 1, 28, 28)


def find_images(place):
    name = "train-images-idx3-ubyte"
    # torchvision stores MNIST in MNIST/raw, and some downloads have a folder around the file.
    for folder in (place, place / "MNIST" / "raw", place / name):
        for path in (place, folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise InputError(f"{place} is no file, and contains neither {name} nor {name}.gz; say with "
                     "--data where the images are")


def parse_arguments():
    # An option that is left out is None here. train() knows the defaults.
    parser = argparse.ArgumentParser(description="Train a GAN on MNIST.")
    add = parser.add_argument
    add("--epochs", type=int, help=f"total number of epochs (default: {DEFAULTS['epochs']})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--batch-size", type=int, help=f"images per step (default: {DEFAULTS['batch_size']})")
    add("--lr", type=float, help=f"learning rate of Adam (default: {DEFAULTS['lr']})")
    add("--seed", type=int, help=f"random seed (default: {DEFAULTS['seed']})")
    add("--data", help="folder or file with images (default: the MNIST that comes with train.py)")
    add("--out", default="out", help="folder for the files of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    out = arguments.out
    try:
        train(**vars(arguments))  # each option is an argument of train()
    except KeyboardInterrupt:
        advice = "nothing was saved yet; begin again, with another --out if this one is refused"
        if (Path(out) / "checkpoint.pt").exists():
            advice = "continue with: python train.py " + shlex.join(sys.argv[1:])
            if not arguments.resume:
                advice += " --resume"
        print(f"train.py: stopped; {advice}", file=sys.stderr)
        sys.exit(130)
    except (OSError, InputError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if not any(sign in repr(error) for sign in ("MemoryError", "of memory", "allocate memory")):
            raise
        sys.exit("train.py: not enough memory; try --device cpu, or a new run with a smaller "
                 "--batch-size and another --out")
    print(f"{out}: the run is complete; see {out}/losses.png and {out}/samples. To draw digits: "
          f"python sample.py --checkpoint {shlex.quote(out + '/generator.pt')} --out grid.png")


if __name__ == "__main__":
    main()
