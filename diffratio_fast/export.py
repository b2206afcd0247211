"""python -m diffratio_fast.export RUN --to torch-export|onnx|hub: a generator for other programs."""

from __future__ import annotations

from pathlib import Path

from diffratio_fast import command
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import DEFAULT_RUN

FORMATS = {"torch-export": "generator.pt2", "onnx": "generator.onnx", "hub": "hub"}
"""What ``--to`` can be, and the default name of the output in the current directory."""
EPILOG = """torch-export and onnx: a program with the inputs latents float32 [N, ...] (standard normal) and
labels int64 [N], for any N, and the output images uint8 [N, C, H, W], or latents for a VAE. The program is
compared with PyTorch before the command ends. hub: a folder with weights, metrics and a model card; nothing
is uploaded without --upload."""


def parser() -> command.Parser:
    """The command line."""
    result = command.Parser(
        prog="python -m diffratio_fast.export",
        description="Export a trained generator for other programs.",
        epilog=EPILOG,
    )
    add = result.add_argument
    add(
        "run",
        type=Path,
        nargs="?",
        default=DEFAULT_RUN,
        metavar="RUN",
        help="run directory, or a generator's file",
    )
    add("--to", choices=tuple(FORMATS), required=True, metavar="FORMAT", help=", ".join(FORMATS))
    add("--out", type=Path, metavar="PATH", help="file, or folder of hub (default: named by the format)")
    add("--upload", metavar="USER/NAME", help="hub: upload the folder to this repository, with your token")
    return result


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.upload and arguments.to != "hub":
        raise UserError(f"--upload is for --to hub, not {arguments.to}")
    out: Path = arguments.out or Path(FORMATS[arguments.to])
    import torch

    from diffratio_fast.sampling.exported import Program, write_onnx, write_torch
    from diffratio_fast.sampling.model_card import write_card
    from diffratio_fast.sampling.sampler import Sampler

    sampler = Sampler(arguments.run, device=torch.device("cpu"), decode=False)
    if arguments.to == "hub":
        if not sampler.path.is_file():
            raise UserError(f"{arguments.run}: not finished; expected a generator.safetensors")
        for path in write_card(out, arguments.run, sampler.path, sampler.sha256, sampler.about):
            print(path)
        if arguments.upload:
            _upload(out, arguments.upload)
        return 0
    program = Program(sampler.generator.float(), sampler.scaling).eval().requires_grad_(False)
    write = write_torch if arguments.to == "torch-export" else write_onnx
    difference = write(program, len(sampler.class_names), out)
    checked = (
        "not checked: onnxruntime is not installed" if difference is None else f"by {difference:.3g} at most"
    )
    print(
        f"{out}: written; differs from PyTorch {checked}" if difference is not None else f"{out}: {checked}"
    )
    return 0


def _upload(folder: Path, repository: str) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--upload needs huggingface_hub; pip install diffratio-fast[hub]") from None
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # the client raises many exception types
        raise UserError(f"--upload {repository}: {' '.join(str(error).split())[:300]}") from None
    print(f"https://huggingface.co/{repository}")


if __name__ == "__main__":
    command.run(main)
