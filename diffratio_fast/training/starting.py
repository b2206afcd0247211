"""The start of a run: content of its directory, checks, choice of the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast.config.options import changed_fields, read_yaml
from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.runs.derived import Derived
from diffratio_fast.runs.directory import RunDirectory, new_run_id
from diffratio_fast.runs.environment import environment
from diffratio_fast.runs.history import add_start, changes, read_history
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage import checkpoints
from diffratio_fast.storage.reading import read_text
from diffratio_fast.storage.writing import remove_file, replace_file
from diffratio_fast.training.beginning import Beginning, Source
from diffratio_fast.training.processes.world import World
from diffratio_fast.training.state.identity import Identity, data_digest, fixed_options, run_of

if TYPE_CHECKING:
    from diffratio_fast.training.run import Run


class Start:
    """One start of a run by all its processes; rank 0 locks and inspects the directory."""

    def __init__(
        self, directory: RunDirectory, config: RunConfig, beginning: Beginning, world: World
    ) -> None:
        """Raises ``UserError`` if the content of the directory must not be changed."""
        self.directory, self.beginning, self.world = directory, beginning, world
        self.config = config
        """The configuration; a resumed run keeps its values for options newer than its checkpoint."""
        self.own, self.finished, older = world.on_main(self._look)
        """Whether the run has a checkpoint of its own, and whether it is finished."""
        self.config = replace(config, **older)
        self.source: Source | None = None if self.own else beginning.source
        self._origin: dict[str, Any] = {}

    @property
    def continues(self) -> bool:
        """Whether a checkpoint replaces the initial state."""
        return self.own or self.source is not None

    def _look(self) -> tuple[bool, bool, dict[str, Any]]:
        directory, beginning = self.directory, self.beginning
        if directory.root.is_dir():
            directory.take()
        own = checkpoints.exists(directory.checkpoint) and not beginning.fresh
        if not (own or beginning.fresh) and directory.has_results():
            raise UserError(
                f"{directory.root}: results of a run without a checkpoint; use --fresh to start again"
            )
        older = directory.older_values(self.config) if own else {}
        return own, own and directory.finished(), older

    def load(self, one: Run) -> None:
        """Load the state of the run from its checkpoint, if any; see ``Identity``."""
        directory, beginning = self.directory, self.beginning

        def identity() -> Identity:
            run = "" if beginning.fresh else directory.run_id() or ""
            return Identity(run, data_digest(one.dataset), fixed_options(self.config))

        found = self.world.on_main(identity)
        run: str | None = found.run
        if self.own:
            index = one.checkpoints.load(
                one.state,
                check=lambda path, index: found.check(index, path, accept_data=beginning.accept_data),
            )
            run = found.run or run_of(index)
        elif self.source is not None:
            index = one.checkpoints.load_from(
                RunPaths(self.source.run).checkpoint, self.source.step, one.state,
                lambda path, index: self._check_source(found, path, index),
            )  # fmt: skip
            self._origin = self._resumed_from(index)
        one.checkpoints.identity = replace(found, run=run or new_run_id())

    def _check_source(self, identity: Identity, path: Path, index: dict[str, Any]) -> None:
        before = index.get("identity")
        options = before.get("configuration") if isinstance(before, dict) else None
        if isinstance(options, dict) and options.get("data") == self.config.data:
            identity.check_data(index, path, accept_data=self.beginning.accept_data)

    def _resumed_from(self, index: dict[str, Any]) -> dict[str, Any]:
        assert self.source is not None
        kind = type(self.config)
        old = kind(**read_yaml(kind, self.source.require_config()))
        changed = {
            name: [getattr(old, name), getattr(self.config, name)]
            for name in changed_fields(old, self.config)
        }
        return {
            "resumed_from": {"run": run_of(index), "directory": str(self.source.run), "step": index["step"]},
            "changed": changed,
        }

    def open(self, one: Run) -> None:
        """Lock the directory for the run and write its configuration; rank 0 only."""
        directory, step, world = self.directory, one.state.step, self.world
        if not directory.taken:
            directory.open()
            if checkpoints.exists(directory.checkpoint) or directory.has_results():
                raise UserError(
                    f"{directory.root}: another process has changed the run in the meantime; run the "
                    "command again"
                )
        if self.beginning.fresh:
            directory.clear()
        remove_file(directory.summary)
        derived = Derived(print)
        now = environment(one.device) | {"processes": world.size}
        self._print_changed_versions(now)
        if self.own:  # the existing configuration agrees in all options that affect the training
            derived.attempt(
                "config.yaml",
                lambda: directory.write_config(one.preset, one.config, one.device, world.size),
            )
        else:
            directory.write_config(one.preset, one.config, one.device, world.size)
        identity = one.checkpoints.identity
        assert identity is not None
        add_start(
            directory.history, derived, run=identity.run, step=step, environment=now,
            data=identity.data, **self._origin,
        )  # fmt: skip
        if self.source is not None:
            derived.attempt("metrics.jsonl", self._copy_log)
        several = f" on {world.size} processes" if world.size > 1 else ""
        print(f"{directory.root}: {self._description(step)}{several}", flush=True)

    def _description(self, step: int) -> str:
        if self.source is None:
            return f"resuming at step {step}" if step else "starting"
        changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self._origin["changed"].items())
        return f"resuming {self.source.run} at step {step}" + (f" with {changed}" if changed else "")

    def _print_changed_versions(self, now: dict[str, Any]) -> None:
        root = self.directory if self.own else RunPaths(self.source.run) if self.source else None
        before = read_history(root.history) if root is not None else []
        if before and (changed := changes(before[-1]["environment"], now)):
            print(
                f"{self.directory.root}: the environment has changed ({changed}); from here on rounding may "
                "differ",
                flush=True,
            )

    def _copy_log(self) -> None:
        """Copy the metrics of the other run; ``MetricsLog`` drops the lines after the checkpoint."""
        assert self.source is not None
        path = RunPaths(self.source.run).metrics
        if path.is_file() and not self.directory.metrics.exists():
            replace_file(self.directory.metrics, read_text(path))
