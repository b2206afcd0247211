"""python -m diffratio_fast.sample RUN --out grid.png|DIR|FILE.npz: images from a trained generator."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffratio_fast import command
from diffratio_fast.command import UserError

if TYPE_CHECKING:
    import torch

CHUNK = 1024
MAX_GRID = 10_000


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.sample",
        description="Images from a trained one-step generator, each a function of its --seed and number.",
    )
    result.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/digits"), metavar="RUN",
        help="run directory, or a generator's .safetensors file",
    )  # fmt: skip
    result.add_argument("--count", type=int, default=120, metavar="N", help="number of images")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the latents")
    result.add_argument(
        "--classes", default="all", metavar="LIST",
        help="classes in turn: all, or numbers, ranges and names such as 3,5-7",
    )  # fmt: skip
    result.add_argument(
        "--out", type=Path, default=Path("samples.png"), metavar="PATH",
        help=".png: a grid; .npz: images uint8 [N, H, W, C] and labels int64 [N]; else a folder of PNGs",
    )  # fmt: skip
    result.add_argument(
        "--columns", type=int, metavar="N", help="images in a row of the grid", default=argparse.SUPPRESS
    )
    result.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N")
    return result


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Class numbers in the order given; each word is a name, a number or a range of numbers."""
    if text == "all":
        return list(range(len(names)))
    chosen: list[int] = []
    for word in text.split(","):
        word = word.strip()
        first, dash, last = word.partition("-")
        if word in names:
            chosen.append(names.index(word))
        elif word.isdecimal():
            chosen.append(int(word))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            chosen.extend(range(int(first), int(last) + 1))
        else:
            raise UserError(f"--classes {text}: {word!r} is neither a class name, a number nor a range")
    if wrong := [number for number in chosen if number >= len(names)]:
        raise UserError(f"--classes {text}: there is no class {wrong[0]}; the last is {len(names) - 1}")
    return chosen


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, not {arguments.count}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2^63 - 1, not {arguments.seed}")
    out: Path = arguments.out
    if out.suffix == ".png" and arguments.count > MAX_GRID:
        raise UserError(f"a grid holds at most {MAX_GRID} images: give --out a folder or an .npz")
    if out.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--out {out}: use a .png, a .npz or a folder")

    import torch

    from diffratio_fast import networks
    from diffratio_fast.data import Scaling
    from diffratio_fast.devices import choose_device
    from diffratio_fast.images import to_uint8

    device = choose_device(arguments.device)
    run: Path = arguments.run
    path = run / "generator.safetensors" if run.is_dir() else run
    if run.is_dir() and not path.exists():
        raise UserError(f"{run}: holds no generator.safetensors yet; finish its training, or name a snapshot")
    generator, about = networks.load(path, "generator")
    generator.to(device)
    scaling = Scaling(**about.data["scaling"])
    classes = parse_classes(arguments.classes, about.data["class_names"])
    labels = torch.tensor(classes)[torch.arange(arguments.count) % len(classes)]

    def chunks() -> Iterator[torch.Tensor]:
        for start in range(0, arguments.count, CHUNK):
            x0 = networks.generate(generator, labels[start : start + CHUNK], arguments.seed, start)
            yield to_uint8(x0, scaling)

    columns = getattr(arguments, "columns", None) or _columns(arguments.count, len(classes))
    _write(out, chunks(), labels, columns)
    print(f"{out}: {arguments.count} images")
    return 0


def _columns(count: int, classes: int) -> int:
    """Whole turns through the classes where that makes a handy grid, else nearly a square."""
    return classes if 4 <= classes <= 20 and count > classes else math.ceil(math.sqrt(count))


def _write(out: Path, chunks: Iterator[torch.Tensor], labels: torch.Tensor, columns: int) -> None:
    import io

    import numpy as np
    import torch

    from diffratio_fast.files import make_directory, replace_file
    from diffratio_fast.images import grid, png

    if out.suffix == ".png":
        replace_file(out, png(grid(torch.cat(list(chunks)), columns)))
    elif out.suffix == ".npz":
        buffer = io.BytesIO()
        images = torch.cat(list(chunks)).permute(0, 2, 3, 1).numpy()
        np.savez_compressed(buffer, images=images, labels=labels.numpy())
        replace_file(out, buffer.getvalue())
    else:
        make_directory(out)
        number = 0
        for chunk in chunks:
            for image in chunk.permute(0, 2, 3, 1).numpy():
                name = f"{number:06d}-class{int(labels[number])}.png"
                replace_file(out / name, png(image.squeeze(2) if image.shape[2] == 1 else image))
                number += 1


if __name__ == "__main__":
    command.run(main)
