"""The scores behind the figures of the README, and the edits of its experiments."""
import numpy
import pytest
import torch
from PIL import Image

import benchmark
from conftest import ROOT, complaint
from gan import InputError


def gaussian(count, size):
    """Return `count` points with mean 0 and the unit matrix as their covariance, exactly."""
    points = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).double()
    points -= points.mean(0)
    return points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T


def test_frechet_distance_of_known_gaussians():
    points = gaussian(200, 5)
    assert benchmark.frechet_distance(points, points) == pytest.approx(0, abs=1e-6)
    assert benchmark.frechet_distance(points, points + 2) == pytest.approx(5 * 2**2)
    # In each direction, the standard deviations are 1 and 3: (1 - 3)^2.
    assert benchmark.frechet_distance(points, 3 * points) == pytest.approx(5 * (1 - 3) ** 2)
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double))[0]
    scales = torch.tensor([1.0, 2, 3, 4, 5]).double()
    assert benchmark.frechet_distance(points * scales @ turned, points @ turned) == pytest.approx(
        (scales - 1).square().sum().item())


def test_covered_is_the_share_within_the_third_neighbours_distance():
    others = torch.tensor([[0.0], [1], [2], [3], [100]])  # their radii are 3, 2, 2, 3 and 99
    points = torch.tensor([[-2.9], [-3.1], [5.9], [50], [0.5]])
    assert benchmark.covered(points[:2], others) == 0.5
    assert benchmark.covered(points, others[:4]) == pytest.approx(3 / 5)
    assert benchmark.covered(points, others) == pytest.approx(4 / 5)


def test_nearest_distance_is_the_median_of_the_lengths():
    known = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    known[1] = 255
    digits = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    digits[1, 0, 0] = torch.tensor([51, 0])     # 0.2 from the first known digit
    digits[2, 0] = torch.tensor([255, 102])     # root(2) * 0.6 from the second one
    assert benchmark.nearest_distance(digits, known) == pytest.approx(0.2)
    assert benchmark.nearest_distance(digits[2:], known) == pytest.approx(2**0.5 * 0.6)


def test_every_experiment_still_applies_to_the_program(tmp_path):
    for name, edits in benchmark.EXPERIMENTS.items():
        benchmark.apply(edits, tmp_path / name)
        for script in (tmp_path / name).glob("*.py"):
            compile(script.read_text(encoding="utf-8"), script.name, "exec")
            changed = script.read_text() != (ROOT / script.name).read_text()
            assert changed == any(file == script.name for file, _, _ in edits)


@pytest.mark.parametrize("options, word", [
    ("quality nofile.pt", "nofile.pt"), ("quality --data nowhere", "nowhere"),
    ("experiments nothing", "'nothing'"), ("experiments --data nowhere", "nowhere"),
    ("speed --rounds 0", "--rounds"), ("speed --device tpu", "tpu"), ("mix --seed -1", "--seed"),
    ("mix --out mixed", "extension")])
def test_bad_options_are_one_line_before_any_work(cli, monkeypatch, options, word):
    monkeypatch.setattr(benchmark.train, "SHIPPED_DATA", ROOT / "data")
    assert word in complaint(cli, benchmark, *options.split())


def test_experiment_that_fails_is_one_line_that_names_its_output(tmp_path):
    benchmark.apply([("sample.py", "import argparse\n", "import argparse sys\n")], tmp_path / "try")
    with pytest.raises(InputError, match="output.txt"):
        benchmark.call(tmp_path / "try", "sample.py")
    assert "SyntaxError" in (tmp_path / "try" / "output.txt").read_text()
    with pytest.raises(InputError, match="--out"):
        benchmark.apply([], tmp_path / "try")


def test_images_of_another_size_are_refused_before_any_work(cli, checkpoint, monkeypatch):
    monkeypatch.setattr(benchmark, "sample_digits",
                        lambda generator, count: torch.zeros(count, 3, 32, 32))
    assert "(3, 32, 32)" in complaint(cli, benchmark, "quality", checkpoint)


def test_mixture_holds_generated_and_real_digits_where_it_says(cli, checkpoint):
    status, out, err = cli(benchmark, "mix", "--checkpoint", checkpoint, "--data", ROOT / "data")
    assert (status, err) == (0, "")
    letters = "".join(out.splitlines()[1:11]).replace(" ", "")
    test, labels = benchmark.load_mnist(ROOT / "data", "t10k")
    assert len(test) == 10_000 and labels.bincount()[1] == 1135
    picture = torch.from_numpy(numpy.array(Image.open("mixed.png")))
    for place, letter in enumerate(letters):
        top, left = 2 + 30 * (place // 10), 2 + 30 * (place % 10)
        is_real = (picture[top:top + 28, left:left + 28] == test).all((1, 2, 3)).any()
        assert is_real == (letter == "r")
    assert letters.count("r") == letters.count("g") == 50
