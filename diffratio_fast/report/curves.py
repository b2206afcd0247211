"""Curves over the training steps."""

from __future__ import annotations

from diffratio_fast.report.charts import Axis, Series, line_chart, number
from diffratio_fast.report.html import STEP, charts, level_style, over_time, section
from diffratio_fast.report.run_files import RunFiles


def quality(run: RunFiles) -> str:
    """Distance to validation data, and the error of a denoiser."""
    return section(
        "Quality",
        charts(
            line_chart(
                "Fréchet distance to validation data",
                [over_time(run.measured, "frechet_distance_validation", "EMA generator", "s0")],
                STEP,
                Axis("distance", log=True),
            ),
            line_chart(
                "Class accuracy",
                [over_time(run.measured, "class_accuracy_validation", "EMA generator", "s2")],
                STEP,
                Axis("accuracy", high=1.0),
            ),
        ),
    )


def divergence(run: RunFiles) -> str:
    """Bounds on the divergence, in all and by noise level."""
    nats = Axis("nats")
    smooth = [
        over_time(run.logged, "divergence_train", "training data", "s1"),
        over_time(run.logged, "divergence", "validation data", "s0"),
        over_time(run.measured, "divergence_refit", "validation, after a refit", "s2"),
    ]
    levels = run.measured[-1]["sigma"] if run.measured else []

    def by_level(name: str) -> list[Series]:
        return [
            Series(
                f"σ = {number(sigma)}",
                [(line["step"], line[name][i]) for line in run.measured if len(line.get(name, ())) > i],
                level_style(i, len(levels)),
            )
            for i, sigma in enumerate(levels)
        ]

    return section(
        "Divergence",
        charts(
            line_chart("Bound on the Jensen-Shannon divergence", smooth, STEP, nats),
            line_chart("By noise level, validation data", by_level("divergence_by_sigma"), STEP, nats),
            line_chart("By noise level, after a refit", by_level("divergence_refit_by_sigma"), STEP, nats),
        ),
        "A lower bound that depends on the ratio network: at most 0 for equal distributions, at most 0.69 "
        "for "
        "disjoint ones; below 0 the network is worse than a constant. A training bound above the validation "
        "bound means overfitting. After a refit against the averaged generator the bound is tighter and "
        "measures the convergence of the generator.",
    )


def training(run: RunFiles) -> str:
    """Losses, gradient norm and learning rates."""
    logged = run.logged
    return section(
        "Training",
        charts(
            line_chart(
                "Loss of the denoiser",
                [over_time(logged, "loss", "training batches", "s1")],
                STEP,
                Axis("loss"),
            ),
            line_chart(
                "Weighted error of the denoiser",
                [
                    over_time(logged, "error", "training batches", "s1"),
                    over_time(run.evaluated, "validation_error", "average, validation data", "s0"),
                ],
                STEP,
                Axis("error", log=True),
            ),
            line_chart(
                "Loss of the student",
                [over_time(logged, "student_loss", "generated images", "s1")],
                STEP,
                Axis("loss"),
            ),
            line_chart(
                "Loss of the ratio network",
                [over_time(logged, "ratio_loss", "training batches", "s1")],
                STEP,
                Axis("loss, nats"),
                "2 log 2 = 1.386 is the loss of a constant log ratio of 0.",
            ),
            line_chart(
                "Accuracy of the ratio network",
                [over_time(logged, "ratio_accuracy", "training batches", "s1")],
                STEP,
                Axis("accuracy"),
            ),
            line_chart(
                "Mean log ratio",
                [
                    over_time(logged, "log_ratio_real", "real", "s0"),
                    over_time(logged, "log_ratio_fake", "generated", "s1"),
                ],
                STEP,
                Axis("ℓ"),
            ),
            line_chart(
                "Norm of the gradient",
                [over_time(logged, "gradient_norm", "norm", "s3")],
                STEP,
                Axis("norm", log=True),
            ),
            line_chart(
                "Learning rates",
                [
                    over_time(logged, "generator_lr", "generator", "s0"),
                    over_time(logged, "ratio_lr", "ratio network", "s1"),
                    over_time(logged, "lr", "denoiser", "s2"),
                ],
                STEP,
                Axis("rate"),
            ),
        ),
    )
