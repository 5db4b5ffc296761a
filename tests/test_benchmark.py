"""The scores behind the figures of the README, and the edits of its experiments."""
import pytest
import torch

import benchmark
import sample
from conftest import ROOT, blobs


def test_frechet_distance_of_known_distributions():
    points = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * 3**0.5 / 2  # covariance 1
    assert benchmark.frechet_distance(points, points) == pytest.approx(0, abs=1e-6)
    assert benchmark.frechet_distance(points, points + 2) == pytest.approx(2 * 2**2)
    # In each direction, the standard deviations are 1 and 3: (1 - 3)^2.
    assert benchmark.frechet_distance(points, 3 * points) == pytest.approx(2 * (1 - 3) ** 2)


def test_covered_is_the_share_within_the_third_neighbours_distance():
    others = torch.tensor([[0.0], [1], [2], [3], [100]])
    radii = benchmark.radii(others)
    assert radii.tolist() == [3, 2, 2, 3, 99]
    points = torch.tensor([[-2.9], [-3.1], [5.9], [50], [0.5]])
    assert benchmark.covered(points[:2], others, radii) == 0.5
    assert benchmark.covered(points, others[:4], radii[:4]) == pytest.approx(3 / 5)


def test_one_of_two_kinds_of_digits_has_precision_1_and_recall_one_half(capsys):
    torch.manual_seed(0)
    scorer = object.__new__(benchmark.Scorer)  # without training the classifier
    scorer.classifier = benchmark.Classifier().eval()
    kinds = torch.cat([blobs(100), 255 - blobs(100)])
    scorer.reference = scorer.look_at(kinds)[0]
    scorer.radii = benchmark.radii(scorer.reference)
    distance, precision, recall, confident, rarest = scorer.score(blobs(100))
    assert distance > 0 and (precision, recall, confident, rarest) == (1, 0.5, 0, 0)
    assert scorer.score(kinds)[:3] == (pytest.approx(0, abs=1e-4), 1, 1)
    scorer.print_row("some", [blobs(100), kinds, kinds])
    assert capsys.readouterr().out.split()[1:3] == ["1.000", "1.000"]  # medians


def test_quality_scores_a_draw_for_each_seed(monkeypatch):
    rows = []
    monkeypatch.setattr(benchmark, "Scorer", lambda test: benchmark)
    monkeypatch.setattr(benchmark, "print_row", lambda *row: rows.append(row), raising=False)
    monkeypatch.setattr(benchmark, "sample_digits", lambda generator, count, seed:
                        sample.sample_digits(generator, count // 1000, seed))
    benchmark.measure_quality([sample.SHIPPED], [1, 2], test=False)
    (_, draws), = rows
    assert torch.equal(draws[1], sample.sample_digits(sample.load_generator(), 10, 2))
    assert not torch.equal(*draws)


def test_every_experiment_still_applies_to_the_program(tmp_path):
    for name, edits in benchmark.EXPERIMENTS.items():
        benchmark.apply(edits, tmp_path / name)
        for script in (tmp_path / name).glob("*.py"):
            compile(script.read_text(encoding="utf-8"), script.name, "exec")
            changed = script.read_text() != (ROOT / script.name).read_text()
            assert changed == any(file == script.name for file, _, _ in edits)


def test_unknown_experiments_and_missing_files_are_named(complaint):
    assert "choose from: DCGAN" in complaint(benchmark, "experiments", "nothing")
    assert "nofile.pt" in complaint(benchmark, "quality", "nofile.pt")
