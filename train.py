"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...

train() is the training loop. The functions below it write the log, open and save a run, load the
images, and read the command line.
"""
import argparse
import copy
import gzip
import io
import os
import tempfile
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
                 load_checkpoint, load_state, make_optimizer, pick_device, sample_latent,
                 update_average)
from plot_losses import plot
from sample import save_grid, save_training_animation

SHIPPED_DATA = Path(__file__).resolve().parent / "data"
# DCGAN uses batches of 128, which made no difference here in two runs. It found a learning rate of
# 0.001 too high, and used 0.0002. Here, 0.0002 gives more malformed digits (results/README.md). The
# limit is more images than any data set has. "" stands for SHIPPED_DATA, wherever the repository
# lies.
DEFAULTS = {"epochs": 10, "batch_size": 64, "lr": 0.001, "seed": 0, "limit": 10**9, "data": ""}
SMALLEST = {"epochs": 1, "batch_size": 1, "lr": 1e-30, "seed": 0, "limit": 1}
LARGEST = 2**63 - 1  # PyTorch's integers go no further
LOG_EVERY = 20  # a row of losses.csv is the mean of so many steps, or of fewer as an epoch ends


def train(epochs=None, device="auto", batch_size=None, lr=None, seed=None, limit=None, data=None,
          out="out", resume=False):
    """Train a GAN, save the files of the run in the folder `out`, and return the generator.

    The arguments are the options of train.py. For epochs, batch_size, lr, seed, limit and data,
    None stands for the setting of the run that is resumed, or else for the default. The returned
    generator has the averaged weights, and is in evaluation mode.

    Raises InputError for settings out of range and unsuitable files, OSError for files that cannot
    be read or written, and FloatingPointError if the training diverges.
    """
    device, out = pick_device(device), Path(os.path.expanduser(out))
    run, images = open_run(out, resume, {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "limit": limit,
        "data": data and os.path.abspath(os.path.expanduser(data))})
    settings = run["settings"]
    epochs, batch_size, seed = settings["epochs"], settings["batch_size"], settings["seed"]
    images = images.to(device)                                        # uint8 (60000, 1, 28, 28)
    steps_per_epoch = len(images) // batch_size  # images that do not fill a batch are left out

    torch.manual_seed(seed)  # for the first weights; each epoch has a seed of its own
    # On a CPU, the channels of a pixel are stored next to one another. This was faster once, and
    # makes no difference on the two machines of results/README.md ("Speed").
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    generator = Generator().to(device, memory_format=layout)
    discriminator = Discriminator().to(device, memory_format=layout)
    average = copy.deepcopy(generator).eval()  # the running average; the samples come from it
    g_optimizer = make_optimizer(generator, settings["lr"])
    d_optimizer = make_optimizer(discriminator, settings["lr"])
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if resume:
        for name, part in parts.items():
            load_state(part, run, name, out / "checkpoint.pt")
    # The same z after each epoch: the pictures in samples/ differ only because G has changed.
    fixed_z = sample_latent(64, random=torch.Generator().manual_seed(seed))
    save_grid(generate(average, fixed_z), out / f"samples/epoch_{run['epoch']:04d}.png")

    weights = [*generator.parameters(), *discriminator.parameters()]
    print(f"training on {device} for {epochs - run['epoch']} epochs of {steps_per_epoch} steps; "
          f"weights: {sum(map(torch.numel, generator.parameters())):,} in G, "
          f"{sum(map(torch.numel, discriminator.parameters())):,} in D", flush=True)
    for epoch in range(run["epoch"] + 1, epochs + 1):
        # This seed alone determines the order of the images and the latent vectors of an epoch. A
        # resumed run therefore continues with the same random numbers as an uninterrupted one. With
        # this factor, runs whose seeds differ by less than a million share none of these seeds.
        torch.manual_seed(seed + 1_000_000 * epoch)
        order = torch.randperm(len(images), device=device)[:steps_per_epoch * batch_size]
        # disable=None hides the bar if stderr is not a terminal.
        bar = tqdm(order.split(batch_size), f"epoch {epoch}/{epochs}", leave=False, disable=None)
        losses, logged = [], 0  # of the steps of this epoch, and how many of them are in the log
        started = time.perf_counter()
        # Steps are counted over all epochs, because the penalty and the average depend on them.
        for step, indices in enumerate(bar, start=(epoch - 1) * steps_per_epoch + 1):
            real = from_pixels(images[indices])                       # (batch_size, 1, 28, 28)
            losses.append(adversarial_step(
                generator, discriminator, g_optimizer, d_optimizer, real, step))
            update_average(average, generator, step)

            if len(losses) == logged + LOG_EVERY or len(losses) == steps_per_epoch:
                means = mean_losses(losses[logged:])
                logged = len(losses)
                add_row(out, run, epoch, step, means)
                check_finite(epoch, means, weights)
                bar.set_postfix(means, refresh=False)

        speed = len(order) / (time.perf_counter() - started)
        save_run(out, run, epoch, parts)
        save_grid(generate(average, fixed_z), out / f"samples/epoch_{epoch:04d}.png")
        means = mean_losses(losses)
        print(f"epoch {epoch}/{epochs}: d_loss {means['d_loss']:.3f}, g_loss {means['g_loss']:.3f},"
              f" D(x) {means['d_real']:.2f}, D(G(z)) {means['d_fake']:.2f}, {speed:.0f} images/s",
              flush=True)

    try:
        # It may be missing, or end with an epoch that was not saved.
        (out / "losses.csv").write_text(run["log"])
        save_training_animation(out / "samples", out / "digits_form.gif")
        plot(out / "losses.csv", out / "losses.png")
    except Exception as error:  # whatever is wrong with the pictures, the run is complete
        print(f"{out}: the animation or the plot was not drawn ({error!r})", flush=True)
    return average


def mean_losses(steps):
    """Average the dictionaries that adversarial_step returned, name by name."""
    # The losses of a step stay on the device until here. Reading them in every step would make the
    # CPU wait for a GPU each time.
    names = list(steps[0])
    losses = torch.stack([losses[name] for losses in steps for name in names])
    return dict(zip(names, losses.view(len(steps), len(names)).mean(dim=0).tolist()))


def add_row(out, run, epoch, step, means):
    """Add a row of mean losses to the log of a run, and write losses.csv."""
    if run["epoch"] == 0:  # no epoch is complete yet
        refuse_taken(out)  # another process may have been faster
    header = ",".join(["epoch", "step", *means])
    row = ",".join([f"{epoch},{step}", *(f"{mean:.5f}" for mean in means.values())])
    run["log"] = (run["log"] or header + "\n") + row + "\n"
    (out / "losses.csv").write_text(run["log"])


def check_finite(epoch, means, weights):
    """Stop a run whose losses or weights are infinite or NaN, before they reach a checkpoint."""
    total = sum(means.values()) + sum(weight.sum() for weight in weights)
    if not torch.isfinite(total):
        raise FloatingPointError(
            f"training diverged in epoch {epoch}: a loss or a weight is infinite or NaN. This "
            "epoch is not saved. Begin a new run with a lower learning rate (lr)")


def refuse_taken(out):
    """Raise InputError if the folder holds a complete epoch of a run."""
    # The picture is there before the other two: see save_run.
    names = ("checkpoint.pt", "generator.pt", "samples/epoch_0001.png")
    if any((out / name).exists() for name in names):
        raise InputError(f"{out} already holds a run; use --resume, another --out, or delete it")


def open_run(out, resume, given):
    """Return a run, new or from the folder `out`, and its images. Writes nothing.

    A run is the dictionary that checkpoint.pt holds: the number of complete epochs, the log, the
    settings, and, once it has been saved, the states of the networks and optimizers.
    """
    if resume:
        run = load_checkpoint(out / "checkpoint.pt", "epoch", "log", "settings")
    else:
        refuse_taken(out)
        run = {"epoch": 0, "log": "", "settings": {}}
    saved = run["settings"]
    given = {name: value for name, value in given.items() if value is not None}
    settings = DEFAULTS | saved | given
    for name, smallest in SMALLEST.items():
        # Python's own numbers, because load_checkpoint would refuse NumPy's.
        number = type(smallest)(settings[name])
        if number != settings[name] or not smallest <= number <= LARGEST:
            raise InputError(f"{name} {settings[name]!r}: use a number of type "
                             f"{type(smallest).__name__}, {smallest} to {LARGEST}")
        settings[name] = number
    images = load_images(settings["data"] or SHIPPED_DATA)[:settings["limit"]]
    settings["limit"] = len(images)
    settings["checksum of the images"] = zlib.crc32(images.contiguous().numpy())
    if settings["batch_size"] > len(images):
        raise InputError(f"batch_size {settings['batch_size']}: there are {len(images)} images")
    if settings["epochs"] < run["epoch"]:
        raise InputError(f"epochs {settings['epochs']}: this run already has {run['epoch']}")
    for name in saved:
        if name not in ("epochs", "data") and settings[name] != saved[name]:
            raise InputError(f"{name} {settings[name]}: the run in {out} has {saved[name]}, and "
                             "cannot go on with another; begin a new one with another --out")
    return run | {"settings": settings}, images


def save_run(out, run, epoch, parts):
    """Save a run after an epoch: generator.pt for sample.py, and checkpoint.pt for --resume."""
    states = {name: part.state_dict() for name, part in parts.items()}
    files = {"generator.pt": {"average": states["average"]},
             "checkpoint.pt": run | {"epoch": epoch} | states}
    # The new files are written beside the old ones, so that the old ones are kept if the disk is
    # full or the process is killed. Another process would use another temporary folder.
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for name, content in files.items():
            buffer = io.BytesIO()
            torch.save(content, buffer)  # torch.save to a path raises no OSError for a full disk
            Path(folder, name).write_bytes(buffer.getbuffer())
        if run["epoch"] == 0:
            refuse_taken(out)
            # Of two processes, only one can create this file. The other one gets an OSError.
            (out / "samples/epoch_0001.png").touch(exist_ok=False)
        for name in files:  # checkpoint.pt last, so that it is never ahead of generator.pt
            os.replace(Path(folder, name), out / name)
    run["epoch"] = epoch


def load_images(place):
    """Load the training images in a file or in a folder: uint8 (N, channels, height, width).

    The file has MNIST's format, IDX, with or without gzip. In a folder, it has MNIST's name,
    train-images-idx3-ubyte, with or without the ending .gz. Raises InputError if there is none.
    """
    place, name = Path(place), "train-images-idx3-ubyte"
    # torchvision stores MNIST in MNIST/raw, and some downloads have a folder around the file.
    paths = [place, place / f"{name}.gz", place / name, place / f"MNIST/raw/{name}.gz",
             place / f"MNIST/raw/{name}", place / name / name]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise InputError(f"{place} is no file, and holds no {name}; for a folder of pictures, see "
                         "the README, \"Your own images\"")
    content = found[0].read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):  # every gzip file begins with these bytes
            content = gzip.decompress(content)
        # Byte 3 says how many sizes follow: 3 for grey images (N, height, width), and 4 for colour
        # images (N, height, width, channels). Each size has 4 bytes. Then come the pixels.
        end = 4 + 4 * content[3]
        sizes = [int.from_bytes(content[i:i + 4], "big") for i in range(4, end, 4)]
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=end)
        return pixels.view([*sizes, 1][:4]).permute(0, 3, 1, 2)       # grey images have 1 channel
    except (EOFError, IndexError, RuntimeError, ValueError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{found[0]} is damaged, or holds no images in MNIST's format") from None


def main():
    parser = argparse.ArgumentParser(description="Train a GAN on MNIST.")
    # A setting that is left out is None: a run that is resumed has its own.
    add = parser.add_argument
    add("--epochs", type=int, help=f"total number of epochs (default: {DEFAULTS['epochs']})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--batch-size", type=int, help=f"images per step (default: {DEFAULTS['batch_size']})")
    add("--lr", type=float, help=f"learning rate of Adam (default: {DEFAULTS['lr']})")
    add("--seed", type=int, help=f"random seed (default: {DEFAULTS['seed']})")
    add("--limit", type=int, help="use only so many images, for a quick trial (default: all)")
    add("--data", help="folder or file with images (default: the MNIST that comes with train.py)")
    add("--out", default="out", help="folder for the files of the run (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    arguments = parser.parse_args()
    try:
        train(**vars(arguments))  # each option is an argument of train()
    except KeyboardInterrupt:
        parser.exit(130, "train.py: stopped. To go on, give the same command with --resume; or "
                         "without it, if no epoch was complete\n")
    except InputError as error:
        parser.exit(2, f"train.py: {error}\n")
    except (OSError, FloatingPointError) as error:
        parser.exit(1, f"train.py: {error}\n")
    checkpoint = Path(arguments.out, "generator.pt")
    print(f"{arguments.out}: the run is complete. To draw digits: "
          f'python sample.py --checkpoint "{checkpoint}" --out grid.png')


if __name__ == "__main__":
    main()
