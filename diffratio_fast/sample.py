"""python -m diffratio_fast.sample RUN --out grid.png|DIR|FILE.npz: images from a trained generator."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from diffratio_fast import command, launch
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import DEFAULT_RUN

MAX_GRID = 10_000
MAX_CANDIDATES = 4096
EPILOG = """The same command resumes an interrupted one. Several processes (torchrun --nproc-per-node N
-m diffratio_fast.sample ...) share the work; the images are the same."""


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.sample",
        description="Generate images with a trained one-step generator. An image is a function of --seed and "
        "its number.",
        epilog=EPILOG,
    )
    result.add_argument(
        "run", type=Path, nargs="?", default=DEFAULT_RUN, metavar="RUN",
        help="run directory, or a generator's .safetensors file",
    )  # fmt: skip
    result.add_argument("--count", type=int, default=120, metavar="N", help="number of images")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the latents")
    result.add_argument(
        "--classes", default="all", metavar="LIST",
        help="classes to cycle through: all, or numbers, ranges and names such as 3,5-7",
    )  # fmt: skip
    result.add_argument(
        "--out", type=Path, default=Path("samples.png"), metavar="PATH",
        help=".png: a grid; .npz: images uint8 [N, H, W, C] and labels int64 [N]; else a folder of PNGs",
    )  # fmt: skip
    group = result.add_argument_group("the ratio network as a verifier (docs/verifier.md)")
    group.add_argument(
        "--candidates", type=int, default=1, metavar="N", help="candidates of which each image is one"
    )
    group.add_argument(
        "--select", choices=("resample", "best"), default="resample",
        help="draw one by its density ratio, which keeps diversity, or take the most real one",
    )  # fmt: skip
    group.add_argument(
        "--sigma",
        type=float,
        metavar="X",
        help="noise level of the verifier (default: chosen by `refit`)",
    )
    group.add_argument("--draws", type=int, default=16, metavar="M", help="noise draws of a candidate")
    group.add_argument(
        "--verifier", type=Path, metavar="FILE", help="ratio network (default: RUN/ratio_refit.safetensors)"
    )
    result.add_argument("--vae", type=Path, metavar="DIR", help="AutoencoderKL that decodes latents")
    result.add_argument(
        "--columns", type=int, metavar="N", help="columns of the grid", default=argparse.SUPPRESS
    )
    result.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N")
    return result


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Parse class names, numbers and ranges to class numbers, in the given order."""
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
            raise UserError(
                f"--classes {text}: {word!r} is unknown; expected a class name, a number or a range"
            )
    if wrong := [number for number in chosen if number >= len(names)]:
        raise UserError(f"--classes {text}: class {wrong[0]} is out of range; expected 0 to {len(names) - 1}")
    return chosen


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: out of range; expected at least 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed {arguments.seed}: out of range; expected 0 to 2^63 - 1")
    if not 1 <= arguments.candidates <= MAX_CANDIDATES:
        raise UserError(f"--candidates {arguments.candidates}: out of range; expected 1 to {MAX_CANDIDATES}")
    if not 1 <= arguments.draws < 2**16:
        raise UserError(f"--draws {arguments.draws}: out of range; expected 1 to 65535")
    if arguments.sigma is not None and not 0 < arguments.sigma < math.inf:
        raise UserError(f"--sigma {arguments.sigma}: out of range; expected a positive finite number")
    if getattr(arguments, "columns", 1) < 1:
        raise UserError(f"--columns {arguments.columns}: out of range; expected at least 1")
    out: Path = arguments.out
    if out.suffix == ".png" and arguments.count > MAX_GRID:
        raise UserError(
            f"--count {arguments.count}: too many for a grid; expected at most {MAX_GRID}; set --out to a "
            "folder or an .npz"
        )
    if out.suffix not in ("", ".png", ".npz"):
        raise UserError(f"--out {out}: unknown format; expected a .png, a .npz or a folder")

    import numpy as np
    import torch

    from diffratio_fast.devices import choose_device
    from diffratio_fast.progress import ImageProgress
    from diffratio_fast.sampling.outputs import Job, write_samples
    from diffratio_fast.sampling.sampler import Sampler, VerifiedSampler

    rank, world_size = launch.process()
    device = choose_device(arguments.device)
    sampler = (
        Sampler(arguments.run, device=device, vae=arguments.vae)
        if arguments.candidates == 1
        else VerifiedSampler(
            arguments.run, device=device, vae=arguments.vae, candidates=arguments.candidates,
            how=arguments.select, sigma=arguments.sigma, draws=arguments.draws, verifier=arguments.verifier,
        )
    )  # fmt: skip
    classes = parse_classes(arguments.classes, sampler.class_names)
    labels = torch.tensor(classes)[torch.arange(arguments.count) % len(classes)]

    def make(start: int, count: int) -> np.ndarray:
        images = sampler.images(arguments.seed, start, labels[start : start + count])
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())

    identity = sampler.identity() | {"seed": arguments.seed, "classes": classes}
    columns = getattr(arguments, "columns", None) or _columns(arguments.count, len(classes))
    job = Job(make, labels.numpy(), identity, columns)
    with ImageProgress(arguments.count, "sampling", quiet=rank > 0) as progress:
        complete = write_samples(out, job, rank=rank, world_size=world_size, progress=progress.update)
    if isinstance(sampler, VerifiedSampler):
        sampler.print_effective_sample_size()
    print(
        f"{out}: {arguments.count} images"
        if complete
        else "this process has finished; another is still running"
    )
    return 0


def _columns(count: int, classes: int) -> int:
    """Whole turns through the classes, in rows as near to a square as they allow; else nearly a square."""
    side = math.ceil(math.sqrt(count))
    if classes > 20 or count <= classes:
        return side
    return classes if classes >= 4 else classes * max(1, round(side / classes))


if __name__ == "__main__":
    command.run(main)
