"""The commands for a new user: overview, help, hints, completion, defaults."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT
from support.helpers import one_error_line

import diffratio_fast.__main__ as overview
from diffratio_fast import command, completion, sample, train
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.known import COMMANDS, how_to_make
from diffratio_fast.errors import UserError


def module(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_package_lists_its_commands() -> None:
    result = module("diffratio_fast")
    assert result.returncode == 0 and not result.stderr
    for name, text in command.COMMANDS.items():
        assert re.search(rf"python -m diffratio_fast\.{name} +{re.escape(text)}\n", result.stdout)
    assert (
        module("diffratio_fast", "--version").stdout
        == f"diffratio_fast {overview.diffratio_fast.__version__}\n"
    )


def test_every_command_of_the_package_is_listed() -> None:
    """A module with ``command.run`` at its end is a command."""
    package = Path(command.__file__).parent
    found = {
        path.parent.name if path.name == "__main__.py" else path.stem
        for path in [*package.glob("*.py"), *package.glob("*/__main__.py")]
        if "command.run(main)" in path.read_text() or "    run(main)\n" in path.read_text()
    }
    assert found - {package.name} == set(command.COMMANDS)


@pytest.mark.parametrize("name", sorted(command.COMMANDS))
def test_every_command_has_help_without_doubled_defaults(name: str) -> None:
    parser = completion.parsers()[name]
    assert parser.format_help().startswith("usage: python -m diffratio_fast")
    for action in parser._actions:
        text = command._Formatter("x")._get_help_string(action) or ""
        assert text and not re.search(r"\] \[|\(default: .*\) \[|\(default: .*\(default: ", text), text
    assert callable(overview.load(name))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean train?"),
        (["nothing-like-it"], "known: train, sample"),
        (["train", "--stesp", "3"], "did you mean --steps?"),
        (["train", "--step=3"], "did you mean --steps?"),
        (["train", "cifar"], "no such preset: cifar; did you mean cifar10"),
        (["sample", "--seeds", "3"], "did you mean --seed?"),
    ],
)
def test_did_you_mean(arguments: list[str], hint: str) -> None:
    with pytest.raises(UserError) as error:
        overview.main(arguments)
    assert hint in str(error.value)


def test_help_is_short_and_help_all_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            train.main([option])
        assert ended.value.code == 0
        texts[option] = capsys.readouterr().out
    options = {key: set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.M)) for key, text in texts.items()}
    assert 20 <= len(options["--help"]) <= 32 and options["--help"] < options["--help-all"]
    assert len(options["--help-all"]) > 60
    assert {"--steps", "--data", "--width", "--batch-size", "--help-all"} <= options["--help"]
    for preset in PRESETS:  # the table, a line each
        assert re.search(rf"^  {preset} +\S", texts["--help"], re.M)


# ---------------------------------------------------------------------------------------- completion


def complete(line: str) -> set[str]:
    """Bash completions at the end of a line."""
    words = line.split(" ")
    script = completion.bash() + (
        f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _diffratio; echo "${{COMPREPLY[@]}}"'
    )
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("diffratio tr", {"train"}),
        ("diffratio train ci", {"cifar10", "cifar10-cond", "cifar10-small"}),
        ("diffratio train --ratio-net", {"--ratio-network"}),
        ("diffratio train --ratio-network m", {"mlp", "mixer"}),
        ("diffratio sample --cand", {"--candidates"}),
        ("diffratio completion z", {"zsh"}),
    ],
)
def test_bash_completes(line: str, words: set[str]) -> None:
    assert complete(line) == words


def test_completion_for_every_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        assert completion.main([shell]) == 0
        text = capsys.readouterr().out
        assert "train" in text and "prepare" in text
    for line in completion.fish().splitlines():
        assert shlex.split(line)[:4] == ["complete", "-c", "diffratio", "-n"]


# --------------------------------------------------------------------------- sizes of a U-Net, data


def test_width_depth_and_multiples_stand_for_json() -> None:
    chosen = TrainConfig(generator="backbone", width=24, depth=2, channel_mult="1,2", attention="8")
    assert chosen.backbone_arguments == {
        "model_channels": 24, "num_blocks": 2, "channel_mult": [1, 2], "attn_resolutions": [8]
    }  # fmt: skip
    both = TrainConfig(
        generator="backbone", backbone_options='{"model_channels": 16, "num_blocks": 1}', width=24
    )
    assert both.backbone_arguments == {"model_channels": 24, "num_blocks": 1}
    with pytest.raises(UserError, match="--channel-mult 1,x: not a list of integers"):
        _ = TrainConfig(generator="backbone", channel_mult="1,x").backbone_arguments
    with pytest.raises(UserError, match="--width is the size of a U-Net"):
        TrainConfig(width=3)


@pytest.mark.slow
def test_missing_data_names_the_commands_that_make_it(tmp_path: Path) -> None:
    message = one_error_line(module("diffratio_fast.train", "cifar10-small", cwd=ROOT / "docs"))
    assert "curl -LO https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz; python -m" in message
    assert message.endswith("prepare cifar-10-binary.tar.gz data/cifar10")
    assert "SOURCE DIR" in how_to_make("somewhere/else")
    named = {Path(values["data"]).name for values in PRESETS.values()} - {"digits"}
    assert named == set(COMMANDS)


@pytest.mark.parametrize(
    ("count", "classes", "columns"),
    [(120, 10, 10), (120, 2, 12), (120, 1, 11), (120, 3, 12), (9, 1, 3), (5, 10, 3)],
)
def test_rows_of_a_grid_are_whole_turns_through_the_classes(count: int, classes: int, columns: int) -> None:
    assert sample._columns(count, classes) == columns


# ------------------------------------------------------------------------------------- installation


@pytest.mark.slow
def test_modules_run_from_any_directory(tmp_path: Path) -> None:
    """An editable install, and a directory of the clone's name in the current one: a namespace package."""
    (tmp_path / "diffratio_fast" / "tests").mkdir(parents=True)
    copy, site = tmp_path / "clone", tmp_path / "site"
    copy.mkdir()
    for folder in ("diffratio_fast", "build_backend"):
        left_out = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")} | {"PATH": "/nowhere"}
    code = "import setuptools.build_meta as backend; backend.build_editable('wheel')"
    (copy / "wheel").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (copy / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "diffratio = diffratio_fast.__main__:entry" in archive.read(scripts).decode()
    start = (
        f"import site, sys; sys.path.insert(0, ''); site.addsitedir({str(site)!r}); sys.argv = ['x'{{}}]; "
    )
    start += "import runpy; runpy.run_module('diffratio_fast.train', run_name='__main__', alter_sys=True)"
    result = subprocess.run(
        [sys.executable, "-c", start.format(", '--stesp'")],
        cwd=tmp_path,
        env=bare,
        capture_output=True,
        text=True,
    )
    assert "did you mean --steps?" in one_error_line(result)


def test_the_source_distribution_has_docs_and_examples() -> None:
    rules = (ROOT / "MANIFEST.in").read_text()
    for folder in ("docs", "examples", "tests", "benchmarks", "csrc"):
        assert f"graft {folder}\n" in rules and (ROOT / folder).is_dir()
