"""Reproduce the measurements of the README. It measures and does not test.

    python tests/benchmark.py speed                     time a training step and variants of it
    python tests/benchmark.py quality FILE ...          score the generators in checkpoints
    python tests/benchmark.py experiments [NAME ...]    change the program, train it and score it
    python tests/benchmark.py mix                       mix generated digits with real ones

Measure speed only while no other program uses the processor.
"""
import argparse
import copy
import gzip
import os
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
from sample import SHIPPED_GENERATOR, load_generator, sample_digits, save_grid

# The experiments and failures of the README. Each is a list of edits. An edit names a file, a text
# that occurs in it exactly once, and the replacement.
EXPERIMENTS = {
    "no change": [],
    "learning rate 0.0002": [
        ("train.py", '"lr": 0.001,', '"lr": 0.0002,'),
    ],
    "learning rate of D 0.002": [
        ("train.py", 'make_optimizer(discriminator, settings["lr"])',
         'make_optimizer(discriminator, 2 * settings["lr"])'),
    ],
    "no R1 penalty": [
        ("gan.py", "if step % R1_INTERVAL == 0:", "if False:"),
    ],
    "R1_GAMMA 0.3": [
        ("gan.py", "R1_GAMMA = 0.03 ", "R1_GAMMA = 0.3 "),
    ],
    "R1_GAMMA 10": [
        ("gan.py", "R1_GAMMA = 0.03 ", "R1_GAMMA = 10 "),
    ],
    "no category": [
        ("gan.py", "N_CATEGORIES = 10 ", "N_CATEGORIES = 0 "),
        ("gan.py", "NOISE_DIM = 54", "NOISE_DIM = 64"),
    ],
    "category scale 1": [
        ("gan.py", "CATEGORY_SCALE = 4.0 ", "CATEGORY_SCALE = 1.0 "),
    ],
    "category scale 100": [
        ("gan.py", "CATEGORY_SCALE = 4.0 ", "CATEGORY_SCALE = 100.0 "),
    ],
    "twenty categories": [
        ("gan.py", "N_CATEGORIES = 10 ", "N_CATEGORIES = 20 "),
        ("gan.py", "NOISE_DIM = 54", "NOISE_DIM = 44"),
    ],
    "no running average": [
        ("train.py", "update_average(average, generator, step)",
         "average.load_state_dict(generator.state_dict())"),
    ],
    "AVERAGE_K 10": [
        ("gan.py", "AVERAGE_K = 40 ", "AVERAGE_K = 10 "),
    ],
    "AVERAGE_K 20": [
        ("gan.py", "AVERAGE_K = 40 ", "AVERAGE_K = 20 "),
    ],
    "saturating loss": [
        ("gan.py", "    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)\n",
         "    return -F.binary_cross_entropy_with_logits(fake_logits, 1 - real_labels)\n"),
    ],
    "tanh": [
        ("gan.py", "nn.Hardtanh(),", "nn.Tanh(),"),
    ],
    "no batch norm in D": [  # with the biases that it had replaced, and PyTorch's initialisation
        ("gan.py", "c2, 4, stride=2, padding=1, bias=False),            # (N, 32, 7, 7)\n"
                   "            nn.BatchNorm2d(c2),", "c2, 4, stride=2, padding=1),"),
        ("gan.py", "c3, 3, padding=1, bias=False),                      # (N, 96, 7, 7)\n"
                   "            nn.BatchNorm2d(c3),", "c3, 3, padding=1),"),
        ("gan.py", "c4, 3, stride=2, padding=1, bias=False),            # (N, 192, 4, 4)\n"
                   "            nn.BatchNorm2d(c4),", "c4, 3, stride=2, padding=1),"),
        ("gan.py", "(nn.Conv2d, nn.ConvTranspose2d)", "nn.ConvTranspose2d"),
    ],
    "beta1 0.9": [
        ("gan.py", "betas=(0.5, 0.999)", "betas=(0.9, 0.999)"),
    ],
    "batch 128": [
        ("train.py", '"batch_size": 64,', '"batch_size": 128,'),
    ],
    "22 numbers of noise": [
        ("gan.py", "NOISE_DIM = 54", "NOISE_DIM = 22"),
    ],
    "100 numbers of noise": [
        ("gan.py", "NOISE_DIM = 54", "NOISE_DIM = 100"),
    ],
    "uniform noise": [  # from -root 3 to root 3, so that its variance is 1 too
        ("gan.py", "noise = torch.randn(count, NOISE_DIM, device=device, generator=random)",
         "noise = 12**0.5 * (torch.rand(count, NOISE_DIM, device=device, generator=random) - 0.5)"),
    ],
    "R1 penalty in every step": [
        ("gan.py", "R1_INTERVAL = 16 ", "R1_INTERVAL = 1 "),
    ],
    "half the channels": [
        ("gan.py", "c1, c2, c3 = 128, 64, 32", "c1, c2, c3 = 64, 32, 16"),
        ("gan.py", "c1, c2, c3, c4 = 16, 32, 96, 192", "c1, c2, c3, c4 = 8, 16, 48, 96"),
    ],
    "real images from 0 to 255": [
        ("gan.py", "pixels.float() / 127.5 - 1", "pixels.float()"),
    ],
}


