"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...

The training loop is in train(). The functions below it read images, keep checkpoints and read the
command line.
"""
import argparse
import copy
import io
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    def stop_while_loading(*_):
        sys.exit("train.py: stopped while PyTorch was loading; the same command begins again")

    signal.signal(signal.SIGINT, stop_while_loading)

import torch
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file
from torchvision.utils import save_image
from tqdm.auto import tqdm

from gan import (
    R1_INTERVAL,
    Discriminator,
    Generator,
    adversarial_step,
    generate,
    load_checkpoint,
    make_optimizer,
    pick_device,
    sample_latent,
    update_average,
)
from plot_losses import COLUMNS, plot

EPOCHS = 8              # passes over the images
BATCH_SIZE = 128        # images in a step
LEARNING_RATE = 0.0015  # DCGAN has 0.0002, for networks that are much larger than these
LOG_EVERY = 20          # steps in a row of losses.csv
SHIPPED_DATA = Path(__file__).resolve().parent / "data"


def train(epochs=EPOCHS, device="auto", batch_size=BATCH_SIZE, lr=LEARNING_RATE, seed=0, data=None,
          out="out", resume=False):
    """Train a GAN, write the files of the run into the folder `out`, return the averaged generator.

    data: a folder with images. None means MNIST, as it comes with this repository.
    resume: continue the run in `out` until it has `epochs` epochs in all.

    Raises ValueError for arguments or files that do not fit, OSError for files that cannot be read
    or written, and FloatingPointError if the training diverges.
    """
    out = Path(out)
    log = out / "losses.csv"
    if data is not None:
        data = str(data)  # a Path could not be loaded again from the checkpoint
    device = pick_device(device)
    images = load_images(data or SHIPPED_DATA).to(device)            # uint8 (60000, 1, 28, 28)
    steps_per_epoch = len(images) // batch_size                      # the images left over wait
    if steps_per_epoch == 0:
        raise ValueError(f"--batch-size {batch_size}: there are only {len(images)} images")

    torch.manual_seed(seed)
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    average = copy.deepcopy(generator)
    g_optimizer = make_optimizer(generator, lr)
    d_optimizer = make_optimizer(discriminator, lr)
    fixed_z = sample_latent(64, random=torch.Generator().manual_seed(seed))
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "data": data}
    state = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    epochs_done = open_run(out, resume, settings, state)

    for epoch in range(epochs_done + 1, epochs + 1):
        # Each epoch begins with a seed of its own, from which its order and its noise follow. So a
        # resumed run continues with the same random numbers as a run that was never stopped.
        torch.manual_seed(seed + 1_000_000 * epoch)
        order = torch.randperm(len(images), device=device)[:steps_per_epoch * batch_size]
        step = (epoch - 1) * steps_per_epoch
        started = time.perf_counter()
        recent = []
        bar = tqdm(order.split(batch_size), desc=f"epoch {epoch}/{epochs}", unit=" images",
                   unit_scale=batch_size, leave=False, disable=None)  # None: only on a terminal
        for batch in bar:
            step += 1
            real = images[batch].float() / 127.5 - 1                 # [0, 255] to tanh's [-1, 1]
            with precision(device):
                losses = adversarial_step(generator, discriminator, g_optimizer, d_optimizer, real,
                                          with_r1=step % R1_INTERVAL == 0)
            update_average(average, generator, step)

            recent.append(losses)                                    # not yet read from the device
            if len(recent) == LOG_EVERY or step == epoch * steps_per_epoch:
                d_loss, g_loss, d_real, d_fake = torch.stack(recent).mean(dim=0).tolist()
                recent.clear()
                append(log, f"{epoch},{step},{d_loss:.5f},{g_loss:.5f},{d_real:.5f},{d_fake:.5f}\n")
                bar.set_postfix_str(f"d_loss {d_loss:.3f}, g_loss {g_loss:.3f}", refresh=False)
                if not math.isfinite(d_loss + g_loss):
                    raise diverged(epoch)

        if not all_finite(generator, discriminator):
            raise diverged(epoch)
        speed = len(order) / (time.perf_counter() - started)
        print(f"epoch {epoch}/{epochs}: d_loss {d_loss:.3f}, g_loss {g_loss:.3f}, "
              f"D(x) {d_real:.2f}, D(G(z)) {d_fake:.2f}, {speed:.0f} images/s", flush=True)
        samples = generate(average, fixed_z).unsqueeze(1)            # uint8 (64, 1, 28, 28)
        save_image(samples / 255, out / "samples" / f"epoch_{epoch:04d}.png", nrow=8)
        save_checkpoint(out, epoch, log.stat().st_size, settings, state)

    plot(log, out / "losses.png")
    return average


def precision(device):
    """A context in which the layers compute in bfloat16, on a CPU that is fast at it.

    Weights and losses stay in float32. On other devices everything does. The cache of autocast is
    off, because it would hand G's update a copy of D's weights from before D's update.
    """
    fast = False
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not yet in PyTorch 2.6
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


def diverged(epoch):
    return FloatingPointError(
        f"training diverged in epoch {epoch}: a loss or a weight is no longer a finite number. "
        "The checkpoint of the epoch before is kept. Try a lower --lr, with another --out")


def all_finite(*networks):
    for network in networks:
        for weight in network.parameters():
            if not weight.isfinite().all():
                return False
    return True


def append(path, text):
    with open(path, "a") as file:
        file.write(text)


def load_images(folder=SHIPPED_DATA):
    """The training images in a folder: uint8 (N, 1, 28, 28). ValueError if there are none that fit.

    The folder has either the file train-images-idx3-ubyte itself, or MNIST/raw with the four .gz
    files of MNIST. torchvision checks these, unpacks them, and downloads those that are missing.
    """
    folder = Path(folder)
    path = folder / "train-images-idx3-ubyte"
    mnist = folder / "MNIST" / "raw"
    if not path.exists() and mnist.is_dir():
        path = mnist / "train-images-idx3-ubyte"
        if not path.exists():
            unpack_mnist(folder)
    if not path.exists():
        raise ValueError(f"{folder} has neither train-images-idx3-ubyte nor MNIST/raw; "
                         "without --data, train.py takes the MNIST that comes with it")
    try:
        images = read_image_file(path)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged, or it is not an IDX file of images; "
                         "if it is MNIST's, delete it, and it is unpacked anew") from None
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise ValueError(f"{path} has images of {width}x{height} pixels; the networks take 28x28")
    return images.unsqueeze(1)


def unpack_mnist(folder):
    try:
        MNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a .gz file in {folder}/MNIST/raw is missing or damaged, and no new one "
                         f"could be downloaded ({reason}); restore it with git checkout") from None


def open_run(out, resume, settings, state):
    """Begin a run in the folder `out`, or continue the one there. Returns its number of epochs."""
    if resume:
        epochs_done, log_size = restore_checkpoint(out, settings, state)
    else:
        for name in ("checkpoint.pt", "losses.csv", "samples"):
            if (out / name).exists():
                raise ValueError(f"{out} holds a run already; continue it with --resume, or choose "
                                 "another --out")
        out.mkdir(parents=True, exist_ok=True)
        epochs_done, log_size = 0, 0
        save_checkpoint(out, epochs_done, log_size, settings, state)

    (out / "samples").mkdir(exist_ok=True)
    with open(out / "losses.csv", "a") as log:
        if log.tell() < log_size:
            raise ValueError(f"{log.name} is shorter than it was after epoch {epochs_done}; "
                             "put back the rows that are missing, or choose another --out")
        log.truncate(log_size)  # without the rows of an epoch that was not finished
        if log_size == 0:
            log.write(",".join(COLUMNS) + "\n")
    return epochs_done


def save_checkpoint(out, epoch, log_size, settings, state):
    """Write generator.pt, which sample.py can use, and checkpoint.pt, which --resume needs, too."""
    checkpoint = {"epoch": epoch, "log_size": log_size, "settings": settings}
    for name, part in state.items():
        checkpoint[name] = part.state_dict()
    save_atomically({"average": checkpoint["average"]}, out / "generator.pt")
    save_atomically(checkpoint, out / "checkpoint.pt")


def save_atomically(content, path):
    """torch.save that leaves the old file as it was, should it be stopped or the disk be full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(buffer.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def restore_checkpoint(out, settings, state):
    """Load out/checkpoint.pt into the networks and optimizers. Returns its epoch and log_size.

    ValueError if it does not fit the networks or contradicts the settings.
    """
    path = out / "checkpoint.pt"
    checkpoint = load_checkpoint(path)
    try:
        epoch = checkpoint["epoch"]
        log_size = checkpoint["log_size"]
        saved = checkpoint["settings"]
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path} cannot be resumed: it is only a generator.pt, or it was saved by "
                         "another version of this program") from None
    for name, value in settings.items():
        if name != "epochs" and value != saved[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {value} contradicts the run in {out}, which has {option} "
                             f"{saved[name]}; leave {option} out, or begin another run with --out")
    if epoch > settings["epochs"]:
        raise ValueError(f"--epochs {settings['epochs']}: the run in {out} has {epoch} already")
    return epoch, log_size


