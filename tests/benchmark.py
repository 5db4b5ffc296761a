"""Reproduce the measurements of results/README.md. It measures and does not test.

    python tests/benchmark.py quality [FILE ...]        score generators, and real digits
    python tests/benchmark.py experiments [NAME ...]    change the program, train it and score it
    python tests/benchmark.py pictures                  draw generated digits beside real ones
"""
import argparse
import gzip
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, because train.py sets how PyTorch's threads wait
import numpy
import torch
import torch.nn.functional as F
from torch import nn

import gan
from sample import SHIPPED, draw_grid, load_generator, sample_digits

DRAWS = range(11, 16)  # the seeds of the latent vectors of five draws of 10,000 digits

# Edits of the program. Each names a file, a text that occurs in it exactly once, and a new text.
RATE = ("train.py", f"LEARNING_RATE = {train.LEARNING_RATE} ", "LEARNING_RATE = 0.0002 ")
NO_R1 = ("gan.py", "if step % R1_INTERVAL == 0 else 0", "if False else 0")
NO_CATEGORY = ("gan.py", f"CATEGORY_SCALE = {gan.CATEGORY_SCALE} ", "CATEGORY_SCALE = 0.0 ")

EXPERIMENTS = {
    "DCGAN": [RATE, NO_R1, NO_CATEGORY],
    f"DCGAN, learning rate {train.LEARNING_RATE}": [NO_R1, NO_CATEGORY],
    "no category": [NO_CATEGORY],
    "no change": [],
    "no R1": [NO_R1],
    "learning rate 0.0002": [RATE],
    "twice the channels": [
        ("gan.py", "c1, c2, c3 = 64, 32, 16", "c1, c2, c3 = 128, 64, 32"),
        ("gan.py", "c1, c2, c3, c4 = 8, 16, 48, 96", "c1, c2, c3, c4 = 16, 32, 96, 192")],
    "half the channels": [
        ("gan.py", "c1, c2, c3 = 64, 32, 16", "c1, c2, c3 = 32, 16, 8"),
        ("gan.py", "c1, c2, c3, c4 = 8, 16, 48, 96", "c1, c2, c3, c4 = 4, 8, 24, 48")],
    "narrower D": [("gan.py", "c1, c2, c3, c4 = 8, 16, 48, 96", "c1, c2, c3, c4 = 8, 16, 32, 64")],
    "group norm in D": [
        ("gan.py", f"nn.BatchNorm2d({c}),\n            nn.Leaky", f"nn.GroupNorm(1, {c}), nn.Leaky")
        for c in ("c2", "c3", "c4")],
    "noise on D's input, no R1": [NO_R1, (
        "gan.py", "self.layers(images)", "self.layers(images + 0.2 * torch.randn_like(images))")],
    "D judges pairs": [
        ("gan.py", "nn.Conv2d(CHANNELS, c1", "nn.Conv2d(2 * CHANNELS, c1"),
        ("gan.py", "self.layers(images)", "self.layers(images.reshape(-1, 2 * CHANNELS, 28, 28))")],
}

# Run in the folder of a changed program: draw digits with a network of the checkpoint.
DRAW = f"""
import sys, numpy, torch, sample
network = sample.Generator()
sample.load_checkpoint("out/checkpoint.pt", {{sys.argv[1]: network}})
draws = [sample.sample_digits(network, 10_000, seed) for seed in {list(DRAWS)}]
numpy.save("digits.npy", torch.stack(draws).numpy())
"""


