"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...

The training loop is in train(). The functions below it load the images, save and restore
checkpoints, and read the command line.
"""
import argparse
import copy
import gzip
import io
import os
import shlex
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

if __name__ == "__main__":
    # Loading PyTorch takes several seconds. Ctrl-C ends the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torchvision.utils import save_image
from tqdm.auto import tqdm

from gan import (
    Discriminator,
    Generator,
    InputError,
    adversarial_step,
    generate,
    load_checkpoint,
    make_optimizer,
    pick_device,
    sample_latent,
    update_average,
)
from plot_losses import COLUMNS, plot

EPOCHS = 12
BATCH_SIZE = 64
LEARNING_RATE = 0.001  # DCGAN uses 0.0002 for its larger networks
LOG_EVERY = 20         # the number of steps that a row of losses.csv averages
SHIPPED_DATA = Path(__file__).resolve().parent / "data"


def train(epochs=EPOCHS, device="auto", batch_size=BATCH_SIZE, lr=LEARNING_RATE, seed=0, data=None,
          out="out", resume=False):
    """Train a GAN, save the files of the run in the folder `out`, and return the generator.

    The weights of the returned generator are the running average.

    data: a folder with images. None selects the MNIST files of this repository.
    resume: continue the run in `out` until it has `epochs` epochs. The arguments batch_size, lr,
    seed and data must be those of the run.

    Raises InputError for an unknown device, an unsuitable batch_size and unsuitable files, OSError
    for files that cannot be read or written, and FloatingPointError if the training diverges.
    """
    out = Path(out)
    log_path = out / "losses.csv"
    if not resume:
        refuse_to_overwrite(out)
    if data is not None:
        data = str(Path(data).resolve())  # absolute, so that --resume works from any folder
    device = pick_device(device)
    images = load_images(data or SHIPPED_DATA).to(device)             # uint8 (60000, 1, 28, 28)
    steps_per_epoch = count_steps(images, batch_size)

    torch.manual_seed(seed)
    generator = Generator().to(device, memory_format=memory_format(device))
    discriminator = Discriminator().to(device, memory_format=memory_format(device))
    average = copy.deepcopy(generator)
    g_optimizer = make_optimizer(generator, lr)
    d_optimizer = make_optimizer(discriminator, lr)
    fixed_z = sample_latent(64, random=torch.Generator().manual_seed(seed))  # for samples/
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "data": data}
    state = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    epochs_done = open_run(out, resume, settings, state)

    for epoch in range(epochs_done + 1, epochs + 1):
        # The order of the images and all latent vectors of an epoch depend on this seed alone. A
        # resumed run therefore continues with the same random numbers as an uninterrupted one.
        torch.manual_seed(seed + 1_000_000 * epoch)
        order = torch.randperm(len(images), device=device)[:steps_per_epoch * batch_size]
        first_step = (epoch - 1) * steps_per_epoch + 1
        last_step = epoch * steps_per_epoch
        recent = []
        started = time.perf_counter()
        # disable=None hides the bar if stderr is not a terminal.
        bar = tqdm(order.split(batch_size), f"epoch {epoch}/{epochs}", unit="step", leave=False,
                   disable=None)
        for step, indices in enumerate(bar, start=first_step):
            real = images[indices].float() / 127.5 - 1                # from [0, 255] to [-1, 1]
            losses = adversarial_step(
                generator, discriminator, g_optimizer, d_optimizer, real, step)
            update_average(average, generator, step)

            # The losses stay on the device until a row of losses.csv is complete. Reading them in
            # every step would make the CPU wait for a GPU each time.
            recent.append(losses)
            if len(recent) == LOG_EVERY or step == last_step:
                means = torch.stack(recent).mean(dim=0).cpu()
                d_loss, g_loss, d_real, d_fake = means.tolist()
                recent.clear()
                row = f"{epoch},{step},{d_loss:.5f},{g_loss:.5f},{d_real:.5f},{d_fake:.5f}\n"
                with open(log_path, "a") as file:
                    file.write(row)
                bar.set_postfix_str(f"d_loss {d_loss:.3f}, g_loss {g_loss:.3f}", refresh=False)
                check_finite(epoch, [means])

        check_finite(epoch, [*generator.parameters(), *discriminator.parameters()])
        speed = len(order) / (time.perf_counter() - started)
        samples = generate(average, fixed_z)                          # uint8 (64, 1, 28, 28)
        save_image(samples / 255, out / "samples" / f"epoch_{epoch:04d}.png", nrow=8)
        save_atomically({"average": average.state_dict()}, out / "generator.pt")
        save_checkpoint(out, epoch, log_path.read_text(), settings, state)
        print(f"epoch {epoch}/{epochs}: d_loss {d_loss:.3f}, g_loss {g_loss:.3f}, "
              f"D(x) {d_real:.2f}, D(G(z)) {d_fake:.2f}, {speed:.0f} images/s", flush=True)

    plot(log_path, out / "losses.png")
    return average


def memory_format(device):
    """Return the order in which weights and feature maps are stored in memory.

    On a CPU, the channels of a pixel are adjacent, because convolutions are then faster
    (results/README.md, "Speed"). Other devices keep PyTorch's usual order.
    """
    if device.type == "cpu":
        return torch.channels_last
    return torch.contiguous_format


def check_finite(epoch, tensors):
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"training diverged in epoch {epoch}: a loss or a weight is infinite or NaN. The "
                "checkpoint of the previous epoch is kept. Try a lower --lr, with another --out")


def count_steps(images, batch_size):
    """Return the number of steps in an epoch. Images that do not fill a batch are left out."""
    if not 1 <= batch_size <= len(images):
        raise InputError(f"--batch-size {batch_size}: use 1 to {len(images)}, because there are "
                         f"only {len(images)} images")
    return len(images) // batch_size


def load_images(folder):
    """Load the training images in a folder: uint8 (N, 1, 28, 28).

    The folder, or MNIST/raw in it, must contain the file train-images-idx3-ubyte in the format of
    MNIST, or the same file compressed, with the ending .gz. Raises InputError if it does not.
    """
    path = find_images(Path(folder))
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise InputError(f"{path} is damaged") from None
    # The file begins with four numbers: 0x803, the number of images, their height and their width.
    # Each byte after that is a pixel.
    count, rest = divmod(len(content) - 16, 28 * 28)
    if count < 1 or rest != 0 or content[:16] != struct.pack(">4i", 0x803, count, 28, 28):
        raise InputError(f"{path} is damaged, or it does not contain 28x28 images in the format of "
                         "MNIST")
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16)
    return pixels.view(count, 1, 28, 28)


def find_images(folder):
    name = "train-images-idx3-ubyte"
    raw = folder / "MNIST" / "raw"  # where torchvision stores MNIST
    for path in (folder / name, folder / f"{name}.gz", raw / name, raw / f"{name}.gz"):
        if path.exists():
            return path
    raise InputError(f"{folder} contains neither {name} nor {name}.gz; without --data, train.py "
                     "uses the MNIST files of this repository")


def refuse_to_overwrite(out):
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a folder")
    for name in ("checkpoint.pt", "generator.pt", "losses.csv", "losses.png", "samples"):
        if (out / name).exists():
            raise InputError(f"{out} already holds a run ({name}); choose another --out, or "
                             "continue it with --resume")


def open_run(out, resume, settings, state):
    """Begin a run in the folder `out`, or continue the one there with its networks and optimizers.

    Returns the number of finished epochs.
    """
    if resume:
        epochs_done, log = restore_checkpoint(out, settings, state)
    else:
        epochs_done, log = 0, ",".join(COLUMNS) + "\n"
        out.mkdir(parents=True, exist_ok=True)
    # Save now, so that a run that stops in its first epoch can be resumed, and so that a new
    # --epochs is kept.
    save_checkpoint(out, epochs_done, log, settings, state)

    (out / "samples").mkdir(exist_ok=True)
    (out / "losses.csv").write_text(log)  # without the rows of an unfinished epoch
    return epochs_done


def save_checkpoint(out, epoch, log, settings, state):
    """Write checkpoint.pt, which contains everything that --resume needs.

    log is the text of losses.csv.
    """
    checkpoint = {"epoch": epoch, "log": log, "settings": settings}
    for name, part in state.items():
        checkpoint[name] = part.state_dict()
    save_atomically(checkpoint, out / "checkpoint.pt")


def save_atomically(content, path):
    """Save like torch.save, but keep the old file if interrupted or if the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to a path, it would not raise OSError for a full disk
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(buffer.getbuffer())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_run(out):
    path = Path(out) / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"{out} has no checkpoint.pt, so there is no run to resume; to begin one, "
                         "leave --resume out")
    return load_checkpoint(path)


