"""The verifier as a command: refit a finished run, then sample with candidates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import SMALL, one_error_line, run

from diffratio_fast import evaluate, networks, refit, sample, train
from diffratio_fast.errors import UserError
from diffratio_fast.verifier import tables
from diffratio_fast.verifier.calibration import Calibration, Estimate
from diffratio_fast.verifier.noise_level import SigmaCheck


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a fitted verifier."""
    where = tmp_path_factory.mktemp("fitted") / "run"
    threads = torch.get_num_threads()
    options = ["--ratio-ema-half-life-images", "500", "--flip-probability", "0.1"]
    assert train.main([*SMALL, *options, "--steps", "9", "--run-dir", str(where)]) == 0
    assert (
        refit.main([str(where), "--steps", "30", "--candidates", "2", "--draws", "2", "--device", "cpu"]) == 0
    )
    torch.set_num_threads(threads)
    return where


def test_refit_leaves_a_better_network_and_its_calibration(fitted: Path) -> None:
    network, about = networks.load(fitted / "ratio_refit.safetensors", "ratio")
    online, _ = networks.load(fitted / "ratio.safetensors", "ratio")
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), online.parameters(), strict=True))
    assert about.training["refit"]["bound"] >= 0 and about.training["step"] == 9
    assert set(about.training["verifier"]) == {"sigma", "checks"}
    rows = json.loads((fitted / "measurements.json").read_text())
    assert set(rows) == {"noise_levels", "calibration", "evaluations"}
    assert set(rows["calibration"]) == {"online", "average", "refitted"}
    for found in rows["calibration"].values():
        assert [row["sigma"] for row in found] == sorted(row["sigma"] for row in found)
        assert all(
            {"generated_mean", "data_mean", "balance", "auc", "reliability"} <= set(row) for row in found
        )


def test_calibration_of_what_the_run_holds(fitted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fitted, tmp_path / "run")
    (copy / "ratio_ema.safetensors").unlink()
    (copy / "measurements.json").write_text('{"noise_levels": {}, "calibration": {}}')
    found = tables.calibrate_run(copy, torch.device("cpu"))
    assert list(found) == ["online", "refitted"]
    kept = json.loads((copy / "measurements.json").read_text())
    assert list(kept["calibration"]) == ["online", "refitted"] and "noise_levels" in kept
    assert "Calibration" in (copy / "report.html").read_text()
    text = tables.text(found)
    for row in (*found["online"], *found["refitted"]):
        assert f"{row.sigma:.3f}" in text and f"{row.auc:.3f}" in text
    # the same numbers, from the same seed, as those that refit left
    before = json.loads((fitted / "measurements.json").read_text())["calibration"]
    assert kept["calibration"] == {name: before[name] for name in kept["calibration"]}