class Classifier(nn.Module):
    """Maps digits (N, 1, 28, 28), uint8, to features (N, 288) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),   # (N, 16, 14, 14)
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (N, 32, 7, 7)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))  # (N, 10)

    def forward(self, digits):
        # The features are taken where a digit still has a layout. After the head's first layer,
        # ten directions hold 97 % of the variance: little more than the kind of digit.
        maps = self.body(digits.float() / 255)
        return F.avg_pool2d(maps, 3, stride=2).flatten(1), self.head(maps)


def train_classifier(digits, labels, epochs=3):
    """Return a Classifier that is trained on these digits."""
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits)).split(100):
            loss = F.cross_entropy(classifier(digits[batch])[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


def frechet_distance(one, other):
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for features (N, F) and (M, F).

    m and C are the mean and the covariance of each set. The distance is 0 if both agree (Heusel et
    al. 2017, arxiv.org/abs/1706.08500). That paper uses the features of an ImageNet classifier.
    """
    one, other = one.double(), other.double()
    c1, c2 = one.T.cov(), other.T.cov()
    # The root's trace is the sum of the roots of the eigenvalues of C1 C2, which are not negative.
    trace = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    mean_distance = (one.mean(0) - other.mean(0)).square().sum()
    return (mean_distance + c1.trace() + c2.trace() - 2 * trace).item()


def radii(points):
    """Return the distance of each point (N, F) to its third nearest neighbour: (N,)."""
    parts = [torch.cdist(part, points).topk(4, largest=False).values for part in points.split(1000)]
    return torch.cat(parts)[:, 3]  # the nearest one is the point itself