def prepare_training(device, images, bfloat16=False, channels_last=True, r1="in some steps"):
    """Create networks and optimizers. Return a function that trains them for a number of steps.

    The arguments select train.py's step or a variant of it.
    """
    layout = torch.contiguous_format
    if channels_last and device.type == "cpu":
        layout = torch.channels_last
    generator = gan.Generator().to(device, memory_format=layout)
    discriminator = gan.Discriminator().to(device, memory_format=layout)
    average = copy.deepcopy(generator)
    batch_size, lr = train.DEFAULTS["batch_size"], train.DEFAULTS["lr"]
    g_optimizer = gan.make_optimizer(generator, lr)
    d_optimizer = gan.make_optimizer(discriminator, lr)

    def run(steps):
        for step in range(1, steps + 1):
            # Step 1 has no penalty, and step R1_INTERVAL has one.
            if r1 == "never":
                step = 1
            if r1 == "in every step":
                step = gan.R1_INTERVAL
            indices = torch.randint(len(images), (batch_size,), device=device)
            real = gan.from_pixels(images[indices])
            # Autocast's cache would keep copies of D's weights, and G's update would use the copies
            # from before D's update.
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                gan.adversarial_step(
                    generator, discriminator, g_optimizer, d_optimizer, real, step)
            gan.update_average(average, generator, step)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()  # wait for the queued work

    return run


def measure_speed(device, rounds, data):
    """Print the images per second of train.py's step and of its variants.

    They take turns, because the speed of a machine drifts. Ratios within a round depend less on
    that.
    """
    images = train.load_images(data).to(device)
    trainings = {
        "as train.py does it": prepare_training(device, images),
        "bfloat16 in place of float32": prepare_training(device, images, bfloat16=True),
        "not channels last": prepare_training(device, images, channels_last=False),
        "R1 penalty in every step": prepare_training(device, images, r1="in every step"),
        "no R1 penalty": prepare_training(device, images, r1="never"),
    }
    seconds = {name: [] for name in trainings}
    for run in trainings.values():
        run(gan.R1_INTERVAL)
    for _ in range(rounds):
        for name, run in trainings.items():
            started = time.perf_counter()
            run(gan.R1_INTERVAL)
            seconds[name].append(time.perf_counter() - started)
    first = seconds["as train.py does it"]
    for name, taken in seconds.items():
        speed = gan.R1_INTERVAL * train.DEFAULTS["batch_size"] / statistics.median(taken)
        ratio = statistics.median(one / other for one, other in zip(first, taken))
        print(f"{name:30s} {speed:6.0f} images/s, {ratio:5.2f} times the speed of the first row")
    print(f"medians of {rounds} rounds")


