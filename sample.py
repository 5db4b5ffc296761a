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

from gan import CHUNK, KINDS, Generator, draw
from plot_losses import write_whole

FRAMES = 60  # of an animation, 20 a second
SHIPPED = Path(__file__).parent / "results" / "generator.pt"


def pick_device(name):
    """The torch.device for 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'; ValueError, in one line, where it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError):  # a name that PyTorch does not know, or a device that it does not find
        raise ValueError(f"--device {name}: PyTorch finds no such device here; use --device cpu") from None


def load_checkpoint(path):
    """The dictionary that train.py saved at `path`, on the CPU; OSError or ValueError, in one line, otherwise."""
    try:
        # weights_only: tensors and plain containers. A pickle may hold code, which loading a stranger's file would run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["settings"]["latent_dim"], checkpoint["average"]
    except Exception as error:  # torch.load raises nearly every kind, depending on which byte is wrong
        damaged = ValueError(f"{path} is not a checkpoint of this program, or it is damaged")
        raise error if isinstance(error, OSError) else damaged from None
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


def noise(latent_dim, count, seed):
    """z (count, latent_dim), standard normal. Row i depends on the seed and i alone: drawn on the CPU, in chunks."""
    random = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(CHUNK, latent_dim, generator=random) for _ in range(0, count, CHUNK)])[:count]


def generate(generator, count, seed=0):
    """`count` new images, uint8 (count, 28, 28). The same seed gives the same ones, however many are drawn."""
    return draw(generator, noise(generator.latent_dim, count, seed))


def walk(generator, count, seed=0):
    """`count` digits that change smoothly, as uint8 (FRAMES, count, 28, 28); after the last frame comes the first.

    Each z goes round a circle, cos(t)·a + sin(t)·b. As cos² + sin² = 1 it is a standard normal all the way, and a frame
    as good as any sample; half-way on a straight line from a to b it would be shorter than any z that G has learned
    from. The choice of the kind stays as it is: a change would be a jump.
    """
    a, b = noise(generator.latent_dim, 2 * count, seed).split(count)
    circle = [math.cos(t) * a + math.sin(t) * b for t in torch.linspace(0, 2 * math.pi, FRAMES + 1)[:-1]]
    return torch.stack([draw(generator, torch.cat([a[:, :KINDS], z[:, KINDS:]], dim=1)) for z in circle])


def save_grid(images, path):
    """Write uint8 (N, 28, 28) as a grid, nearly square, row by row; (F, N, 28, 28) as an animation, to a .gif."""
    columns = math.ceil(math.sqrt(images.shape[-3]))
    frames = [Image.fromarray(make_grid(grid.unsqueeze(1), nrow=columns)[0].numpy())
              for grid in images.view(-1, *images.shape[-3:])]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0} if frames[1:] else {}
    write_whole(path, lambda file: frames[0].save(file, Path(path).suffix[1:].upper(), **moving))


def main():
    parser = argparse.ArgumentParser(description="Draw new digits with a trained generator.")
    parser.add_argument("--out", required=True, help="grid.png, a moving walk.gif or digits.npy: uint8 (count, 28, 28)")
    parser.add_argument("--count", type=int, default=100, help="how many digits (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="another one, other digits (default: 0)")
    parser.add_argument("--checkpoint", help="by default out/checkpoint.pt, or before there is a run the "
                                             "generator.pt in results/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args()
    form = Path(args.out).suffix.lower()
    if form not in (".png", ".gif", ".npy"):
        parser.error(f"--out {args.out}: unknown type; take a name that ends in .png, .gif or .npy")
    if not 1 <= args.count <= (400 if form == ".gif" else 100_000):
        parser.error(f"--count {args.count}: take 1 to 100000, for an animation 1 to 400")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: take 0 to 2**63 - 1")
    path = args.checkpoint or ("out/checkpoint.pt" if Path("out/checkpoint.pt").exists() else SHIPPED)
    try:
        generator = load_generator(path, pick_device(args.device))
        images = (walk if form == ".gif" else generate)(generator, args.count, args.seed)
        if form == ".npy":
            write_whole(args.out, lambda file: numpy.save(file, images.numpy()))
        else:
            save_grid(images, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    print(f"{args.out}: {args.count} digits of the generator in {path}, seed {args.seed}")


if __name__ == "__main__":
    main()
