"""Paths in a run directory: the only module with its file names."""

from __future__ import annotations

from pathlib import Path

DEFAULT_RUN = Path("runs/digits")
"""The run of ``python -m diffratio_fast.train`` without arguments."""


def default_root(preset: str, *, denoiser: bool = False) -> Path:
    """Default run directory of ``preset``, without ``--run-dir``."""
    return Path("runs") / (f"{preset}-denoiser" if denoiser else preset)


class RunPaths:
    """Paths of the files in the run directory ``root``; the files may not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        """The resolved options, as YAML."""
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        """Lock file, locked by the training process."""
        return self.root / ".lock"

    @property
    def metrics(self) -> Path:
        """Log: one JSON object per log line and evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def history(self) -> Path:
        """A JSON object per start of the run: time, step, versions, changed options."""
        return self.root / "history.jsonl"

    @property
    def measurements(self) -> Path:
        """Report data that is not in the log, as JSON."""
        return self.root / "measurements.json"

    @property
    def summary(self) -> Path:
        """Final metrics, as JSON; its existence marks the run as finished."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.root / "report.html"

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoints."""
        return self.root / "checkpoint"

    @property
    def samples(self) -> Path:
        """Directory of the sample grids."""
        return self.root / "samples"

    @property
    def neighbors(self) -> Path:
        """Samples and their nearest training images."""
        return self.root / "neighbours.png"  # words: ok (a file name)

    @property
    def generator(self) -> Path:
        """The averaged generator."""
        return self.root / "generator.safetensors"

    @property
    def ratio(self) -> Path:
        """The ratio network."""
        return self.root / "ratio.safetensors"

    @property
    def ratio_average(self) -> Path:
        """The average of the ratio network."""
        return self.root / "ratio_ema.safetensors"

    @property
    def refitted(self) -> Path:
        """The ratio network that ``refit`` fitted to the final generator."""
        return self.root / "ratio_refit.safetensors"

    @property
    def denoiser(self) -> Path:
        """The averaged denoiser of a pre-training run."""
        return self.root / "denoiser.safetensors"

    @property
    def snapshots(self) -> Path:
        """Directory of networks saved during training."""
        return self.root / "snapshots"

    @property
    def best(self) -> Path:
        """The generator of the best evaluation on the validation split."""
        return self.snapshots / "best.safetensors"

    def sample_grid(self, step: int) -> Path:
        """The sample grid of ``step``."""
        return self.samples / f"step-{step:08d}.png"

    def sample_grids(self) -> list[tuple[int, Path]]:
        """(step, path) of the sample grids that exist, earliest first."""
        return [
            (int(path.stem.removeprefix("step-")), path) for path in sorted(self.samples.glob("step-*.png"))
        ]

    def snapshot(self, role: str, step: int) -> Path:
        """The snapshot of the average at ``step``; ``role`` is generator or denoiser."""
        return self.snapshots / f"{role}-{step:08d}.safetensors"

    def kept_average(self, width: float, step: int) -> Path:
        """A snapshot of the average of that relative width (input of ``average``)."""
        return self.snapshots / f"ema-{width:g}-{step:08d}.safetensors"

    def kept_averages(self) -> list[Path]:
        """The files of ``kept_average`` that exist."""
        return sorted(self.snapshots.glob("ema-*.safetensors"))

    def loggers(self) -> list[Path]:
        """Files of ``runs/loggers.py`` that exist: TensorBoard's, metrics.csv, the id of wandb's run."""
        names = ("events.out.tfevents.*", "metrics.csv", "wandb-id.txt")
        return sorted(path for name in names for path in self.root.glob(name))

    def is_run(self) -> bool:
        """Whether ``root`` is the directory of a run, finished or not."""
        return any(path.exists() for path in (self.generator, self.config, self.snapshots))

    def finished(self) -> bool:
        """Whether the run has reached its last step."""
        return self.summary.exists()

    def has_results(self) -> bool:
        """Whether the run has written a network or its summary."""
        return self.generator.exists() or self.denoiser.exists() or self.finished()
