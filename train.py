"""Train the GAN of gan.py on MNIST:  python train.py [--epochs N] [--device D] [--resume] ...

train() is the training loop, from the first weights to the last picture. In the folder --out it
writes losses.csv, a picture for each epoch in samples/, and checkpoint.pt, for sample.py and for
--resume; at the end losses.png and digits_form.gif.
"""
import argparse
import copy
import gzip
import math
import os
import time
import zlib
from pathlib import Path

# On Linux, PyTorch's threads wait for one another in a busy loop. With its default length, training
# can be many times slower while other programs keep the cores busy (results/README.md). PyTorch
# reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from PIL import Image
from tqdm.auto import tqdm

from gan import (Discriminator, Generator, InputError, adversarial_step, from_pixels, generate,
                 make_optimizer, sample_latent, update_average)
from plot_losses import plot
from sample import draw_grid, load_checkpoint, save_animation

MNIST = Path(__file__).resolve().parent / "data/MNIST/raw/train-images-idx3-ubyte.gz"
EPOCHS = 25
BATCH_SIZE = 64        # DCGAN uses 128, which makes half as many steps in an epoch
LEARNING_RATE = 0.002  # DCGAN uses 0.0002, which is too slow here (results/README.md)
LOG_EVERY = 20         # a row of losses.csv is the mean of so many steps
DEVICES = ["cpu"]      # what PyTorch can use here: the CPU, and "cuda" or "mps" if there is one
if torch.accelerator.is_available():
    DEVICES.append(torch.accelerator.current_accelerator().type)


def train(epochs=EPOCHS, device=DEVICES[-1], batch_size=BATCH_SIZE, lr=LEARNING_RATE, seed=0,
          limit=0, data=MNIST, out="out", resume=False):
    """Train a GAN, save the run in the folder `out`, and return the averaged generator.

    The arguments are the options of train.py. Raises InputError if one of them is unsuitable or the
    training diverges, and OSError if a file cannot be read or written.
    """
    path, log_path = Path(out, "checkpoint.pt"), Path(out, "losses.csv")
    if path.exists() and not resume:
        raise InputError(f"{out} already holds a run; use --resume, another --out, or delete it")
    images = load_images(data)[:limit or None]                        # uint8 (60000, 1, 28, 28)
    check("limit", limit, 0, 10**9)
    check("batch_size", batch_size, 1, len(images))
    check("lr", lr, 1e-9, 1)
    check("seed", seed, 0, 2**32 - 1)
    steps_per_epoch = len(images) // batch_size  # images that do not fill a batch are left out

    torch.manual_seed(seed)  # for the first weights; each epoch has a seed of its own
    generator, discriminator = Generator().to(device), Discriminator().to(device)
    average = copy.deepcopy(generator).eval()  # the running average; the samples come from it
    g_optimizer, d_optimizer = make_optimizer(generator, lr), make_optimizer(discriminator, lr)

    # A run is its settings (with a checksum of the images), the states of five objects, the number
    # of complete epochs, and the log.
    settings = dict(batch_size=batch_size, lr=lr, seed=seed, data=zlib.crc32(images.numpy()))
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    complete, log = 0, ""
    if resume:
        checkpoint = load_checkpoint(path, parts)
        if checkpoint["settings"] != settings:
            raise InputError(f"the run in {out} has {checkpoint['settings']}, and not {settings}")
        complete, log = checkpoint["epoch"], checkpoint["log"]
    check("epochs", epochs, max(complete, 1), 10**6)

    # The same z after each epoch: the pictures in samples/ differ only because G has changed.
    fixed_z = sample_latent(64, random=torch.Generator().manual_seed(seed))
    pictures = [Path(out, f"samples/epoch_{epoch:04d}.png") for epoch in range(epochs + 1)]
    pictures[0].parent.mkdir(parents=True, exist_ok=True)
    draw_grid(generate(average, fixed_z)).save(pictures[complete])
    log_path.write_text(log)  # a run that was stopped has rows of an epoch that is not complete
    print(f"training on {device} with {len(images)} images from {data}", flush=True)
    for epoch in range(complete + 1, epochs + 1):
        # This seed alone determines the order of the images and the latent vectors of an epoch, so
        # that a resumed run draws the same as one that was never stopped.
        torch.manual_seed(seed + 1_000_000 * epoch)
        order = torch.randperm(len(images))[:steps_per_epoch * batch_size]
        bar = tqdm(order.split(batch_size), f"epoch {epoch}/{epochs}", leave=False, disable=None)
        losses, started = [], time.time()
        # Steps are counted over all epochs, because the penalty and the average depend on them.
        for step, indices in enumerate(bar, start=(epoch - 1) * steps_per_epoch + 1):
            real = from_pixels(images[indices].to(device))            # (batch_size, 1, 28, 28)
            losses.append(adversarial_step(
                generator, discriminator, g_optimizer, d_optimizer, real, step))
            update_average(average, generator, step)

            if len(losses) % LOG_EVERY == 0 or len(losses) == steps_per_epoch:
                means = mean_losses(losses[-LOG_EVERY:])
                if not math.isfinite(sum(means.values())):
                    raise InputError(f"training diverged in epoch {epoch}; begin with a lower lr")
                bar.set_postfix(means, refresh=False)
                log = log or ",".join(["epoch", "step", *means]) + "\n"
                log += f"{epoch},{step}," + ",".join(f"{m:.5f}" for m in means.values()) + "\n"
                log_path.write_text(log)

        draw_grid(generate(average, fixed_z)).save(pictures[epoch])
        # The new file takes the old one's place when it is whole. So a run that is killed, or whose
        # disk is full, keeps its last complete epoch.
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"settings": settings, "epoch": epoch, "log": log, **states}, f"{path}.new")
        os.replace(f"{path}.new", path)
        shown = ", ".join(f"{name} {mean:.3f}" for name, mean in mean_losses(losses).items())
        print(f"epoch {epoch}/{epochs}: {shown}, {time.time() - started:.0f} s", flush=True)

    plot(log_path, Path(out, "losses.png"))
    frames = [Image.open(picture).copy() for picture in pictures if picture.exists()]
    save_animation(frames, Path(out, "digits_form.gif"), milliseconds=300)
    return average