def positive_int(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def positive_float(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def seed_number(text):
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return number


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a GAN on MNIST.")
    parser.add_argument("--epochs", type=positive_int, default=EPOCHS,
                        help="passes over the images, in all (default: %(default)s)")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=BATCH_SIZE,
                        help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=positive_float, default=LEARNING_RATE,
                        help="learning rate of Adam, for both networks (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0,
                        help="random seed (default: %(default)s)")
    parser.add_argument("--data",
                        help="folder with images (default: MNIST, which comes with train.py)")
    parser.add_argument("--out", default="out",
                        help="folder for the files of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --out, with its settings")
    arguments = parser.parse_args()
    if arguments.resume:
        # What was not typed comes from the run. What was typed is compared with it in train().
        checkpoint = load_checkpoint(Path(arguments.out) / "checkpoint.pt")
        parser.set_defaults(**checkpoint.get("settings", {}))
        arguments = parser.parse_args()
    return arguments


def how_to_continue(arguments):
    checkpoint = Path(arguments.out) / "checkpoint.pt"
    if not checkpoint.exists():
        return "nothing was saved yet; the same command begins again"
    command = ["python", "train.py", "--resume", "--epochs", str(arguments.epochs),
               "--device", arguments.device, "--out", arguments.out]
    return f"{checkpoint} has the last finished epoch; continue with: {shlex.join(command)}"


def main():
    try:
        arguments = parse_arguments()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt again
        train(**vars(arguments))
    except KeyboardInterrupt:
        print(f"train.py: stopped; {how_to_continue(arguments)}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    out = arguments.out
    print(f"{out}: the run is complete; see {out}/losses.png and {out}/samples. New digits: "
          f"python sample.py --checkpoint {shlex.quote(out + '/checkpoint.pt')} --out grid.png")


if __name__ == "__main__":
    main()
