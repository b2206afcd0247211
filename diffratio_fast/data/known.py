"""How to get the data sets that presets name, as commands."""

from __future__ import annotations

from pathlib import PurePath

_PREPARE = "python -m diffratio_fast.prepare"
COMMANDS: dict[str, tuple[str, str]] = {
    "cifar10": (
        "curl -LO https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        f"{_PREPARE} cifar-10-binary.tar.gz {{}}",
    ),
    "fashion-mnist": (
        "apt-get install dataset-fashion-mnist",
        f"{_PREPARE} /usr/share/datasets/fashion-mnist {{}}",
    ),
    "imagenet64": (
        "get ILSVRC2012's training images from image-net.org",
        f"{_PREPARE} ILSVRC2012/train {{}} --resolution 64",
    ),
    "imagenet512": (
        "make img512-sd.zip of ILSVRC2012 by EDM2's dataset_tool.py",
        f"{_PREPARE} img512-sd.zip {{}}",
    ),
    "mine": ("put images into a folder", f"{_PREPARE} FOLDER {{}} --resolution 64"),
}
"""By the name of a data set's directory: how its source is had, and how it is prepared (into ``{}``)."""


def how_to_make(directory: str) -> str:
    """What to do where the data set ``directory`` does not exist, for an error message."""
    fetch, prepare = COMMANDS.get(PurePath(directory).name, ("", ""))
    if not prepare:
        return f"known: digits, or a directory that `{_PREPARE} SOURCE DIR` made"
    return f"make it with these two: {fetch}; {prepare.format(directory)}"
