"""Building, loading, and the messages if either fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from diffratio_fast.ops import compiled

PACKAGE = ROOT / "diffratio_fast"
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402
import torch_build  # noqa: E402

needs_compiled = pytest.mark.skipif(compiled.module is None, reason="the compiled module was not built")

USE = """
import torch, diffratio_fast
from diffratio_fast import ops
rng, index = ops.make_rng(3, 4), torch.arange(2)
noised = ops.add_noise(torch.zeros(2, 5), torch.ones(2), rng, index, 3)
assert torch.equal(noised, ops.reference_noise.normal(rng, index, (5,), 3))
print(diffratio_fast.__version__, diffratio_fast.build_info()["built"])
"""


def use(folder: Path) -> subprocess.CompletedProcess[str]:
    """Import the package in `folder` in a fresh process and use an operation."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{USE}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def copy_package(folder: Path, compiled_module: bool = True) -> Path:
    package = folder / "diffratio_fast"
    shutil.copytree(
        PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    )
    if compiled_module:
        for file in (*PACKAGE.glob("_C*.so"), PACKAGE / "_build_info.json"):
            shutil.copy(file, package)
    return package


def copy_sources(folder: Path) -> Path:
    copy_package(folder, compiled_module=False)
    for name in ("csrc", "build_backend"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    return folder


def build(folder: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True, text=True,
        env={name: value for name, value in env.items() if value is not None},
    )  # fmt: skip


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """Assert that the process succeeded with one line on stderr, and return the line."""
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("diffratio_fast: "), result.stderr
    assert result.stdout.split() == ["0.1.0", "False"]
    return result.stderr


# --- loading -----------------------------------------------------------------------------------------------


@needs_compiled
def test_a_good_module_prints_nothing(tmp_path):
    copy_package(tmp_path)
    result = use(tmp_path)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.split() == ["0.1.0", "True"]


def test_a_missing_module_is_one_line(tmp_path):
    copy_package(tmp_path, compiled_module=False)
    line = only_line(use(tmp_path))
    assert "it was not built" in line and "pip install -e ." in line


@needs_compiled
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change_info(p, torch_version="2.1"), f"torch 2.1, this is torch {torch.__version__}"),
        (lambda p: change_info(p, built=False, reason="no compiler"), "(no compiler)"),
        (lambda p: (p / "_build_info.json").write_text("{"), "_build_info.json is damaged"),
        (lambda p: (p / "_build_info.json").write_text("[]"), "_build_info.json is damaged"),
        (lambda p: truncate(p), "is missing or damaged"),
        (lambda p: next(p.glob("_C*.so")).unlink(), "is missing or damaged"),
        (lambda p: garble(p), "it cannot be loaded"),
        (lambda p: other_interface(p), "it was built from other sources"),
    ],
    ids=["torch", "unbuilt", "info", "list", "truncated", "absent", "garbage", "interface"],
)  # fmt: skip
def test_an_unusable_module_is_one_line(tmp_path, damage, message):
    damage(copy_package(tmp_path))
    assert message in only_line(use(tmp_path))


def change_info(package: Path, **changes: object) -> None:
    info = json.loads((package / "_build_info.json").read_text())
    (package / "_build_info.json").write_text(json.dumps(info | changes))


def truncate(package: Path) -> None:
    module = next(package.glob("_C*.so"))
    module.write_bytes(module.read_bytes()[:5000])


def garble(package: Path) -> None:
    module = next(package.glob("_C*.so"))
    module.write_bytes(b"\0" * module.stat().st_size)


def other_interface(package: Path) -> None:
    file = package / "ops" / "compiled.py"
    file.write_text(file.read_text().replace("\nINTERFACE = ", "\nINTERFACE = 1000 + "))


def test_importing_the_package_is_light():
    code = "import sys, diffratio_fast; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split() == ["False", "False"]


@needs_compiled
def test_build_info():
    info = compiled.build_info()
    assert info["torch_version"] == torch.__version__ and info["compiler"]
    assert "portable" in info["simd_levels"] and info["simd_level"] in info["simd_levels"]


# --- building ----------------------------------------------------------------------------------------------


def test_no_compiler_gives_a_pure_python_package(tmp_path):
    copy_sources(tmp_path)
    only_python = str(Path(sys.executable).parent)
    result = build(tmp_path, PATH=only_python, CXX=None)
    assert result.returncode == 0, result.stderr
    assert sum("WARNING: no C++ compiler was found" in line for line in result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("diffratio_fast/*.so"))
    assert "no C++ compiler was found" in only_line(use(tmp_path))