def covered(points, others, radii_of_others):
    """Return the share of `points` that lie within the radius of at least one of `others`.

    (Kynkäänniemi et al. 2019, arxiv.org/abs/1904.06991)
    """
    inside = [(torch.cdist(part, others) <= radii_of_others).any(dim=1)
              for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


def load_mnist(part):
    """Load the images (N, 1, 28, 28) and labels (N,) of a part of MNIST, "train" or "t10k"."""
    path = train.MNIST.with_name(f"{part}-images-idx3-ubyte.gz")
    content = gzip.decompress(path.with_name(f"{part}-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=8)
    return train.load_images(path), labels.long()


class Scorer:
    """Scores digits with the features of a classifier, beside those of 10,000 of MNIST's digits.

    These are training digits, or with test=True the test digits. The classifier was not trained on
    them. The score of 10,000 other training digits shows what chance alone makes.
    """

    def __init__(self, test=False):
        digits, labels = load_mnist("train")
        # Drawn at random, because neighbours in MNIST are a little more alike than others.
        parts = torch.randperm(60_000, generator=torch.Generator().manual_seed(0)).split(10_000)
        known = torch.cat(parts[2:])
        print("training a classifier", flush=True)
        self.classifier = train_classifier(digits[known], labels[known])
        reference = load_mnist("t10k")[0] if test else digits[parts[0]]
        self.reference, _ = self.look_at(reference)
        self.radii = radii(self.reference)
        print("distance  precision  recall  confident  rarest class   (medians of the draws)")
        self.print_row("other training digits", [digits[parts[1]]])

    @torch.no_grad()
    def look_at(self, digits):
        features, logits = zip(*[self.classifier(part) for part in digits.split(500)])
        return torch.cat(features), torch.cat(logits)

    def score(self, digits):
        """Return the five scores of digits, uint8 (N, 1, 28, 28)."""
        features, logits = self.look_at(digits)
        probabilities = logits.softmax(dim=1)
        shares = probabilities.argmax(dim=1).bincount(minlength=10) / len(digits)
        return (frechet_distance(features, self.reference),
                covered(features, self.reference, self.radii),
                covered(self.reference, features, radii(features)),
                (probabilities.amax(dim=1) > 0.95).float().mean().item(), shares.min().item())

    def print_row(self, name, draws):
        scores = [self.score(digits) for digits in draws]
        distance, *shares = [statistics.median(values) for values in zip(*scores)]
        print(f"{distance:8.3f}", *(f"{share:10.3f}" for share in shares), f"  {name}", flush=True)


def measure_quality(files, seeds, test):
    generators = {file: load_generator(file) for file in files}
    scorer = Scorer(test)
    for file, generator in generators.items():
        scorer.print_row(file, [sample_digits(generator, 10_000, seed) for seed in seeds])


def apply(edits, folder):
    """Copy the program to the folder, and edit the copy."""
    folder.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copyfile(script, folder / script.name)
    for name, old, new in edits:
        text = (folder / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise gan.InputError(f"this edit needs a text that {name} must contain once: {old}")
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")


def run_experiments(names, epochs, seeds, out):
    scorer = Scorer()
    for seed in seeds:
        for name in names:
            folder = out / f"{name.replace(' ', '_')}_seed_{seed}"
            apply(EXPERIMENTS[name], folder)

            def call(*command):
                with open(folder / "output.txt", "a", encoding="utf-8") as output:
                    subprocess.run([sys.executable, *command], cwd=folder, check=True,
                                   stdout=output, stderr=output)

            started = time.perf_counter()
            call("train.py", "--epochs", str(epochs), "--seed", str(seed), "--data", train.MNIST)
            minutes = (time.perf_counter() - started) / 60
            log = (folder / "out/losses.csv").read_text().splitlines()[-1]
            call("sample.py", "--out", "grid.png")
            for network in ("average", "generator"):
                call("-c", DRAW, network)
                draws = torch.from_numpy(numpy.load(folder / "digits.npy"))
                scorer.print_row(f"{name}, seed {seed}, {network}, {minutes:.1f} min, {log}", draws)


def draw_pictures(out):
    """Draw 50 generated digits among 50 of the test digits, and ten beside their neighbours."""
    random = torch.Generator().manual_seed(0)
    known, test = load_mnist("train")[0], load_mnist("t10k")[0]
    digits = sample_digits(load_generator(), 50)
    real = test[torch.randperm(len(test), generator=random)[:50]]
    order = torch.randperm(100, generator=random)
    draw_grid(torch.cat([digits, real])[order]).save(out / "mixed.png")
    print("mixed.png: g marks a generated digit, and r a real one")
    for row in order.view(10, 10).tolist():
        print(" ".join("g" if number < 50 else "r" for number in row))
    # A row for each of ten generated digits: the digit, then the nearest nine training digits.
    distances = torch.cdist(digits[:10].flatten(1).float(), known.flatten(1).float())
    nearest = known[distances.topk(9, largest=False).indices]             # (10, 9, 1, 28, 28)
    rows = torch.cat([digits[:10].unsqueeze(1), nearest], dim=1)
    draw_grid(rows.flatten(0, 1)).save(out / "neighbours.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    quality = parts.add_parser("quality")
    quality.add_argument("files", nargs="*", default=[SHIPPED], help="checkpoints")
    quality.add_argument("--seeds", type=int, nargs="+", default=DRAWS, help="seeds of the draws")
    quality.add_argument("--test", action="store_true", help="compare with the test digits")
    experiments = parts.add_parser("experiments")
    experiments.add_argument("names", nargs="*", default=EXPERIMENTS, metavar="NAME",
                             help=f"some of: {'; '.join(EXPERIMENTS)} (default: all)")
    experiments.add_argument("--epochs", type=int, default=train.EPOCHS)
    experiments.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    experiments.add_argument("--out", type=Path, default=Path("out-experiments"))
    parts.add_parser("pictures").add_argument("--out", type=Path, default=Path("."))
    arguments = vars(parser.parse_args())
    part = arguments.pop("part")
    if not set(arguments.get("names", [])) <= set(EXPERIMENTS):
        parser.error(f"choose from: {'; '.join(EXPERIMENTS)}")
    functions = {"quality": measure_quality, "experiments": run_experiments,
                 "pictures": draw_pictures}
    try:
        functions[part](**arguments)
    except (gan.InputError, OSError, subprocess.CalledProcessError) as error:
        parser.exit(2, f"benchmark.py: {error}\n")
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, on {train.DEVICES[-1]}")


if __name__ == "__main__":
    main()
