"""Warnings about a run from its metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

SMALLEST_GAP = 0.03
"""Minimum gap or rise in nats for a warning."""
SURE = 3.0
"""Standard errors that a difference must exceed."""
SATURATED = 0.99
"""Accuracy of a saturated ratio network: its log ratio contains little more than real or fake."""
HUGE = 15.0
"""Mean log ratio of reals (and minus that of fakes) of a saturated ratio network."""
LINES = 5
"""Number of consecutive log lines in which a condition must hold."""
SECONDS = 10.0
"""Minimum duration of those lines in seconds, for conditions on time."""
WAITING = 0.3
"""Maximum fraction of the time spent waiting for batches."""
SLOW = 0.6
"""Fraction of the earlier throughput below which a run is slow."""


def warnings(history: Sequence[dict[str, Any]], *, after: int = 0) -> list[tuple[str, str]]:
    """Return (kind, sentence) for every warning that applies to the newest lines of ``history``.

    ``history`` are the lines of metrics.jsonl in order, ``after`` is the step at which warm-up and ramp of
    the generator end. Values that are None (not finite) are skipped.
    """
    evaluations = [line for line in history if "divergence_by_sigma" in line and "sigma" in line]
    logged = [line for line in history if "images_per_second" in line]
    settled = [line for line in logged if line["step"] > after]
    checks = (
        _bad_steps(logged),
        _gap(evaluations) if evaluations else None,
        _rise([e for e in evaluations if e["step"] > after]),
        (_saturation(evaluations) if evaluations else None) or _saturated_for_long(settled),
        _waiting(logged),
        _slower(settled),
    )
    return [found for found in checks if found is not None]


def _number(line: dict[str, Any], name: str) -> float:
    value = line.get(name)
    return math.nan if value is None else float(value)


def _gap(evaluations: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    gaps = [_number(line, "divergence_train") - _number(line, "divergence") for line in evaluations]
    last = evaluations[-1]
    error = math.hypot(_number(last, "divergence_error"), _number(last, "divergence_train_error"))
    earlier = gaps[len(gaps) // 2 - 1] if len(gaps) > 1 else math.nan
    if not (gaps[-1] > max(SMALLEST_GAP, SURE * error) and gaps[-1] > earlier):
        return None
    return "overfitting", (
        f"the ratio network overfits its training set: its bound is "
        f"{_number(last, 'divergence_train'):.3f} nats on training data and "
        f"{_number(last, 'divergence'):.3f} on validation data, and the gap has increased from "
        f"{earlier:.3f}. "
        "The generator may memorize training images. Use more data, a larger --ratio-weight-decay or a "
        "larger "
        "--ratio-roll-probability."
    )


def _rise(evaluations: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    # prefer the refitted bound: the online bound also rises when the ratio network improves
    name = "divergence_refit" if any("divergence_refit" in line for line in evaluations) else "divergence"
    series = [line for line in evaluations if not math.isnan(_number(line, name))]
    if len(series) < 2:
        return None
    lowest, last = min(series[:-1], key=lambda line: _number(line, name)), series[-1]
    rise = _number(last, name) - _number(lowest, name)
    error = math.sqrt(2) * _number(last, "divergence_error")
    nearer = _number(last, "frechet_distance_validation") < _number(lowest, "frechet_distance_validation")
    if not rise > max(SMALLEST_GAP, SURE * error) or nearer:  # the Fréchet distance may still improve
        return None
    return "rising", (
        f"the divergence has risen from {_number(lowest, name):.3f} nats at step {lowest['step']} to "
        f"{_number(last, name):.3f}: the generator is moving away from the data. Use a lower --generator-lr "
        "or more --ratio-steps; snapshots/ contains earlier generators."
    )


def _saturation(evaluations: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    last = evaluations[-1]
    levels = [
        (sigma, accuracy)
        for sigma, accuracy in zip(last["sigma"], last["ratio_accuracy_by_sigma"], strict=True)
        if accuracy is not None and accuracy >= SATURATED
    ]
    if 2 * len(levels) < len(last["sigma"]):
        return None
    return "saturated", (
        f"the ratio network classifies real and generated images almost without error at {len(levels)} of "
        f"{len(last['sigma'])} noise levels (up to sigma {max(levels)[0]:.2g}): a saturated ratio is a weak "
        "training signal. Use larger noise levels (--ratio-noise), a lower --ratio-lr or a larger "
        "--ratio-weight-decay. Early in a run this is normal and temporary."
    )


def _bad_steps(logged: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    count = int(logged[-1].get("bad_steps") or 0) if logged else 0
    if not count:
        return None
    steps = logged[-1]["step"] - (logged[-2]["step"] if len(logged) > 1 else 0)
    return "spike", (
        f"{count} of the {steps} steps up to step {logged[-1]['step']} were bad: the loss or a gradient norm "
        "was far above its running mean. If this happens again, use lower learning rates; "
        "--stop-after-bad-steps stops a run that does not recover."
    )


def _saturated_for_long(logged: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    last = logged[-LINES:]
    if len(last) < LINES:
        return None
    sure = all(_number(line, "ratio_accuracy") >= SATURATED for line in last)
    gaps = [(_number(line, "log_ratio_real") - _number(line, "log_ratio_fake")) / 2 for line in last]
    if not sure and not all(gap > HUGE for gap in gaps):
        return None
    return "saturated", (
        f"since step {last[0]['step']} the ratio network classifies real and generated images almost "
        "without error "
        f"(accuracy {_number(last[-1], 'ratio_accuracy'):.3f}, mean log ratio of reals "
        f"{_number(last[-1], 'log_ratio_real'):.1f}, of fakes {_number(last[-1], 'log_ratio_fake'):.1f}): a "
        "saturated ratio is a weak training signal. Use larger noise levels (--ratio-noise), a lower "
        "--ratio-lr or a larger --ratio-weight-decay."
    )


def _seconds(lines: Sequence[dict[str, Any]]) -> float:
    return _number(lines[-1], "seconds") - _number(lines[0], "seconds") if lines else 0.0


def _waiting(logged: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    last = logged[-LINES:]
    shares = [_number(line, "loader_share") for line in last]
    if len(last) < LINES or not _seconds(last) >= SECONDS or not all(share > WAITING for share in shares):
        return None
    return "loader", (
        f"the data loader is too slow: since step {last[0]['step']} {sum(shares) / len(shares):.0%} of the "
        "time was spent waiting for batches. Use a faster or local disk, or --verify never."
    )


def _slower(logged: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    earlier, last = logged[:-LINES], logged[-LINES:]
    if len(earlier) < LINES or not _seconds(last) >= SECONDS:
        return None
    usual = statistics.median(_number(line, "images_per_second") for line in earlier)
    fastest = max(_number(line, "images_per_second") for line in last)
    if not fastest < SLOW * usual:
        return None
    return "slower", (
        f"training has become slower: at most {fastest:,.0f} images a second since step {last[0]['step']}, "
        f"{usual:,.0f} before. Other programs may use the machine, or the device reduces its clock when hot."
    )