def test_cuda_wished_for_but_absent_is_an_error(tmp_path):
    copy_sources(tmp_path)
    result = build(tmp_path, DIFFRATIO_CUDA="1", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert "DIFFRATIO_CUDA=1, but no CUDA compiler (nvcc) was found" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(probe.find_compiler() is None, reason="there is no C++ compiler")
def test_a_cuda_compiler_that_does_not_work(tmp_path):
    """auto builds for the CPU and reports it; 1 is an error."""
    copy_sources(tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.1'\n[ $1 = --version ]\n")
    nvcc.chmod(0o755)
    result = build(tmp_path, DIFFRATIO_CUDA="1", CUDACXX=str(nvcc))
    assert result.returncode != 0 and "cannot use the CUDA compiler" in result.stderr
    # the compiled sources do not matter here
    for name in ("noise_bindings.cpp", "ratio_bindings.cpp", "module.cpp"):
        (tmp_path / "csrc" / name).write_text("")
    result = build(tmp_path, DIFFRATIO_CUDA="auto", CUDACXX=str(nvcc))
    assert result.returncode == 0, result.stderr
    assert "cannot use the CUDA compiler (see above); building for the CPU only" in result.stderr


def test_a_wrong_wish_is_an_error(tmp_path):
    copy_sources(tmp_path)
    result = build(tmp_path, DIFFRATIO_CUDA="maybe")
    assert result.returncode != 0 and "DIFFRATIO_CUDA is auto, 1 or 0" in result.stderr
    result = build(tmp_path, DIFFRATIO_CUDA_ARCHS="hopper")
    if probe.find_nvcc():
        assert result.returncode != 0 and "unknown CUDA architecture 'hopper'" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(probe.find_compiler() is None, reason="there is no C++ compiler")
def test_a_build_in_place_imports_without_a_gpu(tmp_path):
    """With CUDA where there is an nvcc; and a second build has nothing to compile."""
    copy_sources(tmp_path)
    cuda = "1" if probe.find_nvcc() else "0"
    result = build(tmp_path, DIFFRATIO_CUDA=cuda, DIFFRATIO_CUDA_ARCHS="9.0")
    assert result.returncode == 0, result.stdout + result.stderr
    used = use(tmp_path)
    assert used.stderr == "" and used.stdout.split() == ["0.1.0", "True"]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}print(diffratio_fast.build_info())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert f"'cuda_archs': {['90a-real'] if cuda == '1' else []}" in shown.stdout
    again = build(tmp_path, DIFFRATIO_CUDA=cuda, DIFFRATIO_CUDA_ARCHS="9.0")
    assert again.returncode == 0 and "Building C" not in again.stdout
    # A moved tree is configured and built again; the old cache does not make it fail.
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    for name in ("noise_bindings.cpp", "ratio_bindings.cpp", "module.cpp"):  # slow; only their order matters
        (moved / "csrc" / name).write_text("")
    again = build(moved, DIFFRATIO_CUDA="0")
    assert again.returncode == 0 and "Building C" in again.stdout, again.stderr


# --- choices -----------------------------------------------------------------------------------------------


def test_the_torch_of_the_invoking_environment_is_found(tmp_path, monkeypatch):
    """Through pip's isolation: the build environment's torch, on PYTHONPATH, is not used."""
    fake = tmp_path / "pip-build-env-x" / "site" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '9.9'\nclass _C: _GLIBCXX_USE_CXX11_ABI = 1\n")
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    found = probe.find_torch()
    assert (found.version, found.path) == (torch.__version__, torch.__path__[0])


def test_the_backend_asks_for_torch_only_where_there_is_none(monkeypatch, capsys):
    have = probe.Torch("/somewhere/torch", "2.12.1+cu130", 1)
    monkeypatch.setattr(probe, "find_torch", lambda: have)
    assert not any("torch" in r for r in torch_build.get_requires_for_build_editable())
    assert "building against torch 2.12.1+cu130 in /somewhere/torch" in capsys.readouterr().out
    for missing in (None, probe.Torch("/somewhere/torch", "2.10.3", 1)):
        monkeypatch.setattr(probe, "find_torch", lambda missing=missing: missing)
        assert "torch>=2.11" in torch_build.get_requires_for_build_wheel()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DIFFRATIO_CUDA_ARCHS": "8.0;9.0a"}, "80-real;90a-real"),
        ({"DIFFRATIO_CUDA_ARCHS": "90a-real 80"}, "90a-real;80-real"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6 9.0+PTX"}, "86-real;90a"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "DIFFRATIO_CUDA_ARCHS": "12.0"}, "120-real"),
    ],
)
def test_cuda_architectures(environment, expected, monkeypatch):
    for name in ("DIFFRATIO_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert probe.cuda_architectures() == expected


def test_default_cuda_architectures(monkeypatch, tmp_path):
    for name in ("DIFFRATIO_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.cuda_architectures() == "80;90a-real"  # sm_80, its PTX, sm_90a
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!{sys.executable}\nprint('9.0\\n9.0\\n8.9')\n")
    smi.chmod(0o755)
    assert probe.cuda_architectures() == "89-real;90a-real"
