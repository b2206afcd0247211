"""The configuration: sources of values, and errors for bad values."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from diffratio_fast.config.options import GROUPS, changed_fields, from_mapping, groups_of, read_yaml
from diffratio_fast.config.presets import DESCRIPTIONS, PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.errors import UserError
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.train import parser, resolve


def config_of(*argv: str) -> tuple[str, TrainConfig]:
    arguments = vars(parser().parse_args(list(argv)))
    for name in ("dry_run", "fresh", "resume_from", "accept_data"):
        del arguments[name]
    return resolve(arguments)


def test_presets_are_described_and_valid() -> None:
    assert set(PRESETS) == set(DESCRIPTIONS)
    for preset in PRESETS:
        assert config_of(preset)[0] == preset


def test_every_field_is_an_option_with_help() -> None:
    text = parser().format_help()
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"] and groups_of(TrainConfig)[field.name] in GROUPS


def test_options_override_the_file_which_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 7\nseed: 3\ngenerator_lr: 1e-4\nema_rampup_ratio: null\n")
    preset, config = config_of("digits", "--config", str(file), "--seed", "5", "--normalize-h")
    assert preset == "digits"
    assert (config.batch_size, config.seed, config.generator_lr) == (7, 5, 1e-4)
    assert config.ema_rampup_ratio is None and config.normalize_h is True
    assert config_of("--ema-rampup-ratio", "none")[1].ema_rampup_ratio is None


def test_a_run_config_can_be_loaded_again(tmp_path: Path) -> None:
    config = config_of("--batch-size", "9")[1]
    content = {"preset": "digits", **dataclasses.asdict(config), "environment": {"torch": "2"}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert TrainConfig(**read_yaml(TrainConfig, file)) == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("batch_sise: 3", "unknown key 'batch_sise'"),
        ("batch_size: many", "batch_size must be of type int"),
        ("batch_size: 3.5", "batch_size must be of type int"),
        ("compile: 1", "compile must be of type bool"),
        ("seed: true", "seed must be of type int"),
        ("generator_lr: [1]", "generator_lr must be of type float"),
        ("- 3", "not a mapping"),
        ("a: [", "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_yaml(TrainConfig, file)
    assert expected in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="No such file"):
        read_yaml(TrainConfig, Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["digitz"], "no such preset: digitz"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--batch-size", "x"], "invalid int value"),
        (["--generator-lr", "nan"], "--generator-lr must be finite"),
        (["--beta2", "1.5"], "--beta2 must be at most"),
        (["--divergence", "kl"], "invalid choice: 'kl'"),
        (["--ema-rampup-ratio", "0"], "--ema-rampup-ratio must be above 0"),
        (["--step", "3"], "unrecognized arguments"),
        (["--steps"], "expected one argument"),
        (["digits", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_options_get_one_line(argv: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(*argv)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_recorded_run_keeps_what_it_is_older_than(tmp_path: Path) -> None:
    """A config.yaml older than an option has the option's ``before`` value."""
    record = dataclasses.asdict(TrainConfig()) | {"preset": "digits", "environment": {}}
    for name in ("ratio_shared_noise", "ratio_head"):
        del record[name]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(record))
    old = TrainConfig(**read_yaml(TrainConfig, file))
    assert old.ratio_shared_noise is False and old.ratio_head == "scalar"
    assert TrainConfig().ratio_shared_noise is True
    directory = RunDirectory(tmp_path)
    assert directory.older_values(TrainConfig()) == {"ratio_shared_noise": False, "ratio_head": "scalar"}
    with pytest.raises(UserError, match="--seed 0 -> 1"):
        directory.older_values(TrainConfig(seed=1))
    file.write_text("seed: 3\n")  # a file of options is not the record of a run
    assert read_yaml(TrainConfig, file) == {"seed": 3}


def test_changes_that_matter_are_named() -> None:
    old = TrainConfig()
    free = dataclasses.replace(old, steps=9, log_every=3, run_dir="x", device="cpu")
    assert list(changed_fields(old, free)) == []
    changed = dataclasses.replace(old, seed=1, divergence="jeffreys")
    assert set(changed_fields(old, changed)) == {"seed"} | (
        {"divergence"} if old.divergence != "jeffreys" else set()
    )


def test_from_mapping_names_its_source() -> None:
    with pytest.raises(UserError, match="here: unknown key 'q'"):
        from_mapping(TrainConfig, {"q": 1}, "here")
