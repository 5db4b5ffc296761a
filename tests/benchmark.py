"""Reproduce the measurements of the README. It measures and does not test.

    python tests/benchmark.py speed                     time a training step and variants of it
    python tests/benchmark.py quality FILE ...          score the generators in checkpoints
    python tests/benchmark.py experiments [NAME ...]    change the program, train it and score it
    python tests/benchmark.py mix                       mix generated digits with real ones

Measure speed only while no other program uses the processor.
"""
import argparse
import copy
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before torch, because train.py sets how PyTorch's threads wait
import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import MNIST

import gan
from sample import SHIPPED_GENERATOR, load_generator, sample_digits, save_grid

CACHE = Path(tempfile.gettempdir()) / "gan_benchmark_digit_classifier.pt"

# The experiments and failures of the README. Each is a list of edits. An edit names a file, a text
# that occurs in it exactly once, and the replacement.
EXPERIMENTS = {
    "no change": [],
    "no R1 penalty": [
        ("gan.py", "if step % R1_INTERVAL == 0:", "if False:"),
    ],
    "saturating loss": [
        ("gan.py", "    return F.binary_cross_entropy_with_logits(fake_logits, real_labels)\n",
         "    return -F.binary_cross_entropy_with_logits(fake_logits, 1 - real_labels)\n"),
    ],
    "no category": [
        ("gan.py", "N_CATEGORIES = 10 ", "N_CATEGORIES = 1 "),
        ("gan.py", "NOISE_DIM = 54", "NOISE_DIM = 63"),
    ],
    "no running average": [
        ("train.py", "update_average(average, generator, step)",
         "average.load_state_dict(generator.state_dict())"),
    ],
    "longer running average": [
        ("gan.py", "AVERAGE_K = 40 ", "AVERAGE_K = 20 "),
    ],
    "tanh": [
        ("gan.py", "nn.Hardtanh(),", "nn.Tanh(),"),
    ],
    "real images from 0 to 255": [
        ("gan.py", "pixels.float() / 127.5 - 1", "pixels.float()"),
    ],
    "category scale 100": [
        ("gan.py", "CATEGORY_SCALE = 4.0 ", "CATEGORY_SCALE = 100.0 "),
    ],
}


def finish(device):
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def prepare_training(device, images, bfloat16=False, channels_last=True, r1="in some steps"):
    """Create networks and optimizers. Return a function that trains them for a number of steps.

    The arguments select train.py's step or a variant of it.
    """
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = train.memory_format(device)
    generator = gan.Generator().to(device, memory_format=memory_format)
    discriminator = gan.Discriminator().to(device, memory_format=memory_format)
    average = copy.deepcopy(generator)
    g_optimizer = gan.make_optimizer(generator, train.DEFAULTS["lr"])
    d_optimizer = gan.make_optimizer(discriminator, train.DEFAULTS["lr"])

    def run(steps):
        for step in range(1, steps + 1):
            # Step 1 has no penalty, and step R1_INTERVAL has one.
            if r1 == "never":
                step = 1
            if r1 == "in every step":
                step = gan.R1_INTERVAL
            indices = torch.randint(len(images), (train.DEFAULTS["batch_size"],), device=device)
            real = gan.from_pixels(images[indices])
            # Autocast's cache would keep copies of D's weights, and G's update would use the copies
            # from before D's update.
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                gan.adversarial_step(
                    generator, discriminator, g_optimizer, d_optimizer, real, step)
            gan.update_average(average, generator, step)

    return run


def measure_speed(device, rounds):
    """Print the images per second of train.py's step and of its variants.

    They take turns, because the speed of a machine drifts. Ratios within a round depend less on
    that.
    """
    images = train.load_images(train.SHIPPED_DATA).to(device)
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
            finish(device)
            started = time.perf_counter()
            run(gan.R1_INTERVAL)
            finish(device)
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


