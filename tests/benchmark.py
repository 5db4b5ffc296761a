"""Speed of training and quality of the digits, measured:  python tests/benchmark.py [--device D] [--data DIR] ...

No test, and nothing is asserted: figures differ from machine to machine, and noise is part of them. Run it with
nothing else beside it.
"""
import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.datasets.mnist import read_image_file, read_label_file

import gan
from sample import SHIPPED, generate, load_generator, pick_device
from train import DEFAULTS, fetch_mnist, load_images, replayed


def seconds(work, device, least=0.5):
    """Seconds that work() takes: repeated for at least `least` seconds, after a first time that does not count."""
    work()
    finish(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        work()
        finish(device)
        count += 1
    return (time.perf_counter() - began) / count


def finish(device):
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


class Flops(TorchDispatchMode):
    """Adds up the arithmetic of convolutions and matrix products, by PyTorch's own formulas, while it is entered."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if operation._overloadpacket in flop_registry:
            self.total += flop_registry[operation._overloadpacket](*arguments, **(options or {}), out_val=result)
        return result


class Game:
    """Both networks and one step of training: as train.py has it, or `plain`: float32, no channels last, no graphs."""

    def __init__(self, images, plain=False):
        layout = torch.contiguous_format if plain else torch.channels_last
        self.images, self.device, self.plain, self.count = images, images.device, plain, 0
        self.generator = gan.Generator(DEFAULTS["latent_dim"]).to(self.device, memory_format=layout)
        self.discriminator = gan.Discriminator().to(self.device, memory_format=layout)
        self.average = gan.Generator(DEFAULTS["latent_dim"]).to(self.device, memory_format=layout)
        self.g_optimizer, self.d_optimizer = (
            gan.make_optimizer(network, DEFAULTS["lr"]) for network in (self.generator, self.discriminator))
        self.number = torch.zeros((), device=self.device)
        self.play = self.step if plain or self.device.type != "cuda" else (
            replayed(self.step, (self.g_optimizer, self.d_optimizer)))

    def precision(self):
        return torch.autocast(self.device.type, enabled=False) if self.plain else gan.precision(self.device)

    def step(self, batch, penalise):
        real = self.images[batch].float() / 127.5 - 1
        with self.precision():
            values = gan.adversarial_step(self.generator, self.discriminator, self.g_optimizer, self.d_optimizer, real,
                                          penalise=penalise)
        gan.update_average(self.average, self.generator, self.number.add_(1))
        return torch.stack(values)

    def cycle(self, play=None):
        """PENALTY_EVERY steps, one of them with the penalty."""
        for batch in torch.randint(len(self.images), (gan.PENALTY_EVERY, DEFAULTS["batch_size"]), device=self.device):
            self.count += 1
            (play or self.play)(batch, self.count % gan.PENALTY_EVERY == 0)


def speed(device, data, rounds=9):
    """Print what a step of training takes and what it could take at best."""
    began = time.perf_counter()
    images = load_images(data).to(device)
    (images[torch.randperm(len(images), device=device)[:DEFAULTS["batch_size"]]].float() / 127.5 - 1).sum().item()
    loading = time.perf_counter() - began
    per_cycle = gan.PENALTY_EVERY * DEFAULTS["batch_size"]
    games = {"as train.py does it": Game(images), "plain float32 loop": Game(images, plain=True)}
    times = {name: [] for name in games}
    for _ in range(rounds):  # in turns, so that what disturbs one disturbs the other
        for name, game in games.items():
            times[name].append(seconds(game.cycle, device))
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:36s} {per_cycle / middle:9.0f} images/s   {1000 * middle / gan.PENALTY_EVERY:7.2f} ms a step "
              f"(median of {rounds}; {per_cycle / max(taken):.0f} to {per_cycle / min(taken):.0f} images/s)")
    taken, plain = (statistics.median(times[name]) / gan.PENALTY_EVERY for name in games)
    print(f"{'ratio of the two':36s} {plain / taken:9.2f}")

    # The step as it is, no graph: each optimizer tells when its update is done.
    game, marks = Game(images), []
    for optimizer in (game.d_optimizer, game.g_optimizer):
        optimizer.register_step_post_hook(lambda *_: (finish(device), marks.append(time.perf_counter())))
    game.cycle(game.step)
    shares = []
    for _ in range(rounds):
        for batch in torch.randint(len(images), (gan.PENALTY_EVERY, DEFAULTS["batch_size"]), device=device):
            finish(device)
            marks[:] = [time.perf_counter()]
            game.step(batch, False)
            finish(device)
            marks.append(time.perf_counter())
            shares.append([after - before for before, after in zip(marks, marks[1:])])
    d_time, g_time, rest = (1000 * statistics.median(part) for part in zip(*shares))
    print(f"{'a step without penalty or graph':36s} G(z) and D update {d_time:.2f} ms, G update {g_time:.2f} ms, "
          f"average and log {rest:.2f} ms")

    with Flops() as counter:
        game.cycle(game.step)
    flops = counter.total / gan.PENALTY_EVERY
    size = 8192 if device.type == "cuda" else 2048
    with gan.precision(device):
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    square = torch.randn(size, size, device=device, dtype=dtype)
    peak = 2 * size**3 / statistics.median(seconds(lambda: square @ square, device) for _ in range(5))
    print(f"{'arithmetic':36s} {flops / 1e9:.2f} GFLOP a step, {flops / taken / 1e9:.0f} GFLOP/s; matrix product of "
          f"{size}x{size}, {dtype}: {peak / 1e9:.0f} GFLOP/s; the step reaches {100 * flops / taken / peak:.0f} %")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"{'memory, at most':36s} {memory / 2**20:9.0f} MiB")
    print(f"{'data to the first batch':36s} {loading:9.2f} s")
    layers(game, device, peak, 1000 * taken)


def layers(game, device, peak, step_time):
    """Print each layer's arithmetic rate alone: forward, gradient by its input, gradient by its weights."""
    print(f"\n{'layer, output':45s} {'MFLOP':>6s}  {'forward':>15s}  {'by input':>15s}  {'by weights':>15s}")
    total = 0
    real = game.images[:DEFAULTS["batch_size"]].float() / 127.5 - 1
    z = torch.randn(len(real), game.generator.latent_dim, device=device)
    # How often a step without penalty runs each: G once forward and back; D on real, on fake and once more for G.
    for network, value, uses in ((game.generator, z, (1, 1, 1)), (game.discriminator, real, (3, 3, 2))):
        for layer in network.layers:
            with gan.precision(device):
                with torch.no_grad():
                    output = layer(value)
                if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                    asked = value.detach().requires_grad_()
                    with Flops() as counter:
                        result = layer(asked)
                    mflop = counter.total / 1e6
                    works = (lambda: layer(value.detach()), *(
                        lambda part=part: torch.autograd.grad(result, part, torch.ones_like(result), retain_graph=True)
                        for part in (asked, layer.weight)))
                    taken = [1000 * seconds(work, device, 0.2) for work in works]
                    total += sum(use * time for use, time in zip(uses, taken))
                    name = f"{type(network).__name__[0]} {type(layer).__name__} {tuple(output.shape[1:])}"
                    print(f"{name:45s} {mflop:6.0f}" + "".join(
                        f"  {time:5.2f} ms {100 * mflop * 1e9 / time / peak:4.0f} %" for time in taken))
            value = output
    print(f"{'all, as often as a step needs':45s} {total:.1f} of the step's {step_time:.1f} ms; the rest: batch "
          "norm, activations, optimizers, penalty, Python")


class Classifier(nn.Module):
    """Digits (N, 1, 28, 28) in [-1, 1] to 10 logits; features() are the 64 numbers before the last layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),           # (N, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),          # (N, 64, 7, 7)
            nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU())                   # (N, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.features(images))


def mnist(data):
    """MNIST's 60,000 training images (N, 28, 28) and labels (N,), uint8; fetched where they are missing."""
    raw = Path(data, "MNIST", "raw")
    if not all((raw / f"train-{kind}-ubyte").exists() for kind in ("images-idx3", "labels-idx1")):
        fetch_mnist(data)
    return read_image_file(raw / "train-images-idx3-ubyte"), read_label_file(raw / "train-labels-idx1-ubyte")


def classifier(images, labels, cache, epochs=3):
    """A Classifier trained on these images, from the file `cache` if it is there, else into it."""
    torch.manual_seed(0)
    network = Classifier()
    if cache.exists():
        network.load_state_dict(torch.load(cache, weights_only=True))
        return network.eval()
    print(f"training a classifier for {epochs} epochs, once; it is kept in {cache}", flush=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(network(images[batch].unsqueeze(1).float() / 127.5 - 1), labels[batch].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(network.state_dict(), cache)
    return network.eval()


def frechet_distance(one, other):
    """|m1 − m2|² + tr(C1 + C2 − 2 (C1 C2)^½) of two sets of features (N, F), (M, F): how far apart two normal
    distributions are that have their means m and covariances C. 0 for the same. (Dowson and Landau 1982; for generated
    images Heusel et al. 2017, arxiv.org/abs/1706.08500, with features of a classifier of photographs.)"""
    one, other = one.double(), other.double()
    c1, c2 = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()  # tr (C1 C2)^½, symmetric and so exact
    return ((one.mean(0) - other.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()


def nearest(images, known):
    """The distance of each of `images` from the nearest of `known`, over pixels in [0, 1]; both uint8 (N, 28, 28)."""
    images, known = images.flatten(1).float() / 255, known.flatten(1).float() / 255
    return torch.cat([torch.cdist(some, known).amin(1) for some in images.split(100)])


@torch.no_grad()
def quality(checkpoint, data, count=10_000):
    """Print how generated digits compare with real ones, in the eyes of a classifier trained on 40,000 training digits.

    The Fréchet distance is from 10,000 others of MNIST's training digits; the last 10,000 show what real digits score.
    Neither was shown to the classifier. Beside it: of how many digits the classifier is sure, and each class's share.
    Last, whether they are copies: the distance of 1,000 from the nearest of the 60,000, beside that of test digits.
    """
    images, labels = mnist(data)
    with torch.enable_grad():
        network = classifier(images[:40_000], labels[:40_000], Path(data, "benchmark_classifier.pt"))

    def features(images):
        return torch.cat([network.features(some.unsqueeze(1).float() / 127.5 - 1) for some in images.split(500)])

    reference = features(images[40_000:50_000])
    wrong = (network.head(reference).argmax(1) != labels[40_000:50_000]).float().mean()
    print(f"\nclassifier's errors on digits it was not shown: {100 * wrong:.2f} %")
    generated = generate(load_generator(checkpoint), count, seed=1)
    for name, some in (("real digits", images[50_000:]), (str(checkpoint), generated)):
        seen = features(some)
        answers = network.head(seen).softmax(1)
        shares = answers.argmax(1).bincount(minlength=10) / len(some)
        print(f"{name}: Fréchet distance {frechet_distance(seen, reference):.3f}; classifier sure (> 0.95) of "
              f"{100 * (answers.amax(1) > 0.95).float().mean():.1f} %\n    shares of 0 to 9, in %: "
              + ", ".join(f"{100 * share:.1f}" for share in shares))
    unseen = read_image_file(Path(data, "MNIST", "raw", "t10k-images-idx3-ubyte"))
    for name, some in (("test digits", unseen), (str(checkpoint), generated)):
        print(f"nearest training digit of 1,000 of {name}: median distance {nearest(some[:1000], images).median():.2f}")


def main():
    parser = argparse.ArgumentParser(description="Measure speed and quality.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("speed", "quality", "both"), default="both", help="what to measure")
    parser.add_argument("--device", default="auto", help="for the speed: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--data", default=DEFAULTS["data"], help="where MNIST is, or is put")
    parser.add_argument("--checkpoint", default=SHIPPED, help="for the quality: a checkpoint.pt or generator.pt")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        print(f"PyTorch {torch.__version__}, {device}, " + (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"))
        if args.part != "quality":
            speed(device, args.data)
        if args.part != "speed":
            quality(args.checkpoint, args.data)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
