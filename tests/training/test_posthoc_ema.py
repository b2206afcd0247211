"""Averages made after the run: closed forms against quadrature, computed averages against tracked ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import integrate

from diffratio_fast import average, networks, pretrain, sample, train
from diffratio_fast.errors import UserError
from diffratio_fast.training.state.ema import power_decay, power_exponent
from diffratio_fast.training.state.posthoc_ema import Profile, combination, inner_product

TINY = json.dumps({"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []})
SHORT = ["--device", "cpu", "--backbone-options", TINY, "--batch-size", "4", "--eval-every", "1000",
         "--eval-images", "16", "--checkpoint-every", "1000", "--log-every", "1000"]  # fmt: skip


def profile(which: Profile, t: float) -> float:
    gamma = power_exponent(which.std)
    return (gamma + 1) * t**gamma / which.updates ** (gamma + 1) if t <= which.updates else 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Profile(0.1, 700), Profile(0.1, 700)),
        (Profile(0.05, 700), Profile(0.1, 700)),
        (Profile(0.05, 400), Profile(0.1, 700)),
        (Profile(0.25, 400), Profile(0.03, 700)),
    ],
)
def test_inner_products_are_those_of_quadrature(a: Profile, b: Profile) -> None:
    end = min(a.updates, b.updates)
    expected, _ = integrate.quad(lambda t: profile(a, t) * profile(b, t), 0, end, points=[0.9 * end])
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-9)
    assert inner_product(b, a) == inner_product(a, b)


def test_an_update_adds_the_integral_of_the_profile_over_it() -> None:
    weights = np.zeros(50)
    for update in range(50):
        decay = power_decay(update, 0.1)
        weights *= decay
        weights[update] += 1 - decay
    for update in (3, 30, 49):
        over, _ = integrate.quad(lambda t: profile(Profile(0.1, 50), t), update, update + 1)
        assert weights[update] == pytest.approx(over, rel=1e-9)


def tracked(weights: np.ndarray, std: float) -> np.ndarray:
    """The average after every update: [updates, numbers]."""
    found = np.zeros_like(weights)
    for update, values in enumerate(weights):
        decay = power_decay(update, std)
        found[update] = decay * found[update - 1] + (1 - decay) * values
    return found


@pytest.mark.parametrize("at", [3000, 4000])
@pytest.mark.parametrize("std", [0.07, 0.13, 0.15])
def test_a_made_average_is_the_one_tracked_directly(std: float, at: int) -> None:
    rng = np.random.default_rng(0)
    drift = np.linspace(0, 2, 4000)[:, None] + 5
    weights = drift + np.cumsum(rng.normal(size=(4000, 40)), axis=0) / np.sqrt(4000)
    averages = {width: tracked(weights, width) for width in (0.05, 0.10)}
    kept = [Profile(width, updates) for updates in range(250, at + 1, 250) for width in averages]
    files = np.stack([averages[width][updates - 1] for width, updates in kept])
    wanted = tracked(weights, std)[at - 1]
    shares, error = combination(kept, Profile(std, at))
    assert shares.sum() == pytest.approx(1) and error < 0.02
    distance = np.linalg.norm(shares @ files - wanted)
    nearest = np.linalg.norm(files - wanted, axis=1).min()
    assert distance < nearest / 50 and distance < 1e-3 * np.linalg.norm(wanted)


def test_a_kept_average_is_made_of_itself() -> None:
    kept = [Profile(width, updates) for updates in (100, 200, 300) for width in (0.05, 0.10)]
    shares, error = combination(kept, kept[3])
    np.testing.assert_allclose(shares, np.eye(6)[3], atol=1e-8)
    assert error < 1e-6


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum(((a[name].double() - b[name].double()) ** 2).sum() for name in a)) ** 0.5


def test_a_denoiser_of_another_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own average has the width that is computed from the others."""
    run, out = tmp_path / "run", tmp_path / "made.safetensors"
    assert pretrain.main(["digits", *SHORT, "--steps", "40", "--snapshot-every", "4", "--lr", "3e-3",
                          "--ema-std", "0.13", "--posthoc-ema", "0.10, 0.05",
                          "--run-dir", str(run)]) == 0  # fmt: skip
    kept = sorted(run.glob("snapshots/ema-*"))
    assert len(kept) == 20 and kept[0].name == "ema-0.05-00000004.safetensors"
    capsys.readouterr()
    assert average.main([str(run), "--ema-std", "0.13", "--out", str(out)]) == 0
    assert "at step 40, from 20 saved averages" in capsys.readouterr().out
    tracked = load_file(run / "denoiser.safetensors")
    made = load_file(out)
    nearest = min(distance(tracked, load_file(path)) for path in kept)
    assert distance(tracked, made) < nearest / 10
    network, about = networks.load_published(out)
    assert about["ema_std"] == "0.13" and about["step"] == "40" and network.label_dim == 10
    assert average.average(run, 0.05, out, step=20) < 1e-6
    assert distance(load_file(run / "snapshots/ema-0.05-00000020.safetensors"), load_file(out)) < 1e-5
    for arguments, expected in (
        (["--ema-std", "0.13", "--step", "21"], "has no averages at this step"),
        (["--ema-std", "0.3"], "--ema-std 0.3: out of range; expected above 0 and at most 0.28"),
    ):
        with pytest.raises(UserError, match=expected):
            average.main([str(run), *arguments, "--out", str(out)])
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        average.main([str(run), "--ema-std", "0.1", "--out", str(tmp_path / "none/x.safetensors")])
    kept[-1].write_bytes(kept[-1].read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        average.main([str(run), "--ema-std", "0.1", "--out", str(out)])


def test_a_generator_of_another_width(tmp_path: Path) -> None:
    """From the first update of the generator on, with its own width among those kept; float16 on disk."""
    run, out = tmp_path / "run", tmp_path / "made.safetensors"
    options = ["--generator-width", "16", "--ratio-width", "16", "--refit-steps", "0", "--steps", "20"]
    assert train.main(["digits", *SHORT, *options, "--snapshot-every", "5", "--ratio-warmup-steps", "6",
                       "--ema-std", "0.1", "--posthoc-ema", "0.05,0.1", "--posthoc-ema-half",
                       "--run-dir", str(run)]) == 0  # fmt: skip
    kept = sorted(path.name for path in run.glob("snapshots/ema-*"))
    assert kept[:3] == [f"ema-0.05-{step:08d}.safetensors" for step in (10, 15, 20)] and len(kept) == 6
    own, last = load_file(run / "generator.safetensors"), load_file(run / "snapshots" / kept[-1])
    for name, tensor in own.items():
        assert last[name].dtype == torch.float16 and torch.equal(last[name], tensor.half())
    assert average.average(run, 0.1, out) < 1e-6
    made = load_file(out)
    for name, tensor in own.items():  # up to float16 rounding
        torch.testing.assert_close(made[name], tensor, rtol=1e-3, atol=1e-6)
    _, about = networks.load(out, "generator")
    assert about.training["ema_std"] == 0.1 and about.training["ema_updates"] == 14
    images = tmp_path / "images.npz"
    assert sample.main([str(out), "--count", "5", "--out", str(images), "--device", "cpu"]) == 0
    with np.load(images) as archive:
        assert archive["images"].shape == (5, 8, 8, 1)


def test_where_there_is_nothing_to_combine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        average.main([str(tmp_path / "x"), "--ema-std", "0.1", "--out", str(tmp_path / "o.safetensors")])
    with pytest.raises(UserError, match="--posthoc-ema"):
        average.main([str(tmp_path), "--ema-std", "0.1", "--out", str(tmp_path / "o.safetensors")])
    for widths in ("x", "", "0.1,0", "0.05,0.4"):
        with pytest.raises(UserError, match="--posthoc-ema must be relative widths"):
            pretrain.main(["digits", *SHORT, "--posthoc-ema", widths, "--run-dir", str(tmp_path / "r")])


@pytest.mark.parametrize("std", [0.04, 0.07, 0.13, 0.2])
def test_sixteen_snapshots_match_profiles_to_three_per_cent(std: float) -> None:
    """The claim of docs/presets.md; one width is not enough."""
    times = range(1000, 16_001, 1000)
    _, both = combination([Profile(width, t) for t in times for width in (0.05, 0.10)], Profile(std, 16_000))
    _, one = combination([Profile(0.10, t) for t in times], Profile(std, 16_000))
    assert both < 0.03 < one