class Classifier(nn.Module):
    """Maps digits (N, 1, 28, 28) in [-1, 1] to logits (N, 10), by way of 64 features."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),   # (N, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (N, 64, 7, 7)
            nn.Flatten(),                                                 # (N, 3136)
            nn.Linear(64 * 7 * 7, 64), nn.ReLU(),                         # (N, 64)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.features(images))


def to_input(digits):
    # This does not use gan.from_pixels, so that the scores do not change if someone edits it.
    return digits.view(-1, 1, 28, 28).float() / 127.5 - 1


def train_classifier(digits, labels, epochs=3):
    """Return a Classifier that is trained on these digits."""
    torch.manual_seed(0)
    classifier = Classifier()
    print(f"training a classifier for {epochs} epochs", flush=True)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits)).split(100):
            loss = F.cross_entropy(classifier(to_input(digits[batch])), labels[batch])
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
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # With root = C1^(1/2), C1 C2 has the same eigenvalues as root C2 root. These are easier to
    # compute, because root C2 root is symmetric.
    trace = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    mean_distance = (one.mean(0) - other.mean(0)).square().sum()
    return (mean_distance + c1.trace() + c2.trace() - 2 * trace).item()


def covered(points, others, neighbours=3):
    """Return the share of `points` that lie within the radius of at least one of `others`.

    The radius of a point in `others` is the distance to its third nearest neighbour in `others`
    (Kynkäänniemi et al. 2019, arxiv.org/abs/1904.06991).
    """
    radii = []
    for part in others.split(1000):
        radii.append(torch.cdist(part, others).kthvalue(neighbours + 1, dim=1).values)
    radii = torch.cat(radii)
    inside = []
    for part in points.split(1000):
        inside.append((torch.cdist(part, others) <= radii).any(dim=1))
    return torch.cat(inside).float().mean().item()


def nearest_distance(digits, known):
    """Return the median distance to the nearest of `known`, with pixels scaled to [0, 1]."""
    digits, known = digits.flatten(1).float() / 255, known.flatten(1).float() / 255
    distances = [torch.cdist(part, known).amin(dim=1) for part in digits.split(100)]
    return torch.cat(distances).median().item()


def load_mnist(data, part):
    """Load the images (N, 1, 28, 28) and labels (N,) of a part of MNIST, "train" or "t10k"."""
    for name in (f"MNIST/raw/{part}-images-idx3-ubyte", f"{part}-images-idx3-ubyte"):
        for path in (data / f"{name}.gz", data / name):
            if path.exists():
                content = Path(str(path).replace("images-idx3", "labels-idx1")).read_bytes()
                if path.suffix == ".gz":
                    content = gzip.decompress(content)
                labels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=8)
                return train.load_images(path), labels.long()
    raise gan.InputError(f"{data} holds no {part}-images-idx3-ubyte; name MNIST's folder (--data)")


class Scorer:
    """Scores digits with a classifier trained on 40,000 of MNIST's training digits.

    Digits are compared with MNIST's 10,000 test digits. Neither the classifier nor the GAN was
    trained on them. As a reference, 10,000 training digits that the classifier was not trained on
    are scored in the same way. The two sets of training digits are drawn at random, because
    neighbours in MNIST are a little more alike than others.
    """

    def __init__(self, data):
        self.training_digits, labels = load_mnist(data, "train")
        self.test_digits, test_labels = load_mnist(data, "t10k")
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
        known = order[:40_000]
        self.unknown_digits = self.training_digits[order[40_000:]]
        self.classifier = train_classifier(self.training_digits[known], labels[known])
        self.reference, logits = self.look_at(self.test_digits)
        wrong = (logits.argmax(dim=1) != test_labels).float().mean().item()
        print(f"the classifier misclassifies {100 * wrong:.2f} % of the test digits\n")
        print("Fréchet distance, precision, recall, confident (> 95 %), rarest class, nearest")

    @torch.no_grad()
    def look_at(self, digits):
        features = [self.classifier.features(to_input(part)) for part in digits.split(500)]
        features = torch.cat(features)
        return features, self.classifier.head(features)

    def score(self, name, digits, for_nearest=None):
        """Print a row of scores. The nearest distance is measured for the digits `for_nearest`."""
        features, logits = self.look_at(digits)
        probabilities = logits.softmax(dim=1)
        confident = (probabilities.amax(dim=1) > 0.95).float().mean().item()
        shares = probabilities.argmax(dim=1).bincount(minlength=10) / len(digits)
        if for_nearest is None:
            for_nearest = digits
        nearest = nearest_distance(for_nearest[:1000], self.training_digits)
        print(f"{frechet_distance(features, self.reference):7.2f}  "
              f"{covered(features, self.reference):.3f}  {covered(self.reference, features):.3f}  "
              f"{100 * confident:5.1f} %  {100 * shares.min().item():4.1f} %  "
              f"{nearest:.2f}  {name}", flush=True)


def require_digits(generator, name):
    shape = tuple(sample_digits(generator, 1).shape[1:])
    if shape != (1, 28, 28):
        raise gan.InputError(f"{name} makes images of shape {shape}; only (1, 28, 28) has scores")


def measure_quality(checkpoints, seeds, data):
    generators = {path: load_generator(path) for path in checkpoints}
    for path, generator in generators.items():
        require_digits(generator, path)
    scorer = Scorer(data)
    # The nearest training digit of a training digit is itself, so that column uses test digits.
    for number, digits in enumerate(scorer.unknown_digits.split(10_000)):
        scorer.score(f"real digits, set {number + 1}", digits, scorer.test_digits[::10])
    for path, generator in generators.items():
        for seed in seeds:
            scorer.score(f"{path}, latents of seed {seed}", sample_digits(generator, 10_000, seed))


def apply(edits, folder):
    """Copy the program to the folder, and edit the copy."""
    if folder.exists():
        raise gan.InputError(f"{folder} already exists; choose another --out")
    folder.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copyfile(script, folder / script.name)
    for name, old, new in edits:
        text = (folder / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise gan.InputError(f"this edit needs a text that {name} must contain once: {old}")
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")


def call(folder, *command):
    """Run a script in the folder, with its output in output.txt."""
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        process = subprocess.run([sys.executable, *command], cwd=folder, stdout=output,
                                 stderr=output)
    if process.returncode != 0:
        raise gan.InputError(f"{command[0]} failed; {folder / 'output.txt'} says why")


def run_experiments(names, epochs, seeds, out, data):
    require_digits(gan.Generator(), "gan.py")
    scorer = Scorer(data)
    for name in names or EXPERIMENTS:
        for seed in seeds:
            folder = out / f"{name.replace(' ', '_')}_seed_{seed}"
            apply(EXPERIMENTS[name], folder)
            call(folder, "train.py", "--epochs", str(epochs), "--seed", str(seed),
                 "--data", str(data.resolve()))
            call(folder, "sample.py", "--out", "grid.png")
            call(folder, "sample.py", "--out", "digits.npy", "--count", "10000", "--seed", "1")
            last_row = (folder / "out" / "losses.csv").read_text().splitlines()[-1]
            digits = torch.from_numpy(numpy.load(folder / "digits.npy"))
            scorer.score(f"{name}, seed {seed}, {epochs} epochs: {last_row}", digits)


def mix(checkpoint, seed, out, data):
    """Save a picture of 50 generated digits and 50 of MNIST's test digits, in random order."""
    generator = load_generator(checkpoint)
    require_digits(generator, checkpoint)
    random = torch.Generator().manual_seed(seed)
    test, _ = load_mnist(data, "t10k")
    real = test[torch.randperm(len(test), generator=random)[:50]]
    order = torch.randperm(100, generator=random)
    save_grid(torch.cat([sample_digits(generator, 50, seed), real])[order], out)
    print(f"{out}: in these places, g marks a generated digit and r a real one")
    for row in order.view(10, 10).tolist():
        print(" ".join("g" if number < 50 else "r" for number in row))