def test_evaluate_prints_the_calibration(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(fitted), "--calibration", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "online ratio network" in printed and "E_gen" in printed and "reliability" in printed
    assert evaluate.main([str(fitted), "--calibration", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((fitted / "measurements.json").read_text())["calibration"]


def npz(fitted: Path, out: Path, *options: object) -> np.ndarray:
    assert sample.main([str(fitted), "--out", str(out), "--device", "cpu", *map(str, options)]) == 0
    with np.load(out) as archive:
        return archive["images"]


def test_candidates_are_the_generators_own_images(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--classes", "3", "--sigma", 0.3, "--draws", 2]
    four = npz(fitted, tmp_path / "a.npz", "--count", 40, "--candidates", 4, *options)
    assert "effective sample size" in capsys.readouterr().out
    plain = npz(fitted, tmp_path / "b.npz", "--count", 160, "--classes", "3")
    chosen = [
        [j for j in range(4) if np.array_equal(image, plain[4 * i + j])] for i, image in enumerate(four)
    ]
    assert all(chosen) and len({found[0] for found in chosen}) == 4
    few = npz(fitted, tmp_path / "c.npz", "--count", 7, "--candidates", 4, *options)
    assert np.array_equal(few, four[:7])
    best = npz(fitted, tmp_path / "d.npz", "--count", 40, "--candidates", 4, "--select", "best", *options)
    assert not np.array_equal(best, four)


def test_a_small_effective_sample_size_is_warned_about(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A strongly overconfident ratio network gives all weight to few candidates."""
    network, about = networks.load(fitted / "ratio_refit.safetensors", "ratio")
    with torch.no_grad():
        network.last.weight.mul_(300)  # type: ignore[union-attr]
    networks.save(tmp_path / "sure.safetensors", network, about)
    npz(
        fitted,
        tmp_path / "a.npz",
        "--candidates",
        4,
        "--verifier",
        tmp_path / "sure.safetensors",
        "--sigma",
        0.2,
    )
    assert "below 0.1 N" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("sample", ["RUN", "--candidates", "0"], "--candidates"),
        ("sample", ["RUN", "--candidates", "2", "--sigma", "-1"], "--sigma"),
        ("sample", ["RUN", "--candidates", "2", "--draws", "0"], "--draws"),
        ("sample", ["RUN", "--candidates", "2", "--verifier", "nowhere"], "diffratio_fast.refit"),
        ("refit", ["nowhere"], "no such run directory"),
        ("evaluate", ["nowhere", "--calibration"], "no such run directory"),
        ("refit", ["RUN/samples"], "no config.yaml"),
        ("refit", ["RUN", "--steps", "0"], "--steps"),
        ("refit", ["RUN", "--batch-size", "-3"], "--batch-size"),
    ],
)
def test_bad_input_gets_one_line(
    fitted: Path, tmp_path: Path, command: str, options: list[str], expected: str
) -> None:
    options = [option.replace("RUN", str(fitted)) for option in options]
    assert expected in one_error_line(run(command, *options, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_noise_level_is_reported(fitted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fitted, tmp_path / "run")
    network, about = networks.load(copy / "ratio_refit.safetensors", "ratio")
    about.training["verifier"]["sigma"] = None
    networks.save(copy / "ratio_refit.safetensors", network, about)
    line = one_error_line(run("sample", copy, "--candidates", 2, cwd=tmp_path))
    assert "--sigma" in line


def test_a_verifier_of_an_earlier_generator_is_refused(fitted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fitted, tmp_path / "run")
    network, about = networks.load(copy / "ratio_refit.safetensors", "ratio")
    about.training["step"] = 8
    networks.save(copy / "ratio_refit.safetensors", network, about)
    with pytest.raises(UserError, match="of step 8; this one is of step 9"):
        npz(copy, tmp_path / "a.npz", "--candidates", 2, "--sigma", 0.3)


def test_an_evaluation_goes_into_the_report(fitted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fitted, tmp_path / "run")
    options = [str(copy), "--count", "80", "--metrics", "frechet", "--device", "cpu"]
    for seeds in ("0,1", "0,1", "2"):
        assert evaluate.main([*options, "--seeds", seeds]) == 0
    rows = json.loads((copy / "measurements.json").read_text())["evaluations"]
    assert [row["seeds"] for row in rows] == [[0, 1], [2]]  # the second replaced the first
    page = (copy / "report.html").read_text()
    assert "frechet distance" in page and "mean of 2 seeds" in page and "against digits train" in page


def test_the_verdict_is_in_words() -> None:
    def check(mean: float, share: float, distances: tuple[float, ...]) -> SigmaCheck:
        good = Estimate(1.0, 0.1)
        row = Calibration(0.2, Estimate(mean, 0.1), good, Estimate(0, 0.1), 0.6, share, ())
        return SigmaCheck(row, distances, (1.0, 1.1))

    text = refit.verdict(None, [check(2, 1, ()), check(1, 0.01, ()), check(1, 1, (2.0, 2.1))])
    assert "is not below 0.1" in text and "below 0.1 N" in text and "2.050 is worse than 1.050" in text
    assert "no noise level is valid" in text
    assert "chosen" in refit.verdict(0.2, [check(1, 1, (1.0, 1.1))])
    assert "--eval-features none" in refit.verdict(None, [])
