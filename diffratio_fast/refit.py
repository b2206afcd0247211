"""python -m diffratio_fast.refit RUN: fit a finished run's ratio network to its averaged generator.

That makes it a verifier: fitted on training data, stopped on validation data, calibrated there, and given the
noise level that ``sample --candidates`` then uses.
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
"""Images behind a Fréchet distance of the choice of sigma, for each seed."""
SEEDS = 3


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.refit",
        description="Fit the ratio network of a finished run to its averaged generator, as a verifier for "
        "`sample --candidates`: on training data, stopped, calibrated and given its noise level on "
        "validation data. Writes ratio_refit.safetensors into the run directory.",
    )
    result.add_argument("run", type=Path, nargs="?", default=DEFAULT_RUN, metavar="RUN", help="run directory")
    result.add_argument("--steps", type=int, default=2000, metavar="N", help="steps of each fit, at most")
    result.add_argument("--batch-size", type=int, metavar="N", help="images per step (default: the run's)")
    result.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="at the start")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all randomness")
    result.add_argument(
        "--candidates", type=int, default=8, metavar="N", help="candidates at which a noise level is tried"
    )
    result.add_argument("--draws", type=int, default=16, metavar="M", help="noise draws of a candidate")
    result.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N")
    return result


def fit(run: FinishedRun, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> Refitted:
    """The better, on validation data, of two fits: from the run's ratio network, and from a new one.

    A network that has overfitted online is a bad start, and a new one a slow start; which is which depends
    on the data.
    """
    from diffratio_fast import networks
    from diffratio_fast.objectives.refit import UNLEARNING, RefitOptions, refit

    fresh = networks.build("ratio", run.about_ratio.architecture, run.about_ratio.arguments)
    networks.initialise(fresh, seed, stream=1)
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
    """``verifier.choose_sigma`` with distances to the validation split, on pixels."""
    from diffratio_fast import networks
    from diffratio_fast.metrics.pixels import PixelMetrics
    from diffratio_fast.verifier.noise_level import choose_sigma
    from diffratio_fast.verifier.selection import Verifier, select

    metrics = PixelMetrics(run.dataset)
    labels = metrics.labels("validation", SAMPLES)

    def distances(sigma: float | None) -> list[float]:
        found = []
        for seed in range(SEEDS):
            if sigma is None:
                images = networks.generate(run.generator, labels, seed)
            else:
                tool = Verifier(network, sigma, draws=draws)
                images = select(tool, run.generator, labels, seed, candidates).images
            found.append(metrics.distance(images, "validation"))
        return found

    return choose_sigma(rows, distances)


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name in ("steps", "candidates", "draws"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if not 0 < arguments.learning_rate < 1:
        raise UserError(f"--learning-rate must be between 0 and 1, not {arguments.learning_rate}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 - 1, not {arguments.seed}")

    from diffratio_fast import networks
    from diffratio_fast.devices import choose_device
    from diffratio_fast.metrics.pixels import PixelMetrics
    from diffratio_fast.verifier.finished_run import FinishedRun
    from diffratio_fast.verifier.noise_level import candidate_sigmas
    from diffratio_fast.verifier.tables import plain, table

    run = FinishedRun(arguments.run, choose_device(arguments.device))
    batch_size = arguments.batch_size or run.config.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    run.require_validation()
    print(f"{arguments.run}: fitting twice for up to {arguments.steps} steps of {batch_size}", flush=True)
    fitted = fit(
        run, steps=arguments.steps, batch_size=batch_size, learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )  # fmt: skip
    print(f"bound on the divergence to validation data: {fitted.bound:.4f} nats, at step {fitted.step}")
    sigmas = candidate_sigmas(run.law)
    rows = run.calibrations(sigmas, refitted=fitted.network)
    for name, of_network in rows.items():
        print(f"\n{name} ratio network\n{table(of_network)}")
    sigma: float | None = None
    checks: list[SigmaCheck] = []
    if PixelMetrics.suits(run.dataset):
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
    """What the rule of sigma found, in words."""
    if not checks:
        return (
            "no noise level is chosen: these images are too large for distances on pixels; give one to "
            "`sample --candidates` with --sigma"
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
        lines.append("no noise level passes: as a verifier this network would make things worse")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
