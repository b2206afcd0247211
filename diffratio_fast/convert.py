"""python -m diffratio_fast.convert SNAPSHOT.pkl OUT.safetensors: convert published EDM and EDM2 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast import command
from diffratio_fast.errors import UserError

if TYPE_CHECKING:
    from diffratio_fast.networks.published_pickles import PublishedNetwork

EPILOG = """No code in the snapshot is executed, and the published code is not needed. OUT contains the
unchanged weights under their published names; architecture and config in its metadata are the arguments of
diffratio_fast.networks.from_published. diffratio_fast.networks.load_published(OUT) returns the network."""


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.convert",
        description="Convert published EDM and EDM2 snapshots (pickles) to safetensors; executes no code.",
        epilog=EPILOG,
    )
    result.add_argument("snapshot", type=Path, metavar="SNAPSHOT.pkl", help="a published snapshot")
    result.add_argument("out", type=Path, nargs="?", metavar="OUT.safetensors", help="the file to write")
    result.add_argument("--key", default="ema", metavar="NAME", help="key of the network in the snapshot")
    result.add_argument(
        "--info", action="store_true", help="print the content of the snapshot, write nothing"
    )
    return result


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    path: Path = arguments.snapshot
    out: Path | None = arguments.out
    if out is None and not arguments.info:
        raise UserError("no output file; expected SNAPSHOT.pkl OUT.safetensors, or --info (see --help)")
    if out is not None and out.resolve() == path.resolve():
        raise UserError(f"{out}: the output would overwrite the snapshot; choose another file")

    from diffratio_fast.networks.published_pickles import published_network, read_snapshot
    from diffratio_fast.storage.reading import one_line

    content = read_snapshot(path)
    if arguments.key not in content:
        raise UserError(
            f"--key {arguments.key}: not in {path}; expected one of "
            f"{one_line(', '.join(map(ascii, content)))}"
        )
    try:
        network = published_network(content[arguments.key])
        parameters = _verified(network)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    dtypes = ", ".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for tensor in network.state.values()})
    )
    summary = f"{network.architecture}, {parameters:,} parameters, {len(network.state)} tensors of {dtypes}"
    if arguments.info or out is None:
        _print_info(content, arguments.key, network, summary)
        return 0
    _write(out, network)
    print(f"{out}: {summary}")
    return 0


def _verified(network: PublishedNetwork) -> int:
    """Number of parameters; raises ``ValueError`` unless names and shapes match the architecture."""
    from diffratio_fast.networks.published import with_state

    built = with_state(network.architecture, network.config, network.state)
    return sum(parameter.numel() for parameter in built.parameters())


def _write(out: Path, network: PublishedNetwork) -> None:
    from diffratio_fast.storage.tensors import save_tensors

    metadata = {"architecture": network.architecture, "config": json.dumps(network.config)}
    save_tensors(out, network.state, metadata)


def _print_info(content: dict[str, Any], key: str, network: PublishedNetwork, summary: str) -> None:
    from diffratio_fast.networks.published_pickles import class_of

    for name, value in content.items():
        print(f"{ascii(name)[1:-1]}: {ascii(class_of(value))[1:-1][:100]}")
    print(f"architecture of {key}: {summary}")
    print(f"config: {json.dumps(network.config)}")


if __name__ == "__main__":
    command.run(main)
