"""CUDA kernels executed on the CPU by the shim of tests/simt, and proof that the shim detects errors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.simt_programs import PLAIN, ROOT, Programs, probe, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(probe.find_compiler() is None, reason="there is no C++ compiler"),
]

KERNELS = ["tests/simt/kernels.cpp"]
PLANTED = ["tests/simt/planted.cpp"]
MIXER = [
    "tests/simt/mixer.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("mixer", "mixer_level", "noise", "noise_level")),
]
PORTABLE = ("-DDR_LEVEL=portable",)
NOISE = ["tests/simt/noise.cpp", "csrc/cpu/noise.cpp", "csrc/cpu/noise_level.cpp"]


def failures(result: subprocess.CompletedProcess[str]) -> int:
    match = re.search(r"(\d+) runs, (\d+) failures", result.stdout)
    assert match and int(match[1]) > 0, result.stdout + result.stderr
    return int(match[2])


@pytest.mark.parametrize("flags", ["plain", "sanitized"])
@pytest.mark.parametrize("sources", [KERNELS, PLANTED], ids=["kernels", "planted"])
def test_correct_kernels_pass_and_planted_bugs_are_caught(simt_programs: Programs, sources, flags):
    chosen = PLAIN if flags == "plain" else simt_programs.sanitized()
    program = simt_programs.build(Path(sources[0]).stem, sources, chosen)
    result = run(program, "check")
    assert failures(result) == 0 and result.returncode == 0, result.stdout + result.stderr
    if sources is PLANTED:
        assert len(re.findall(r"^planted ", result.stdout, re.MULTILINE)) >= 36, result.stdout


def assert_every_line_is_tried(files: Iterable[Path], output: str, least: int, helpers: str = "(?!)") -> None:
    """Every line of the files that synchronizes was skipped in turn, and each of the six modes detected it.

    ``helpers`` matches calls of functions that synchronize for their caller.
    """
    mutants = re.findall(r"^mutant (.*): caught in (\d) of 6 modes", output, re.MULTILINE)
    assert len(mutants) >= least and all(modes == "6" for _, modes in mutants), output
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            call = re.search(r"ptx::(\w+_sync|barrier_arrive|copy_commit|copy_wait)\b(?!.*\(site\))", line)
            if call or re.search(helpers, line):
                assert any(f"{file.name}:{number}" in place for place, _ in mutants), f"{file.name}:{number}"


def test_every_synchronization_is_needed(simt_programs: Programs):
    program = simt_programs.build("kernels", KERNELS, PLAIN)
    result = run(program, "mutate")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_every_line_is_tried((ROOT / "tests/simt/kernels").glob("*.cuh"), result.stdout, least=28)


def test_a_synchronization_that_nothing_needs_is_reported(simt_programs: Programs, tmp_path):
    source = tmp_path / "idle.cpp"
    source.write_text(
        '#include "harness.h"\n#include <simt.h>\n'
        "int main(int argc, char** argv) {\n"
        "  const auto body = [] { diffratio::ptx::block_sync(); };\n"
        '  return simt::main_of(argc, argv, {{"idle", [&](simt::Mode mode) {\n'
        '    simt::launch({"idle", {}, 64}, mode, body); return std::string(); }}});\n'
        "}\n"
    )
    result = run(simt_programs.build("idle", [str(source)], PLAIN), "mutate")
    assert result.returncode == 1 and "NOT CAUGHT mutant without block_sync at idle.cpp:4" in result.stdout


def test_a_report_names_both_sides(simt_programs: Programs):
    program = simt_programs.build("planted", PLANTED, PLAIN)
    report = run(program, "show", "no barrier before a buffer's reuse", "backward/wait").stdout
    for part in (
        "race: kernel no barrier before a buffer's reuse, block (0, 0, 0), schedule backward/wait",
        "of 'x'",
        r"thread \d+ \(warp \d, lane \d+\) \w+ at planted.cpp:\d+",
        "no barrier orders the two",
    ):
        assert re.search(part if "\\" in part else re.escape(part), report), report
    report = run(program, "show", "a thread exits before a barrier", "forward/issue").stdout
    assert "95 wait in block_sync at planted.cpp:" in report and "1 have exited" in report, report


def test_address_sanitizer_sees_what_a_kernel_does_to_global_memory(simt_programs: Programs, tmp_path):
    flags = simt_programs.sanitized()
    if flags == PLAIN:
        pytest.skip("the compiler has no AddressSanitizer")
    source = tmp_path / "beyond.cpp"
    source.write_text(
        "#include <simt.h>\n#include <vector>\n"
        "int main(int argc, char**) {\n"
        "  std::vector<float> x(64);\n"
        '  simt::launch({"beyond", {}, 64}, {}, [&] {\n'
        "    diffratio::ptx::block_sync();\n"
        "    diffratio::ptx::store(x.data() + threadIdx.x + (argc > 1), 1.0f);\n"
        "  });\n"
        "}\n"
    )
    program = simt_programs.build("beyond", [str(source)], flags)
    assert run(program).returncode == 0
    result = run(program, "beyond")
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, result.stderr


def test_bank_conflicts_are_counted(simt_programs: Programs):
    program = simt_programs.build("kernels", KERNELS, PLAIN)
    result = run(program, "show", "gemm", "forward/issue")
    assert result.returncode == 0 and "passed" in result.stdout
    counts = re.findall(r"banks: gemm.cuh:\d+: (\d+) passes, (\d+) without", result.stdout)
    assert counts and all(int(taken) >= int(least) > 0 for taken, least in counts), result.stdout
    assert any(taken == least for taken, least in counts)  # ldmatrix on padded rows
    assert any(int(taken) > int(least) for taken, least in counts)  # the staged output


def test_ratio_kernels_match_the_cpu_implementation(simt_programs: Programs):
    result = run(simt_programs.build("mixer", MIXER, PLAIN, PORTABLE), "check")
    assert failures(result) == 0 and result.returncode == 0, result.stdout + result.stderr


def test_ratio_kernels_stay_within_global_memory(simt_programs: Programs):
    flags = simt_programs.sanitized()
    if flags == PLAIN:
        pytest.skip("the compiler has no AddressSanitizer")
    result = run(simt_programs.build("mixer", MIXER, flags, PORTABLE), "once")
    assert result.returncode == 0 and "30 cases" in result.stdout, result.stdout + result.stderr


def test_ratio_kernels_need_every_synchronization(simt_programs: Programs):
    result = run(simt_programs.build("mixer", MIXER, PLAIN, PORTABLE), "mutate")
    assert result.returncode == 0, result.stdout + result.stderr
    names = ("mixer_kernel.cuh", "mixer_gradients.cuh", "mixer_sample.cuh")
    files = (ROOT / "csrc/cuda/ratio" / name for name in names)
    helpers = r"= acquire_stage\(|prefetch_stage\(0\);"
    assert_every_line_is_tried(files, result.stdout, least=29, helpers=helpers)


def test_noise_kernels(simt_programs: Programs):
    program = simt_programs.build("noise", NOISE, simt_programs.sanitized(), PORTABLE)
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) comparisons", result.stdout)[1]) > 500
    result = run(program, "sabotage")
    assert result.returncode == 1 and "add_noise differs" in result.stdout
