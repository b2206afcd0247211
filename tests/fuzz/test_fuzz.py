"""The kept corpus, and a few hundred mutations of it, find nothing; a planted fault is found."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import run as fuzz  # noqa: E402
import targets  # noqa: E402


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_and_mutations_of_it(name: str, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")
    chance, corpus = random.Random(name), fuzz.corpus_of(name)
    outcomes = set()
    for number in range(len(corpus) + 100):
        data = corpus[number] if number < len(corpus) else fuzz.mutated(
            chance.choice(corpus), chance.choice(corpus), targets.TARGETS[name].words, chance
        )  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.add(fuzz.outcome(name, data, folder))
    if name != "log":  # a log skips damaged lines and never fails
        assert len(outcomes) > 1  # mutations reach more than one outcome


@pytest.mark.slow
def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    """A reader that fails at a byte 0xff, and one that never ends."""
    plant = (
        "import sys; sys.path.insert(0, {here!r}); sys.argv = ['run', 'json', '--seconds', '20']\n"
        "import run, targets, pathlib\n"
        "run.FOUND = pathlib.Path({found!r})\n"
        "def fault(data, folder):\n"
        "    if 0xff in data: raise IndexError('planted')\n"
        "targets.TARGETS['json'] = targets.Target(fault, lambda: [b'abc'], (ValueError,))\n"
        "sys.exit(run.main())\n"
    ).format(here=str(HERE), found=str(tmp_path / "found"))
    result = subprocess.run([sys.executable, "-c", plant], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "planted" in result.stderr, result.stderr
    (path,) = (tmp_path / "found").iterdir()
    assert b"\xff" in path.read_bytes() and str(path) in result.stdout