def number(smallest):
    """Return a type for argparse: whole numbers from `smallest` on."""
    def whole_number(text):
        value = int(text)
        if not smallest <= value < 2**63:
            raise ValueError
        return value

    return whole_number


def main():
    parser = argparse.ArgumentParser(
        description="Measure the speed of training and the quality of the digits.")
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed", help="time a training step and its variants")
    speed.add_argument("--device", default="auto",
                       help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    speed.add_argument("--rounds", type=number(1), default=9,
                       help="number of timed rounds (default: %(default)s)")
    quality = parts.add_parser("quality", help="score checkpoints and real digits")
    quality.add_argument("checkpoints", nargs="*", help="checkpoint.pt or generator.pt files")
    quality.add_argument("--seeds", type=number(0), nargs="+", default=[1],
                         help="seeds of the latent vectors, one row for each (default: 1)")
    experiments = parts.add_parser("experiments", help="edit the program, train, sample and score")
    experiments.add_argument("names", nargs="*", metavar="name",
                             help=f"some of: {', '.join(EXPERIMENTS)} (default: all)")
    experiments.add_argument("--epochs", type=number(1), default=train.DEFAULTS["epochs"],
                             help="number of epochs (default: %(default)s)")
    experiments.add_argument("--seeds", type=number(0), nargs="+", default=[0],
                             help="random seeds, one run for each (default: 0)")
    experiments.add_argument("--out", type=Path, default=Path("out-experiments"),
                             help="folder for the changed copies (default: %(default)s)")
    mixing = parts.add_parser("mix", help="mix generated digits with real ones in a picture")
    mixing.add_argument("--checkpoint", default=SHIPPED_GENERATOR,
                        help="checkpoint.pt or generator.pt (default: results/generator.pt)")
    mixing.add_argument("--seed", type=number(0), default=0,
                        help="random seed (default: %(default)s)")
    mixing.add_argument("--out", default="mixed.png", help="a .png grid (default: %(default)s)")
    for part in (speed, quality, experiments, mixing):
        part.add_argument("--data", type=Path, default=train.SHIPPED_DATA,
                          help="folder with MNIST's four files (default: those of the repository)")
    arguments = vars(parser.parse_args())
    part = arguments.pop("part")
    for name in arguments.get("names", []):
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}; choose from: {', '.join(EXPERIMENTS)}")
    try:
        if part == "speed":
            measure_speed(gan.pick_device(arguments.pop("device")), **arguments)
        elif part == "quality":
            measure_quality(**arguments)
        elif part == "mix":
            mix(**arguments)
        else:
            run_experiments(**arguments)
    except gan.InputError as error:
        parser.exit(2, f"benchmark.py: {error}\n")
    except (OSError, ValueError) as error:  # Pillow's ValueError: an --out that is no picture
        parser.exit(1, f"benchmark.py: {error}\n")
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