def restore_checkpoint(out, settings, state):
    """Load out/checkpoint.pt into the networks and optimizers. Returns its epoch and its log.

    Raises InputError if the checkpoint does not fit the networks or contradicts the settings.
    """
    checkpoint = load_run(out)
    try:
        epoch = checkpoint["epoch"]
        log = checkpoint["log"]
        saved = {name: checkpoint["settings"][name] for name in settings}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{out}/checkpoint.pt cannot be resumed: it is only a generator.pt, or it "
                         "was saved by another or an edited version of this program") from None
    for name, value in settings.items():
        if name != "epochs" and value != saved[name]:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {value} contradicts the run in {out}, which has {option} "
                             f"{saved[name]}; leave {option} out, or begin a new run with another "
                             "--out")
    if epoch > settings["epochs"]:
        raise InputError(f"--epochs {settings['epochs']}: the run in {out} already has {epoch} "
                         "epochs; give a larger number to continue it")
    return epoch, log


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a GAN on MNIST.")
    parser.add_argument("--epochs", type=int, default=EPOCHS,
                        help="total number of epochs (default: %(default)s, or that of the "
                             "resumed run)")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE,
                        help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE,
                        help="learning rate of Adam, for both networks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="random seed (default: %(default)s)")
    parser.add_argument("--data",
                        help="folder with images (default: MNIST, which comes with train.py)")
    parser.add_argument("--out", default="out",
                        help="folder for the files of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --out, with its settings")
    arguments = parser.parse_args()
    if arguments.resume:
        # Parse again, with the settings of the run as defaults. Only an option that the user typed
        # can then differ from them. restore_checkpoint() rejects such a difference, except in
        # --epochs.
        settings = load_run(arguments.out).get("settings")
        if isinstance(settings, dict) and settings.keys() <= vars(arguments).keys():
            parser.set_defaults(**settings)
            arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: use 1 or more")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size}: use 1 or more")
    # Adam doubles the learning rate in its first step, and float32 ends at 3.4e38. NaN fails too.
    if not 0 < arguments.lr < 1e38:
        parser.error(f"--lr {arguments.lr}: use a number above 0 and below 1e38")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed {arguments.seed}: use 0 to 2**63 - 1")
    return arguments


def how_to_continue(arguments):
    checkpoint = Path(arguments.out) / "checkpoint.pt"
    if not checkpoint.exists():
        return "nothing was saved yet; run the same command again"
    command = ["python", "train.py", "--resume", "--epochs", str(arguments.epochs),
               "--device", arguments.device, "--out", arguments.out]
    return f"continue with: {shlex.join(command)}"


def main():
    try:
        arguments = parse_arguments()
    except (OSError, InputError) as error:
        sys.exit(f"train.py: {error}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C raises KeyboardInterrupt
    try:
        train(**vars(arguments))  # each option is an argument of train()
    except KeyboardInterrupt:
        print(f"train.py: stopped; {how_to_continue(arguments)}", file=sys.stderr)
        sys.exit(130)
    except (OSError, InputError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    out = arguments.out
    print(f"{out}: the run is complete; see {out}/losses.png and {out}/samples. To draw digits: "
          f"python sample.py --checkpoint {shlex.quote(out + '/generator.pt')} --out grid.png")


if __name__ == "__main__":
    main()