def mean_losses(losses):
    """Average dictionaries that adversarial_step returned, name by name."""
    # The losses of a step stay on the device until here. Reading them in every step would make the
    # CPU wait for a GPU each time.
    table = torch.stack([torch.stack(list(step.values())) for step in losses])     # (steps, 4)
    return dict(zip(losses[0], table.mean(dim=0).tolist()))


def check(name, value, smallest, largest):
    """Raise InputError if a setting is out of range."""
    if not smallest <= value <= largest:
        raise InputError(f"{name} {value}: use {smallest} to {largest}")


def load_images(path):
    """Load a file in MNIST's format (IDX), with or without gzip: uint8 (N, channels, H, W).

    Raises InputError if it is no such file.
    """
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):  # every gzip file begins with these bytes
            content = gzip.decompress(content)
        # Byte 3 says how many sizes follow: 3 for grey images (N, height, width), and 4 for colour
        # images (N, channels, height, width). Each size has 4 bytes. Then come the pixels.
        end = 4 + 4 * content[3]
        sizes = [int.from_bytes(content[i:i + 4], "big") for i in range(4, end, 4)]
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=end)
        return pixels.view(sizes[0], -1, sizes[-2], sizes[-1])
    except Exception:  # each kind of damage has an exception of its own
        raise InputError(f"{path} is damaged, or holds no images in MNIST's format") from None


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="total number of epochs")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="where to train")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per step")
    add("--lr", type=float, default=LEARNING_RATE, help="learning rate of Adam")
    add("--seed", type=int, default=0, help="random seed")
    add("--limit", type=int, default=0, help="use only so many images, for a quick trial; 0: all")
    add("--data", default=MNIST, help="file with images in MNIST's format")
    add("--out", default="out", help="folder for the files of the run")
    add("--resume", action="store_true", help="continue the run in --out; repeat its options")
    try:
        train(**vars(parser.parse_args()))  # each option is an argument of train()
    except KeyboardInterrupt:
        parser.exit(130, "stopped; repeat the command, with --resume if an epoch is complete\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"train.py: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