def load_classifier(digits, labels, epochs=3):
    """Return a Classifier that is trained on these digits, or load it from CACHE."""
    torch.manual_seed(0)
    classifier = Classifier()
    if CACHE.exists():
        classifier.load_state_dict(torch.load(CACHE, weights_only=True))
        return classifier.eval()
    print(f"training a classifier for {epochs} epochs and saving it as {CACHE}", flush=True)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits)).split(100):
            loss = F.cross_entropy(classifier(to_input(digits[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(classifier.state_dict(), CACHE)
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


class Scorer:
    """Scores digits with a classifier trained on 40,000 of MNIST's training digits.

    Digits are compared with MNIST's 10,000 test digits. Neither the classifier nor the GAN was
    trained on them. As a reference, 10,000 training digits that the classifier was not trained on
    are scored in the same way. The two sets of training digits are drawn at random, because MNIST
    stores the digits of one writer next to one another.
    """

    def __init__(self):
        training = MNIST(train.SHIPPED_DATA, download=True)
        test = MNIST(train.SHIPPED_DATA, train=False)
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
        known = order[:40_000]
        self.training_digits = training.data
        self.test_digits = test.data
        self.real_digits = training.data[order[50_000:]]
        self.classifier = load_classifier(training.data[known], training.targets[known])
        self.reference, logits = self.look_at(test.data)
        wrong = (logits.argmax(dim=1) != test.targets).float().mean().item()
        print(f"the classifier misclassifies {100 * wrong:.2f} % of the test digits\n")
        print("Fréchet distance, precision, recall, confident (> 95 %), rarest class, nearest")

    @torch.no_grad()
    def look_at(self, digits):
        features = [self.classifier.features(to_input(part)) for part in digits.split(500)]
        features = torch.cat(features)
        return features, self.classifier.head(features)

    def score(self, name, digits, for_nearest):
        """Print a row of scores. The nearest distance is measured for the digits `for_nearest`."""
        features, logits = self.look_at(digits)
        probabilities = logits.softmax(dim=1)
        confident = (probabilities.amax(dim=1) > 0.95).float().mean().item()
        shares = probabilities.argmax(dim=1).bincount(minlength=10) / len(digits)
        nearest = nearest_distance(for_nearest[:1000], self.training_digits)
        print(f"{frechet_distance(features, self.reference):7.2f}  "
              f"{covered(features, self.reference):.3f}  {covered(self.reference, features):.3f}  "
              f"{100 * confident:5.1f} %  {100 * shares.min().item():4.1f} %  "
              f"{nearest:.2f}  {name}", flush=True)

    def score_real_digits(self):
        # The nearest training digit of a training digit is itself, so that column uses test digits.
        self.score("real digits", self.real_digits, for_nearest=self.test_digits[::10])

    def score_generated(self, name, digits):
        self.score(name, digits, for_nearest=digits)


def measure_quality(checkpoints):
    generators = {path: load_generator(path) for path in checkpoints}
    scorer = Scorer()
    scorer.score_real_digits()
    for path, generator in generators.items():
        scorer.score_generated(path, sample_digits(generator, 10_000, seed=1))


def copy_program(folder):
    folder.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)


def apply(edits, folder):
    for name, old, new in edits:
        path = folder / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name} must contain this text exactly once: {old}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def run_experiment(name, epochs, seed, out):
    """Copy the program to `out`, apply the edits of an experiment, train, and sample."""
    folder = out / f"{name.replace(' ', '_')}_seed_{seed}"
    copy_program(folder)
    apply(EXPERIMENTS[name], folder)
    call(folder, "train.py", "--epochs", str(epochs), "--seed", str(seed),
         "--data", str(train.SHIPPED_DATA))
    call(folder, "sample.py", "--out", "grid.png")
    call(folder, "sample.py", "--out", "digits.npy", "--count", "10000", "--seed", "1")
    return folder


def call(folder, *command):
    """Run a script in the folder. Raises CalledProcessError if it fails; output.txt says why."""
    with open(folder / "output.txt", "a") as output:
        subprocess.run([sys.executable, *command], cwd=folder, stdout=output, stderr=output,
                       check=True)


def run_experiments(names, epochs, seeds, out):
    scorer = Scorer()
    for name in names or EXPERIMENTS:
        for seed in seeds:
            folder = run_experiment(name, epochs, seed, out)
            last_row = (folder / "out" / "losses.csv").read_text().splitlines()[-1]
            digits = torch.from_numpy(numpy.load(folder / "digits.npy"))
            scorer.score_generated(f"{name}, seed {seed}, {epochs} epochs: {last_row}", digits)


def mix(checkpoint, seed, out):
    """Save a picture of 50 generated digits and 50 of MNIST's test digits, in random order."""
    generated = sample_digits(load_generator(checkpoint), 50, seed)
    random = torch.Generator().manual_seed(seed)
    test = MNIST(train.SHIPPED_DATA, train=False, download=True)
    real = test.data[torch.randperm(len(test), generator=random)[:50]].unsqueeze(1)
    order = torch.randperm(100, generator=random)
    save_grid(torch.cat([generated, real])[order], out)
    print(f"{out}: in these places, g marks a generated digit and r a real one")
    for row in order.view(10, 10).tolist():
        print(" ".join("g" if number < 50 else "r" for number in row))


def main():
    parser = argparse.ArgumentParser(
        description="Measure the speed of training and the quality of the digits.")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("speed", help="time a training step and its variants")
    part.add_argument("--device", default="auto",
                      help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    part.add_argument("--rounds", type=int, default=9,
                      help="number of timed rounds (default: %(default)s)")
    part = parts.add_parser("quality", help="score checkpoints and real digits")
    part.add_argument("checkpoints", nargs="*", help="checkpoint.pt or generator.pt files")
    part = parts.add_parser("experiments", help="edit the program, train, sample and score")
    part.add_argument("names", nargs="*", help=f"some of: {', '.join(EXPERIMENTS)} (default: all)")
    part.add_argument("--epochs", type=int, default=train.DEFAULTS["epochs"],
                      help="number of epochs (default: %(default)s)")
    part.add_argument("--seeds", type=int, nargs="+", default=[0],
                      help="random seeds, one run for each (default: 0)")
    part.add_argument("--out", type=Path, default=Path("out-experiments"),
                      help="folder for the changed copies (default: %(default)s)")
    part = parts.add_parser("mix", help="mix generated digits with real ones in a picture")
    part.add_argument("--checkpoint", default=SHIPPED_GENERATOR,
                      help="checkpoint.pt or generator.pt (default: results/generator.pt)")
    part.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    part.add_argument("--out", default="mixed.png",
                      help="a .png grid (default: %(default)s)")
    arguments = parser.parse_args()
    for name in getattr(arguments, "names", []):
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}; choose from: {', '.join(EXPERIMENTS)}")
    try:
        if arguments.part == "speed":
            measure_speed(gan.pick_device(arguments.device), arguments.rounds)
        elif arguments.part == "quality":
            measure_quality(arguments.checkpoints)
        elif arguments.part == "mix":
            mix(arguments.checkpoint, arguments.seed, arguments.out)
        else:
            run_experiments(arguments.names, arguments.epochs, arguments.seeds, arguments.out)
    except (OSError, gan.InputError) as error:
        sys.exit(f"benchmark.py: {error}")
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
