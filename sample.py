"""Generate new digits with a trained generator:  python sample.py [--out grid.png] ...

Without --checkpoint, the script uses out/generator.pt, which train.py saves after each epoch. If
this file does not exist, the script uses the trained generator of this repository,
results/generator.pt.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

from gan import (
    CATEGORY_SCALE,
    N_CATEGORIES,
    Generator,
    InputError,
    generate,
    load_checkpoint,
    pick_device,
    sample_latent,
)

DIGITS_PER_BATCH = 100
FRAMES = 60      # the number of frames in an animation
FRAME_TIME = 50  # in milliseconds
SHIPPED_GENERATOR = Path(__file__).resolve().parent / "results" / "generator.pt"


def load_generator(path=SHIPPED_GENERATOR, device="cpu"):
    """Load the averaged generator from a checkpoint.pt or a generator.pt, in evaluation mode.

    Raises OSError if the file cannot be read, and InputError if it is neither of these files or
    does not fit the Generator in gan.py.
    """
    generator = Generator()
    average = load_checkpoint(path, "average")["average"]
    try:
        generator.load_state_dict(average)
    except (AttributeError, RuntimeError, TypeError):
        raise InputError(f"{path} does not fit the Generator in gan.py: it was saved by another "
                         "version of that file, or by an edited one") from None
    return generator.to(device).eval()


def draw_latents(count, seed, category=None):
    """Draw latent vectors for at least `count` digits, in whole batches: floats (M, LATENT_DIM).

    With a category, 0 to N_CATEGORIES - 1, all vectors have that one. Their noise stays the same.
    """
    random = torch.Generator().manual_seed(seed)
    batches = [sample_latent(DIGITS_PER_BATCH, random=random)
               for _ in range(0, count, DIGITS_PER_BATCH)]
    z = torch.cat(batches)
    if category is not None:
        one_hot = F.one_hot(torch.tensor(category), N_CATEGORIES)
        z[:, :N_CATEGORIES] = CATEGORY_SCALE * one_hot
    return z


def sample_digits(generator, count, seed=0, category=None):
    """Generate `count` digits as uint8 (count, 1, 28, 28). The same seed gives the same digits."""
    # PyTorch may round differently in a batch of another size, and a digit would then depend on
    # `count`. Therefore all batches are whole, and the surplus digits are dropped.
    z = draw_latents(count, seed, category)
    digits = [generate(generator, batch) for batch in z.split(DIGITS_PER_BATCH)]
    return torch.cat(digits)[:count]


def interpolate(generator, count, seed=0, category=None):
    """Move each digit along a closed curve in latent space: uint8 (FRAMES, count, 1, 28, 28).

    The first frame shows the digits of sample_digits.
    """
    z = draw_latents(count, seed, category)[:count]
    # The category stays the same, because G was never trained on a value between two categories.
    # A category can produce several similar digits, so a 4 may still turn into a 9.
    a = z[:, N_CATEGORIES:].clone()
    b = draw_latents(count, seed + 1)[:count, N_CATEGORIES:]
    frames = []
    for frame in range(FRAMES):
        t = 2 * math.pi * frame / FRAMES
        # Because cos² + sin² = 1, this noise has a standard normal distribution at every t, as in
        # training. Halfway along a straight line from a to b, it would be shorter than nearly all
        # noise in training.
        z[:, N_CATEGORIES:] = math.cos(t) * a + math.sin(t) * b
        frames.append(generate(generator, z))
    return torch.stack(frames)


def draw_grid(images):
    """Draw images, uint8 (N, 1, 28, 28), as a picture: a grid that is as square as possible."""
    columns = math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns)  # three identical channels
    return Image.fromarray(grid[0].numpy())


def save_grid(images, path):
    """Save images, uint8 (N, 1, 28, 28), as a grid."""
    draw_grid(images).save(path)


def save_animation(frames, path):
    """Save frames, uint8 (F, N, 1, 28, 28), as an animated GIF of F grids that loops forever."""
    pictures = [draw_grid(images) for images in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_TIME, loop=0)


def save_array(images, path):
    """Save images, uint8 (N, 1, 28, 28), as a NumPy array (N, 28, 28)."""
    with open(path, "wb") as file:  # numpy.save(path) would turn .NPY into .NPY.npy
        numpy.save(file, images.squeeze(1).numpy())


def parse_arguments():
    parser = argparse.ArgumentParser(description="Generate new digits with a trained generator.")
    parser.add_argument("--out", default="grid.png",
                        help="output: a .png grid, a .gif animation, or a .npy array, uint8 "
                             "(count, 28, 28) (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100,
                        help="number of digits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="random seed (default: %(default)s)")
    parser.add_argument("--category", type=int,
                        help=f"draw only this category, 0 to {N_CATEGORIES - 1}; most draw one "
                             "digit, or a few similar ones (default: all, at random)")
    parser.add_argument("--checkpoint",
                        help="a checkpoint.pt or generator.pt (default: out/generator.pt if it "
                             "exists, else results/generator.pt)")
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    arguments = parser.parse_args()
    suffix = Path(arguments.out).suffix.lower()
    if suffix not in (".png", ".gif", ".npy"):
        parser.error(f"--out {arguments.out}: the name must end in .png, .gif or .npy")
    most = 100_000
    if suffix == ".gif":
        most = 400
    if not 1 <= arguments.count <= most:
        parser.error(f"--count {arguments.count}: use 1 to {most} for a {suffix} file")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed {arguments.seed}: use 0 to 2**63 - 1")
    if arguments.category is not None and not 0 <= arguments.category < N_CATEGORIES:
        parser.error(f"--category {arguments.category}: use 0 to {N_CATEGORIES - 1}")
    if arguments.checkpoint is None:
        arguments.checkpoint = Path("out/generator.pt")
        if not arguments.checkpoint.exists():
            arguments.checkpoint = SHIPPED_GENERATOR
    return arguments


def main():
    arguments = parse_arguments()
    out = Path(arguments.out)
    count, seed, category = arguments.count, arguments.seed, arguments.category
    try:
        generator = load_generator(arguments.checkpoint, pick_device(arguments.device))
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix.lower() == ".gif":
            save_animation(interpolate(generator, count, seed, category), out)
        elif out.suffix.lower() == ".npy":
            save_array(sample_digits(generator, count, seed, category), out)
        else:
            save_grid(sample_digits(generator, count, seed, category), out)
    except (OSError, InputError) as error:
        sys.exit(f"sample.py: {error}")
    print(f"{out}: wrote {count} digits from the generator in {arguments.checkpoint}, seed {seed}")


if __name__ == "__main__":
    main()
