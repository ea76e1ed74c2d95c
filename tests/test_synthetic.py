"""The synthetic figure is repeatable and falls, and nobody can mistake it for a measurement."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pruning import UserError, generate_synthetic_graph
from pruning.generate_synthetic_graph import EXPECTED, RATES, expected_accuracy, synthetic_curves
from pruning.methods import METHODS, PRUNING
from pruning.records.findings import QUALITY, relative_curve
from pruning.records.record import find_records, read_record

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    generate_synthetic_graph.main(["--output_dir", str(folder)])
    return folder


def test_the_same_seed_gives_the_same_curves_and_another_seed_others():
    assert synthetic_curves(0.05, 42) == synthetic_curves(0.05, 42)
    assert synthetic_curves(0.05, 42) != synthetic_curves(0.05, 43)


def test_without_noise_a_curve_is_the_expectation():
    for curve in synthetic_curves(0, 1).values():
        assert curve["accuracy"] == curve["expected"]


@pytest.mark.parametrize("method", PRUNING)
def test_accuracy_starts_at_the_dense_model_and_falls_through_half_at_the_knee(method):
    curve = EXPECTED[method]
    values = [expected_accuracy(rate, curve) for rate in RATES]
    assert values[0] == pytest.approx(1)
    assert values == sorted(values, reverse=True)
    assert expected_accuracy(curve.knee, curve) == pytest.approx(0.5, abs=0.03)


def test_the_expectation_follows_what_the_bundled_models_kept():
    measured = {}
    for path in (ROOT / "results").rglob("*.json"):
        record = read_record(path)
        if record.variant in EXPECTED:
            for point, kept in zip(record.points, relative_curve(record, QUALITY)[1:]):
                measured.setdefault((record.variant, point.rate), {}).setdefault(record.model, []).append(kept)
    assert {method for method, _ in measured} == set(EXPECTED)
    for (method, rate), of_models in measured.items():
        mean = np.mean([np.mean(values) for values in of_models.values()])
        assert expected_accuracy(rate, EXPECTED[method]) == pytest.approx(mean, abs=0.15), (method, rate)


def test_picture_and_json_are_written_and_the_json_says_that_it_is_synthetic(drawn):
    data = json.loads((drawn / "synthetic.json").read_text())
    assert data["synthetic"] is True
    assert "not a measurement" in data["notice"]
    assert set(data["curves"]) == set(PRUNING)
    assert data["seed"] == 42
    assert data["noise"] == 0.05
    with Image.open(drawn / "synthetic.png") as image:
        assert image.width >= 700
    assert sorted(path.name for path in drawn.iterdir()) == ["synthetic.json", "synthetic.png", "synthetic.svg"]


def test_the_synthetic_json_is_not_a_record(drawn):
    assert find_records(drawn) == []
    with pytest.raises(UserError, match="synthetic"):
        read_record(drawn / "synthetic.json")


@pytest.mark.parametrize("arguments", [["--noise", "-0.1"], ["--noise", "nan"], ["--noise", "inf"], ["--noise", "x"],
                                       ["--seed", "-1"]])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        generate_synthetic_graph.main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_method_without_an_expected_curve_is_named_and_not_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(METHODS, "a_new_method", METHODS["magnitude"])
    generate_synthetic_graph.main(["--output_dir", str(tmp_path)])
    assert "a_new_method" in capsys.readouterr().err
    assert "a_new_method" not in json.loads((tmp_path / "synthetic.json").read_text())["curves"]
