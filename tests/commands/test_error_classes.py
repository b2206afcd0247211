"""Every command against every class of error: one line on stderr, status 2, never a traceback.

A case runs the command's ``main`` through ``command.run`` in a forked child, whose functions of ``os`` fail
as the class requires. Rows are commands, columns are classes; a new command is one more row.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.data_cases import image_folder
from support.faulty_files import Refusing
from support.helpers import SMALL

from diffratio_fast import (
    average,
    command,
    convert,
    evaluate,
    prepare,
    pretrain,
    refit,
    sample,
    train,
)
from diffratio_fast.report.__main__ import main as report_main
from diffratio_fast.storage import reading, writing

UNET = [
    "--backbone-options", '{"model_channels": 16, "channel_mult": [1], "num_blocks": 1}', "--device", "cpu",
    "--threads", "1", "--batch-size", "8", "--steps", "1",
]  # fmt: skip
KEPT = ["--snapshot-every", "1", "--posthoc-ema", "0.05,0.10"]
FEW = ["--count", "80", "--seeds", "0", "--features", "pixels", "--metrics", "kernel"]


@dataclass(frozen=True)
class Row:
    """``arguments`` of a command: {run} a finished run, {data} prepared data, {images} a folder, {out} new.

    ``reads`` and ``writes`` are parts of the paths of files that it must read and write.
    """

    main: Callable[[list[str]], int | None]
    arguments: tuple[str, ...]
    reads: str
    writes: str


ROWS = {
    "train": Row(
        train.main, (*SMALL, "--steps", "2", "--data", "{data}", "--run-dir", "{out}"), "shard-0",
        "config.yaml",
    ),
    "train, resuming": Row(
        train.main, (*SMALL, *KEPT, "--steps", "5", "--run-dir", "{run}"), "run/checkpoint",
        "generator.safetensors",
    ),
    "pretrain": Row(
        pretrain.main, (*UNET, "--data", "{data}", "--run-dir", "{out}"), "shard-0", "config.yaml"
    ),
    "sample": Row(sample.main, ("{run}", "--count", "4", "--out", "{out}.png"), "generator", "out.png"),
    "sample, a folder": Row(sample.main, ("{run}", "--count", "4", "--out", "{out}"), "generator", "class"),
    "evaluate": Row(
        evaluate.main, ("{run}", *FEW, "--save-reference", "{out}.npz"), "generator.safetensors", "out.npz"
    ),
    "evaluate, images": Row(
        evaluate.main, ("{images}", "--reference", "{data}", "--features", "pixels", "--metrics", "kernel",
                        "--labels", "ignore", "--save-reference", "{out}.npz"), "images/", "out.npz"
    ),
    "refit": Row(
        refit.main, ("{run}", "--steps", "1", "--batch-size", "8", "--candidates", "2", "--draws", "1"),
        "ratio.safetensors", "ratio_refit",
    ),
    "average": Row(
        average.main, ("{run}", "--ema-std", "0.07", "--out", "{out}.safetensors"), "ema-", "out.safetensors"
    ),
    "prepare": Row(
        prepare.main, ("{images}", "{out}", "--validation", "2", "--test", "2"), "images/", "out/"
    ),
    "prepare --verify": Row(prepare.main, ("--verify", "{data}"), "shard-0", ""),
    "prepare --info": Row(prepare.main, ("--info", "{data}", "--sheet", "{out}.png"), "shard-0", "out.png"),
    "convert": Row(convert.main, ("{data}/manifest.json", "{out}.safetensors"), "manifest.json", ""),
    "report": Row(report_main, ("{run}",), "", "report.html"),
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("material")
    image_folder(where / "images", 2, 50)
    options = ["--validation", "8", "--test", "8", "--channels", "1"]
    assert prepare.main([str(where / "images"), str(where / "data"), *options]) == 0
    assert train.main([*SMALL, *KEPT, "--steps", "3", "--run-dir", str(where / "run")]) == 0
    return where


def outcome(row: Row, where: Path, before: Callable[[], None]) -> tuple[int, str]:
    """Exit status and stderr of the command in a child, which calls ``before`` first."""
    places = {name: str(where / name) for name in ("run", "data", "images", "out")}
    arguments = list(row.arguments)
    for name, place in places.items():
        arguments = [argument.replace(f"{{{name}}}", place) for argument in arguments]
    errors = where / "stderr"
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            for descriptor, path in ((1, str(where / "stdout")), (2, str(errors))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
            before()
            try:
                command.run(lambda _: row.main(arguments))
            except SystemExit as ended:
                status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended), errors.read_text()


def one_line(outcome: tuple[int, str]) -> str:
    status, printed = outcome
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in printed, (status, printed[-3000:])
    assert len(lines[0]) < 2100 and len(lines[0].removeprefix("error: ")) > 10
    return lines[0]


@pytest.fixture
def where(material: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(material, tmp_path / "w"))


def refuse(
    monkeypatch: pytest.MonkeyPatch, number: int, *words: str, reading: bool = False
) -> Callable[[], None]:
    """Installs, in the child, functions of ``os`` that fail for files whose path has one of ``words``."""

    def before() -> None:
        faults = Refusing(*words, reading=reading).install(monkeypatch)
        faults.number = number

    return before


WRITING = [name for name, row in ROWS.items() if row.writes]
READING = [name for name, row in ROWS.items() if row.reads]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=lambda n: errno.errorcode[n])
@pytest.mark.parametrize("name", WRITING)
def test_a_result_that_cannot_be_written(
    name: str, number: int, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleanup fails too: ``unlink`` fails like the rest."""
    row = ROWS[name]
    printed = one_line(outcome(row, where, refuse(monkeypatch, number, row.writes)))
    assert os.strerror(number) in printed


