"""Draw new digits with a trained generator:  python sample.py --out grid.png

Without --checkpoint it takes your own run's, out/checkpoint.pt, and before there is one the generator that comes with
this repository, results/generator.pt.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image  # Pillow, like numpy, comes with torchvision
from torchvision.utils import make_grid

from gan import Generator
from plot_losses import write_whole

CHUNK = 100  # digits that go through the generator at a time
SHIPPED = Path(__file__).parent / "results" / "generator.pt"


def pick_device(name):
    """The torch.device for 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'; ValueError, in one line, where it is not here."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"--device {name}: unknown; take auto, cpu, cuda, cuda:N or mps")
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise ValueError(f"--device {name}: PyTorch finds no {kind.upper()} device here; use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    return torch.device(name)


def load_checkpoint(path):
    """The dictionary that train.py saved at `path`, on the CPU; OSError or ValueError, in one line, otherwise."""
    try:
        # weights_only: tensors and plain containers. A pickle may hold code, which loading a stranger's file would run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["settings"]["latent_dim"], checkpoint["average"]
    except OSError:
        raise
    except Exception:  # torch.load raises nearly every kind, depending on which byte is wrong
        raise ValueError(f"{path} is not a checkpoint of this program, or it is damaged") from None
    return checkpoint


def load_generator(path, device="cpu"):
    """The averaged generator in a checkpoint.pt or generator.pt, ready to sample from."""
    checkpoint = load_checkpoint(path)
    try:
        generator = Generator(checkpoint["settings"]["latent_dim"])
        generator.load_state_dict(checkpoint["average"])
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"{path} does not fit the Generator in gan.py: it comes from another version of it") from None
    return generator.to(device)


@torch.no_grad()
def generate(generator, count, seed=0):
    """`count` images as uint8 (count, 28, 28), paper 0 to ink 255. Digit i depends on the seed and i alone.

    To that end the noise is drawn on the CPU, in order, and goes through in chunks of one size (on another batch size
    a library may add in another order). And the generator is in eval mode: batch norm then uses the means of its
    training, not those of the batch, which would make each digit depend on its neighbours.
    """
    was_training = generator.training
    generator.eval()
    device = next(generator.parameters()).device
    noise = torch.Generator().manual_seed(seed)
    images = torch.empty(count, 28, 28, dtype=torch.uint8)
    for chunk in images.split(CHUNK):
        z = torch.randn(CHUNK, generator.latent_dim, generator=noise).to(device)
        pixels = (generator(z).float() + 1) * 127.5                   # [-1, 1] to [0, 255]
        chunk.copy_(pixels.round()[:len(chunk), 0])
    generator.train(was_training)
    return images


def save_grid(images, path):
    """Write images, uint8 (N, 28, 28), as one picture: as near to a square as N allows, filled row by row."""
    grid = make_grid(images.unsqueeze(1), nrow=math.ceil(math.sqrt(len(images))), padding=2)
    picture = Image.fromarray(grid[0].numpy())
    write_whole(path, lambda file: picture.save(file, format="PNG"))


def whole_number(low, high=2**63 - 1):
    """An argparse type: a whole number from `low` to `high`."""
    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number "
                                             + (f"from {low} on" if high == 2**63 - 1 else f"from {low} to {high}"))
        return number
    return parse


def main():
    parser = argparse.ArgumentParser(description="Draw new digits with a trained generator.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="grid.png: a square grid; digits.npy: uint8 (count, 28, 28)")
    parser.add_argument("--count", type=whole_number(1, 100_000), default=100, help="how many digits")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="another seed, other digits")
    parser.add_argument("--checkpoint", help="a checkpoint.pt or generator.pt (default: out/checkpoint.pt, "
                                             "or the generator in results/ where there is no run yet)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()
    form = Path(args.out).suffix.lower()
    if form not in (".png", ".npy"):
        parser.error(f"--out {args.out}: unknown type; take a name that ends in .png or .npy")
    try:
        device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))

    path = args.checkpoint or ("out/checkpoint.pt" if Path("out/checkpoint.pt").exists() else SHIPPED)
    try:
        images = generate(load_generator(path, device), args.count, args.seed)
        if form == ".png":
            save_grid(images, args.out)
        else:
            write_whole(args.out, lambda file: numpy.save(file, images.numpy()))
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    print(f"{args.out}: {args.count} digits of the generator in {path}, seed {args.seed}")


if __name__ == "__main__":
    main()
