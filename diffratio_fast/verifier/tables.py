"""``evaluate --calibration``: calibration of the ratio networks of a finished run for its generator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast import report
from diffratio_fast.runs.measurements import keep_measurements

if TYPE_CHECKING:
    import torch

    from diffratio_fast.verifier.calibration import Calibration


def calibrate_run(root: Path, device: torch.device) -> dict[str, list[Calibration]]:
    """Calibration of the run's ratio networks for the averaged generator, on the validation split.

    Networks: online, average and refitted, if available. Noise levels: the candidates of a verifier. The
    result is also written to measurements.json and report.html of the run.
    """
    from diffratio_fast.verifier.finished_run import FinishedRun
    from diffratio_fast.verifier.noise_level import candidate_sigmas

    run = FinishedRun(root, device)
    run.require_validation()
    found = run.calibrations(candidate_sigmas(run.law))
    keep_measurements(root, calibration=plain(found))
    report.write(root)
    return found


def plain(found: dict[str, list[Calibration]]) -> dict[str, list[dict[str, Any]]]:
    """Convert to JSON data."""
    return {name: [row.as_dict() for row in rows] for name, rows in found.items()}


def text(found: dict[str, list[Calibration]]) -> str:
    """Format as text: a table per network, and its reliability diagram at the middle noise level."""
    parts = []
    for name, rows in found.items():
        parts.append(f"{name} ratio network\n{table(rows)}\n{diagram(rows[len(rows) // 2])}")
    return "\n\n".join(parts)


def table(rows: list[Calibration]) -> str:
    """Format one line per noise level: three identities with errors, AUC, effective sample size."""
    lines = ["  sigma   E_gen e^l = 1     E_data e^-l = 1   balance = 0         AUC    effective sample size"]
    for row in rows:
        lines.append(
            f"  {row.sigma:5.3f}   {_with_error(row.generated_mean)}   {_with_error(row.data_mean)}   "
            f"{row.balance.value:+.3f} +- {row.balance.error:.3f}   {row.auc:.3f}  "
            f"{row.effective_sample_size:.2f} N"
        )
    return "\n".join(lines)


def _with_error(estimate: Any) -> str:
    return f"{estimate.value:6.3g} +- {estimate.error:<5.2g}"


def diagram(row: Calibration) -> str:
    """Format the reliability diagram: predicted probability of real, observed fraction, images."""
    lines = [f"  reliability at sigma {row.sigma:.3f}: predicted, observed (noised images)"]
    lines += [f"    {bin.predicted:.2f}  {bin.observed:.2f}  ({bin.images})" for bin in row.reliability]
    return "\n".join(lines)