@pytest.mark.parametrize("name", READING)
def test_an_input_that_the_disk_does_not_give(
    name: str, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[name]
    printed = one_line(outcome(row, where, refuse(monkeypatch, errno.EIO, row.reads, reading=True)))
    assert os.strerror(errno.EIO) in printed + (where / "stdout").read_text(), printed


@pytest.mark.parametrize("name", WRITING)
def test_memory_that_is_short_while_writing(name: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[name]

    created = writing._created

    def refused(target: str, directory: int) -> tuple[str, int]:
        if row.writes in f"{os.readlink(f'/proc/self/fd/{directory}')}/{target}":
            raise MemoryError
        return created(target, directory)

    found = outcome(row, where, lambda: monkeypatch.setattr(writing, "_created", refused))
    assert "out of memory" in one_line(found)


@pytest.mark.parametrize("name", READING)
def test_memory_that_is_short_while_reading(name: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[name]

    found = outcome(row, where, refuse(monkeypatch, errno.ENOMEM, row.reads, reading=True))
    assert "memory" in one_line(found).lower()


def test_a_machine_without_memory(where: Path) -> None:
    """Allocations beyond RLIMIT_AS, and sizes beyond any machine."""

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + (256 << 20),) * 2)

    wide = (*SMALL, "--steps", "1", "--run-dir", "{out}", "--generator-width")
    for width in ("20000", "999999999"):
        row = Row(train.main, (*wide, width), "", "")
        assert "out of memory" in one_line(outcome(row, where, limited)), width


@pytest.mark.parametrize("name", ["train, resuming", "sample"])
@pytest.mark.parametrize(
    "content", ["[]", "3", '{"format": "diffratio_fast.checkpoint.2", "files": []}', "null"]
)
def test_an_index_of_another_type(name: str, content: str, where: Path) -> None:
    (where / "run" / "summary.json").unlink()
    for index in (where / "run" / "checkpoint").glob("*/index.json"):
        index.write_text(content)
    assert "checkpoint" in one_line(outcome(ROWS[name], where, lambda: None))


def test_a_lock_whose_closing_fails_hides_nothing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def refused(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if path.endswith(".lock"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    row = ROWS["train, resuming"]
    other = Row(row.main, (*row.arguments, "--seed", "5"), "", "")
    printed = one_line(outcome(other, where, lambda: monkeypatch.setattr(os, "close", refused)))
    assert "seed 0 -> 5" in printed


def test_a_reason_is_never_empty_and_never_endless(where: Path) -> None:
    assert reading.one_line(MemoryError()) == "out of memory"
    assert reading.one_line(EOFError()) == "EOFError"

    def endless(_: list[str]) -> int:
        raise command.UserError("x\n" * 100_000)

    one_line(outcome(Row(endless, (), "", ""), where, lambda: None))
