"""Generate new digits with a trained generator:  python sample.py --out grid.png

Without --checkpoint, the script uses out/generator.pt, which train.py saves after each epoch. If
this file does not exist, the script uses the trained generator of this repository,
results/generator.pt.
"""
import argparse
import math
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Loading PyTorch takes several seconds. Ctrl-C ends the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy
import torch
from PIL import Image
from torchvision.utils import make_grid, save_image

from gan import (
    N_CATEGORIES,
    Generator,
    InputError,
    generate,
    load_checkpoint,
    pick_device,
    sample_latent,
)

BATCH_SIZE = 100  # the number of digits in one call of the generator
FRAMES = 60       # the number of frames in an animation
FRAME_TIME = 50   # in milliseconds
SHIPPED_GENERATOR = Path(__file__).resolve().parent / "results" / "generator.pt"


def load_generator(path=SHIPPED_GENERATOR, device="cpu"):
    """Load the averaged generator from a checkpoint.pt or a generator.pt.

    Raises InputError if the file is neither, or if it does not fit the Generator in gan.py.
    """
    generator = Generator()
    try:
        generator.load_state_dict(load_checkpoint(path)["average"])
    except (AttributeError, RuntimeError, TypeError):
        raise InputError(f"{path} does not fit the Generator in gan.py: it was saved by another "
                         "version of that file, or by an edited one") from None
    return generator.to(device)


def sample_digits(generator, count, seed=0):
    """Generate `count` digits as uint8 (count, 1, 28, 28). The same seed gives the same digits.

    Digits are generated in whole batches. PyTorch may round differently in a batch of another size,
    and a digit would then depend on `count`.
    """
    batches = []
    for z in sample_batches(count, seed):
        batches.append(generate(generator, z))
    return torch.cat(batches)[:count]


def sample_batches(count, seed):
    """Draw latent vectors for at least `count` digits, as a list of whole batches."""
    random = torch.Generator().manual_seed(seed)
    return [sample_latent(BATCH_SIZE, random=random) for _ in range(0, count, BATCH_SIZE)]


def interpolate(generator, count, seed=0):
    """Move each digit along a closed curve in latent space: uint8 (FRAMES, count, 1, 28, 28).

    The noise at the angle t is cos(t) * a + sin(t) * b. Because cos² + sin² = 1, it has a standard
    normal distribution at every t, as in training. Halfway along a straight line from a to b, its
    length would be smaller than that of nearly all noise in training. The category stays the same,
    because G was never trained on a value between two categories. A category can produce several
    similar digits, so a 4 may still turn into a 9.
    """
    # The first frame shows the digits of sample_digits.
    z = torch.cat(sample_batches(count, seed))[:count]
    a = z[:, N_CATEGORIES:].clone()
    b = torch.cat(sample_batches(count, seed + 1))[:count, N_CATEGORIES:]
    frames = []
    for frame in range(FRAMES):
        t = 2 * math.pi * frame / FRAMES
        z[:, N_CATEGORIES:] = math.cos(t) * a + math.sin(t) * b
        frames.append(generate(generator, z))
    return torch.stack(frames)


def save_grid(images, path):
    """Save images, uint8 (N, 1, 28, 28), as a grid that is as close to a square as possible."""
    columns = math.ceil(math.sqrt(len(images)))
    save_image(images / 255, path, nrow=columns)


def save_animation(frames, path):
    """Save frames, uint8 (F, N, 1, 28, 28), as an animated GIF of F grids that loops forever."""
    columns = math.ceil(math.sqrt(frames.shape[1]))
    pictures = []
    for images in frames:
        grid = make_grid(images, nrow=columns)  # three identical channels
        pictures.append(Image.fromarray(grid[0].numpy()))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=FRAME_TIME, loop=0)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Generate new digits with a trained generator.")
    parser.add_argument("--out", required=True,
                        help="output: a .png grid, a .gif animation, or a .npy array, uint8 "
                             "(count, 28, 28)")
    parser.add_argument("--count", type=int, default=100,
                        help="number of digits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="random seed (default: %(default)s)")
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
    if arguments.checkpoint is None:
        arguments.checkpoint = Path("out/generator.pt")
        if not arguments.checkpoint.exists():
            arguments.checkpoint = SHIPPED_GENERATOR
    return arguments


def main():
    arguments = parse_arguments()
    out = Path(arguments.out)
    try:
        generator = load_generator(arguments.checkpoint, pick_device(arguments.device))
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix.lower() == ".gif":
            save_animation(interpolate(generator, arguments.count, arguments.seed), out)
        elif out.suffix.lower() == ".npy":
            digits = sample_digits(generator, arguments.count, arguments.seed)
            with open(out, "wb") as file:  # numpy.save(out) would turn .NPY into .NPY.npy
                numpy.save(file, digits.squeeze(1).numpy())
        else:
            save_grid(sample_digits(generator, arguments.count, arguments.seed), out)
    except (OSError, InputError) as error:
        sys.exit(f"sample.py: {error}")
    print(f"{out}: wrote {arguments.count} digits from the generator in {arguments.checkpoint}, "
          f"seed {arguments.seed}")


if __name__ == "__main__":
    main()
