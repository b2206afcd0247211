"""python -m diffratio_fast.refit RUN: fit a finished run's ratio network to its averaged generator.

The result is a verifier for ``sample --candidates``: fitted on training data, with early stopping,
calibration and noise level on validation data.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffratio_fast import command, report
from diffratio_fast.errors import UserError
from diffratio_fast.runs.measurements import keep_measurements
from diffratio_fast.runs.paths import DEFAULT_RUN

if TYPE_CHECKING:
    from torch import nn

    from diffratio_fast.objectives.refit import Refitted
    from diffratio_fast.verifier.calibration import Calibration
    from diffratio_fast.verifier.finished_run import FinishedRun
    from diffratio_fast.verifier.noise_level import SigmaCheck

SAMPLES = 2_000
"""Images per seed for the Fréchet distance in the choice of sigma."""
SEEDS = 3


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.refit",
        description="Fit the ratio network of a finished run to its averaged generator, as a verifier for "
        "`sample --candidates`: fitted on training data; early stopping, calibration and noise level on "
        "validation data. Writes ratio_refit.safetensors into the run directory.",
    )
    result.add_argument("run", type=Path, nargs="?", default=DEFAULT_RUN, metavar="RUN", help="run directory")
    result.add_argument("--steps", type=int, default=2000, metavar="N", help="maximum steps of each fit")
    result.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: the run's)")
    result.add_argument(
        "--learning-rate", type=float, default=1e-3, metavar="X", help="initial learning rate"
    )
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers")
    result.add_argument(
        "--candidates",
        type=int,
        default=8,
        metavar="N",
        help="number of candidates when testing a noise level",
    )
    result.add_argument("--draws", type=int, default=16, metavar="M", help="noise draws per candidate")
    result.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N")
    return result


def fit(run: FinishedRun, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> Refitted:
    """Fit from the run's ratio network and from a new one; return the better on validation data.

    An online network that overfitted is a bad start, and a new network is a slow start; which one is better
    depends on the data.
    """
    from diffratio_fast import networks
    from diffratio_fast.objectives.refit import UNLEARNING, RefitOptions, refit

    fresh = networks.build("ratio", run.about_ratio.architecture, run.about_ratio.arguments)
    networks.initialize(fresh, seed, stream=1)
    fresh = fresh.to(run.device).eval()
    options = RefitOptions(steps=steps, learning_rate=learning_rate, check_every=max(1, steps // 20))
    found = []
    for start, decay in ((run.ratio, UNLEARNING), (fresh, run.config.ratio_weight_decay)):
        batches = run.batches(batch_size, seed)
        try:
            found.append(
                refit(
                    start, run.generator, batches, run.split("validation"), run.law,
                    options=replace(options, weight_decay=decay), seed=seed,
                )
            )  # fmt: skip
        finally:
            batches.close()
    return max(found, key=lambda result: result.bound)


def sigma_by_rule(
    run: FinishedRun, network: nn.Module, rows: list[Calibration], candidates: int, draws: int
) -> tuple[float | None, list[SigmaCheck]]:
    """``verifier.choose_sigma`` with distances to the validation split, in the run's feature space.

    (None, []) where the run has none (``--eval-features none``).
    """
    from diffratio_fast import networks
    from diffratio_fast.metrics.quality import run_quality
    from diffratio_fast.verifier.noise_level import choose_sigma
    from diffratio_fast.verifier.selection import Verifier, select

    quality = run_quality(run.config, run.dataset, run.device, SAMPLES, quiet=False)
    if quality is None:
        return None, []
    labels = quality.labels("validation", SAMPLES)

    def distances(sigma: float | None) -> list[float]:
        found = []
        for seed in range(SEEDS):
            if sigma is None:
                images = networks.generate(run.generator, labels, seed)
            else:
                tool = Verifier(network, sigma, draws=draws)
                images = select(tool, run.generator, labels, seed, candidates).images
            found.append(quality.distance(images, "validation"))
        return found

    return choose_sigma(rows, distances)


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name in ("steps", "candidates", "draws"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: out of range; expected at least 1")
    if not 0 < arguments.learning_rate < 1:
        raise UserError(f"--learning-rate {arguments.learning_rate}: out of range; expected between 0 and 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed}: out of range; expected 0 to 2^63 - 1")

    from diffratio_fast import networks
    from diffratio_fast.devices import choose_device
    from diffratio_fast.verifier.finished_run import FinishedRun
    from diffratio_fast.verifier.noise_level import candidate_sigmas
    from diffratio_fast.verifier.tables import plain, table

    run = FinishedRun(arguments.run, choose_device(arguments.device))
    batch_size = arguments.batch_size or run.config.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: out of range; expected at least 1")
    run.require_validation()
    print(
        f"{arguments.run}: two fits of at most {arguments.steps} steps, batch size {batch_size}", flush=True
    )
    fitted = fit(
        run, steps=arguments.steps, batch_size=batch_size, learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )  # fmt: skip
    print(f"divergence bound on validation data: {fitted.bound:.4f} nats, at step {fitted.step}")
    sigmas = candidate_sigmas(run.law)
    rows = run.calibrations(sigmas, refitted=fitted.network)
    for name, of_network in rows.items():
        print(f"\n{name} ratio network\n{table(of_network)}")
    sigma, checks = sigma_by_rule(
        run, fitted.network, rows["refitted"], arguments.candidates, arguments.draws
    )
    print("\n" + verdict(sigma, checks))
    about = replace(
        run.about_ratio,
        training={
            **run.about_ratio.training,
            "refit": {"steps": fitted.step, "bound": fitted.bound, "seed": arguments.seed},
            "verifier": {"sigma": sigma, "checks": [check.as_dict() for check in checks]},
        },
    )
    networks.save(run.directory.refitted, fitted.network, about)
    keep_measurements(arguments.run, calibration=plain(rows))
    print(f"{run.directory.refitted}, {report.write(arguments.run)}: written")
    return 0


def verdict(sigma: float | None, checks: list[SigmaCheck]) -> str:
    """Format the results of ``choose_sigma``."""
    if not checks:
        return (
            "no noise level is chosen: the run has --eval-features none; give one to `sample --candidates` "
            "with --sigma"
        )
    lines = []
    for check in checks:
        reason = "chosen"
        if not check.calibrated:
            reason = f"|log E_gen e^l| = {abs(check.log_mean):.2f} is not below 0.1"
        elif not check.effective:
            reason = f"effective sample size {check.calibration.effective_sample_size:.2f} N is below 0.1 N"
        elif not check.no_worse:
            ours, plain = (sum(v) / len(v) for v in (check.distances, check.plain))
            reason = f"Fréchet distance {ours:.3f} is worse than {plain:.3f} of one candidate"
        lines.append(f"  sigma {check.calibration.sigma:.3f}: {reason}")
    if sigma is None:
        lines.append("no noise level is valid: this network would not improve samples as a verifier")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
