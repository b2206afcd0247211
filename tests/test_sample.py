"""Sampling: the same image for the same (seed, number), whatever is asked for around it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, one_error_line, run
from PIL import Image

from diffratio_fast import networks, sample, train
from diffratio_fast.command import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("trained") / "run"
    threads = torch.get_num_threads()
    assert train.main([*SMALL, "--steps", "3", "--run-dir", str(where)]) == 0
    torch.set_num_threads(threads)
    return where


def npz(trained: Path, out: Path, *options: str) -> tuple[np.ndarray, np.ndarray]:
    assert sample.main([str(trained), "--out", str(out), *options]) == 0
    with np.load(out) as archive:
        return archive["images"], archive["labels"]


def test_images_depend_on_seed_and_number_only(trained: Path, tmp_path: Path) -> None:
    images, labels = npz(trained, tmp_path / "a.npz", "--count", "600")
    assert images.shape == (600, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(600)]
    few, _ = npz(trained, tmp_path / "b.npz", "--count", "7")
    assert np.array_equal(images[:7], few)
    other, _ = npz(trained, tmp_path / "c.npz", "--count", "7", "--seed", "1")
    assert not np.array_equal(few, other)


def test_any_part_of_a_sequence_is_the_same_to_the_last_bit(trained: Path) -> None:
    generator, _ = networks.load(trained / "generator.safetensors", "generator")
    labels = torch.arange(700) % 10
    whole = networks.generate(generator, labels, seed=4)
    for start, end in ((0, 1), (255, 258), (300, 700), (511, 512)):
        assert torch.equal(
            networks.generate(generator, labels[start:end], seed=4, start=start), whole[start:end]
        )


def test_grid_and_folder(trained: Path, tmp_path: Path) -> None:
    assert sample.main([str(trained), "--count", "25", "--out", str(tmp_path / "g.png")]) == 0
    picture = Image.open(tmp_path / "g.png")
    assert picture.size[0] > picture.size[1]  # ten columns, three rows
    assert (
        sample.main([str(trained), "--count", "3", "--classes", "7,1-2", "--out", str(tmp_path / "d")]) == 0
    )
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == ["000000-class7.png", "000001-class1.png", "000002-class2.png"]
    assert np.asarray(Image.open(tmp_path / "d" / names[0])).shape == (8, 8)


def test_classes() -> None:
    names = ["cat", "dog", "eel", "fox"]
    assert sample.parse_classes("all", names) == [0, 1, 2, 3]
    assert sample.parse_classes("dog,0,2-3", names) == [1, 0, 2, 3]
    for text in ("hen", "4", "3-9", "2-1", "", "1,,2"):
        with pytest.raises(UserError):
            sample.parse_classes(text, names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere"], "no such file"),
        (["RUN", "--count", "0"], "--count"),
        (["RUN", "--classes", "12"], "no class 12"),
        (["RUN", "--out", "a.gif"], "--out a.gif"),
        (["RUN", "--seed", "-1"], "--seed"),
        (["RUN/ratio.safetensors"], "holds a ratio network"),
        (["RUN/config.yaml"], "not a safetensors file"),
        (["RUN/samples"], "no generator.safetensors"),
    ],
)
def test_bad_input_gets_one_line(trained: Path, tmp_path: Path, options: list[str], says: str) -> None:
    options = [option.replace("RUN", str(trained)) for option in options]
    assert says in one_error_line(run("sample", *options, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
