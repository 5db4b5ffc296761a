"""Generate new digits with a trained generator:  python sample.py [--out grid.png] ...

Without --checkpoint, the script uses out/generator.pt, which train.py saves after each epoch. If
this file does not exist, the script uses the trained generator of this repository,
results/generator.pt.
"""
import argparse
import math
import os
from pathlib import Path

import numpy
import torch
from PIL import Image
from torchvision.utils import make_grid

from gan import (N_CATEGORIES, Generator, InputError, generate, load_checkpoint, load_state,
                 pick_device, sample_latent, split_latent)

DIGITS_PER_BATCH = 100
FRAMES = 60  # the number of frames in an animation of changing digits; it takes three seconds
SHIPPED_GENERATOR = Path(__file__).resolve().parent / "results" / "generator.pt"


def load_generator(path=SHIPPED_GENERATOR, device="cpu"):
    """Load the averaged generator from a checkpoint.pt or a generator.pt, in evaluation mode.

    Raises OSError if the file cannot be read, and InputError if it is neither of these files or
    does not fit the Generator in gan.py.
    """
    generator = Generator()
    load_state(generator, load_checkpoint(path, "average"), "average", path)
    return generator.to(device).eval()


def draw_latents(count, seed, category=None):
    """Draw latent vectors for at least `count` digits, in whole batches: floats (M, LATENT_DIM)."""
    random = torch.Generator().manual_seed(int(seed))
    return torch.cat([sample_latent(DIGITS_PER_BATCH, random=random, category=category)
                      for _ in range(0, count, DIGITS_PER_BATCH)])


def sample_digits(generator, count, seed=0, category=None):
    """Generate `count` digits, uint8 (count, 1, 28, 28), of one category or of all at random.

    The same seed gives the same digits. Raises InputError for a category that does not exist.
    """
    # PyTorch may round differently in a batch of another size, and a digit would then depend on
    # `count`. Therefore all batches are whole, and the surplus digits are dropped.
    z = draw_latents(count, seed, category)
    digits = [generate(generator, batch) for batch in z.split(DIGITS_PER_BATCH)]
    return torch.cat(digits)[:count]


def interpolate(generator, count, seed=0, category=None):
    """Move each digit along a closed curve in latent space: uint8 (FRAMES, count, 1, 28, 28).

    The first frame shows the digits of sample_digits.
    """
    # The category stays the same, because G was never trained on a value between two categories.
    # A category can produce several similar digits, so a 4 may still turn into a 9.
    categories, a = split_latent(draw_latents(count, seed, category)[:count])
    _, b = split_latent(draw_latents(count, seed + 1)[:count])
    frames = []
    for frame in range(FRAMES):
        t = 2 * math.pi * frame / FRAMES
        # Because cos² + sin² = 1, this noise has a standard normal distribution at every t, as in
        # training. Halfway along a straight line from a to b, it would be shorter than nearly all
        # noise in training.
        noise = math.cos(t) * a + math.sin(t) * b
        frames.append(generate(generator, torch.cat([categories, noise], dim=1)))
    return torch.stack(frames)


def draw_grid(images):
    """Draw images, uint8 (N, 1 or 3, H, W) or (N, H, W), as a grid, as square as possible."""
    if images.ndim == 3:
        images = images.unsqueeze(1)  # make_grid would take them for one image
    columns = math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns)  # three channels, which are identical for grey images
    return Image.fromarray(grid[:images.shape[1]].permute(1, 2, 0).squeeze(2).numpy())


def save_grid(images, path):
    """Save images, uint8 (N, 1 or 3, H, W) or (N, H, W), as a grid."""
    draw_grid(images).save(path)


def save_animation(pictures, path, milliseconds):
    """Save PIL images as an animated GIF that loops forever. Each is shown for some time."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def save_training_animation(folder, path):
    """Save the pictures epoch_0000.png, epoch_0001.png, ... in a folder as an animated GIF."""
    # By length first, so that epoch_10000 comes after epoch_9999.
    paths = sorted(Path(folder).glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    every = math.ceil(len(paths) / 100)  # a long run leaves some epochs out, but never the last one
    pictures = [Image.open(path) for path in reversed(paths[::-every])]
    save_animation(pictures, path, milliseconds=300)


def save_array(images, path):
    """Save images, uint8 (N, C, H, W), as a NumPy array: (N, H, W) if grey, else (N, H, W, C)."""
    with open(path, "wb") as file:  # numpy.save(path) would turn .NPY into .NPY.npy
        numpy.save(file, images.permute(0, 2, 3, 1).squeeze(3).numpy())


def main():
    parser = argparse.ArgumentParser(description="Generate new digits with a trained generator.")
    add = parser.add_argument
    add("--out", default="grid.png", help="output: a .png grid, a .gif animation, or a .npy array "
                                          "of bytes (default: %(default)s)")
    add("--count", type=int, default=100, help="number of digits (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--category", type=int, help=f"draw only this category, of {N_CATEGORIES} from 0 on; most "
                                     "draw one digit, or a few similar ones (default: all)")
    add("--checkpoint", help="a checkpoint.pt or generator.pt (default: out/generator.pt if it "
                             "exists, else results/generator.pt)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    arguments = parser.parse_args()
    out = Path(os.path.expanduser(arguments.out))
    count, seed, category = arguments.count, arguments.seed, arguments.category
    suffix = out.suffix.lower()
    most = {".png": 100_000, ".npy": 100_000, ".gif": 400}  # more would take minutes
    if suffix not in most:
        parser.error(f"--out {out}: the name must end in .png, .gif or .npy")
    if not 1 <= count <= most[suffix]:
        parser.error(f"--count {count}: use 1 to {most[suffix]} for a {suffix} file")
    if not 0 <= seed < 2**63:
        parser.error(f"--seed {seed}: use 0 to 2**63 - 1")
    path, reason = SHIPPED_GENERATOR, " (it comes with the program; there is no out/generator.pt)"
    if arguments.checkpoint or Path("out/generator.pt").exists():
        path, reason = os.path.expanduser(arguments.checkpoint or "out/generator.pt"), ""
    try:
        generator = load_generator(path, pick_device(arguments.device))
        if suffix == ".gif":
            frames = interpolate(generator, count, seed, category)
        else:
            digits = sample_digits(generator, count, seed, category)
        out.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".gif":
            save_animation([draw_grid(images) for images in frames], out, milliseconds=50)
        elif suffix == ".npy":
            save_array(digits, out)
        else:
            save_grid(digits, out)
    except InputError as error:
        parser.exit(2, f"sample.py: {error}\n")
    except OSError as error:
        parser.exit(1, f"sample.py: {error}\n")
    print(f"{out}: wrote {count} digits, seed {seed}, from the generator {path}{reason}")


if __name__ == "__main__":
    main()
