"""The CUDA kernels executed on the CPU from nvcc's PTX, and proof that the simulator detects errors.

The quick cases run here, for one architecture; ``python tests/ptx/run.py`` runs all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ptx import counts, mutation, operations
from ptx.build import build, find_toolkit
from ptx.cases import Case, all_cases
from ptx.operations import Sizes
from ptx.reference_kernels import CASES, MODES, gemm, planted, run_planted
from ptx.simulator import Failure, Simulator
from torch._subclasses.fake_tensor import FakeTensorMode

from diffratio_fast.ops.ratio import weight_shapes

ROOT = Path(__file__).resolve().parent.parent.parent
OBJECTS = ROOT / "build" / "ptx"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_toolkit() is None, reason="nvcc is not here (pip install nvidia-cuda-nvcc)"),
]
QUICK = [case for case in all_cases() if case.quick]


@pytest.fixture(scope="module")
def small() -> Simulator:
    """The kernels of the tests, which mark their arrays in shared memory."""
    return Simulator(build(OBJECTS, marks=True, small=True))


@pytest.fixture(scope="module")
def project() -> Simulator:
    """The project's kernels, compiled as for a GPU."""
    torch.set_num_threads(1)
    simulator = Simulator(build(OBJECTS))
    operations.prepare(simulator)
    return simulator


@pytest.mark.parametrize("mode", MODES)
def test_reference_kernels_are_right_in_every_mode(small: Simulator, mode: str) -> None:
    small.options(multiprocessors=8, **MODES[mode])
    for case in CASES:
        case.run(small)


@pytest.mark.parametrize("mode", MODES)
def test_planted_bugs_are_reported_in_every_mode(small: Simulator, mode: str) -> None:
    small.options(multiprocessors=8, **MODES[mode])
    found = {bug.name: (run_planted(small, bug), bug.expected) for bug in planted(small)}
    wrong = {name: pair for name, pair in found.items() if pair[0] not in (pair[1] or ("",))}
    assert not wrong and len(found) >= 43


@pytest.mark.parametrize("maps", [1, 2])
def test_a_wrong_map_of_lanes_gives_wrong_results(small: Simulator, maps: int) -> None:
    small.options()
    with pytest.raises(Failure, match="wrong result"):
        gemm(small, 1, 32, 32, 32, 1, maps)


def test_reference_kernels_need_every_synchronization(small: Simulator) -> None:
    found = mutation.mutate(small, mutation.reference_subjects(), list(MODES), least=True)
    # in a thread block of one warp grid_sync needs its fence, not its bar.sync
    assert found.missed() == [("share.cuh:22", "bar.sync")] and len(found.tried) >= 17


def test_a_report_names_both_sides(small: Simulator) -> None:
    small.options(schedule=1)
    bug = next(bug for bug in planted(small) if bug.name == "no barrier before a buffer's reuse")
    small.library.simulator_clear()
    run_planted(small, bug)
    report = small.text("error")
    assert report.startswith("race: ") and report.count("planted.cu:") == 2, report
    assert "nothing orders the two" in report and "block 0 warp" in report, report


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_kernels(project: Simulator, case: Case) -> None:
    case(project)


def test_the_project_s_kernels_need_their_synchronizations(project: Simulator) -> None:
    """One shape, in one mode; ``run.py --mutate`` tries all."""
    subjects = [s for s in mutation.PROJECT if s.name in ("score, 64 channels", "products")]
    found = mutation.mutate(project, subjects, ["forward", "backward"], least=True)
    assert found.missed() == [] and len(found.tried) >= 20


def test_counts_of_a_case(project: Simulator) -> None:
    case = next(case for case in QUICK if case.name.startswith("log_ratio"))
    table = counts.report(project, case)
    assert "ldmatrix" in table and "bank" not in table and "wavefronts of shared memory" in table


def test_packed_weights_have_the_bytes_that_torch_compile_expects(project: Simulator) -> None:
    """The fake implementation in Python and the launchers agree on the size."""
    import ctypes

    for tokens, width, depth, hidden, vector in (
        (16, 64, 2, 128, 4), (15, 40, 2, 50, 12), (256, 128, 4, 256, 12), (129, 64, 1, 40, 1), (256, 200,
        2, 24, 4),
    ):  # fmt: skip
        sizes = Sizes(vector, 1, tokens, 1, tokens, width, depth, hidden)
        size = project.library.launch_packed_bytes(ctypes.byref(sizes))
        with FakeTensorMode():
            shapes = weight_shapes(tokens, width, depth, hidden, vector).values()
            weights = [torch.empty(shape, device="cuda") for shape in shapes]
            assert torch.ops.diffratio.pack_weights(weights).shape == (size,)
