"""Generate new digits with a trained generator:  python sample.py [--out grid.png] ...

Without --checkpoint, the script uses out/checkpoint.pt, which train.py saves after each epoch, or
else the trained generator of this repository, results/generator.pt.
"""
import argparse
import math
from pathlib import Path

import numpy
import torch
from PIL import Image
from torchvision.utils import make_grid

from gan import N_CATEGORIES, Generator, InputError, generate, sample_latent

OWN = "out/checkpoint.pt"
SHIPPED = Path(__file__).resolve().parent / "results/generator.pt"


def load_checkpoint(path, parts):
    """Load into `parts`, networks and optimizers by name, their states from a file of train.py.

    Returns all that the file holds. Raises InputError if it is missing, damaged, or does not fit.
    """
    try:
        # weights_only: a file from a stranger cannot run code of its own.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:  # for another network, the message names its layers and shapes
        reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
        raise InputError(f"{path} is no checkpoint that fits gan.py: {reason:.300}") from None
    return checkpoint


def load_generator(path=SHIPPED):
    """Return the averaged generator in a checkpoint, in evaluation mode."""
    generator = Generator()
    load_checkpoint(path, {"average": generator})
    return generator.eval()


def draw_latents(count, seed, category=None):
    """Draw latent vectors (count, LATENT_DIM). The same seed gives the same ones."""
    return sample_latent(count, random=torch.Generator().manual_seed(seed), category=category)


def sample_digits(generator, count, seed=0, category=None):
    """Generate `count` digits, uint8 (count, 1, 28, 28), of one category or of all at random."""
    z = draw_latents(count, seed, category)
    return torch.cat([generate(generator, some) for some in z.split(1000)])  # to save memory


def interpolate(generator, count, seed=0, category=None, frames=60):
    """Move each digit along a closed curve in latent space: uint8 (frames, count, 1, 28, 28)."""
    # The category stays the same, because G was never trained on a value between two categories.
    # At every t, the noise has a standard normal distribution, as in training, because
    # cos² + sin² = 1. Halfway along a straight line from a to b, it would be shorter than nearly
    # all noise in training.
    a = draw_latents(count, seed, category)                           # (N, LATENT_DIM)
    b = draw_latents(count, seed + 1)
    t = torch.arange(frames).view(-1, 1, 1) * 2 * math.pi / frames
    z = t.cos() * a + t.sin() * b                                     # (frames, N, LATENT_DIM)
    z[:, :, :N_CATEGORIES] = a[:, :N_CATEGORIES]
    return torch.stack([generate(generator, z_of_frame) for z_of_frame in z])


def draw_grid(images):
    """Draw images, uint8 (N, 1 or 3, H, W), as one PIL image, a grid as square as possible."""
    grid = make_grid(images, nrow=math.ceil(math.sqrt(len(images))))  # grey becomes 3 channels
    return Image.fromarray(grid[:images.shape[1]].permute(1, 2, 0).squeeze(2).numpy())


def save_animation(pictures, path, milliseconds=50):
    """Save PIL images as an animated GIF that loops forever. Each is shown for milliseconds."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default="grid.png", help="a picture, a .gif animation or a .npy array")
    add("--count", type=int, default=100, help="number of digits")
    add("--seed", type=int, default=0, help="random seed")
    add("--category", type=int, choices=range(N_CATEGORIES), help="draw only this category")
    add("--checkpoint", default=OWN if Path(OWN).exists() else SHIPPED, help="a file of train.py")
    arguments = parser.parse_args()
    out, latents = arguments.out, (arguments.count, arguments.seed, arguments.category)
    if arguments.count < 1 or not 0 <= arguments.seed < 2**32:
        parser.error("use a --count from 1 on, and a --seed from 0 to 4294967295")
    try:
        generator = load_generator(arguments.checkpoint)
        if out.suffix == ".gif":
            save_animation([draw_grid(images) for images in interpolate(generator, *latents)], out)
        elif out.suffix == ".npy":
            numpy.save(out, sample_digits(generator, *latents).squeeze(1).numpy())
        else:
            draw_grid(sample_digits(generator, *latents)).save(out)
    except (OSError, ValueError, KeyError) as error:  # the last two: no such kind of picture
        parser.exit(2, f"sample.py: {' '.join(str(error).split())}\n")
    print(f"{out}: wrote {arguments.count} digits from {arguments.checkpoint}")


if __name__ == "__main__":
    main()
