"""A model of step time and memory against GPUs, batch and model size, and its check on this machine.

    python -m benchmarks.scaling_model [--preset NAME] [--gpus 8,16,...] [--json FILE]
    python -m benchmarks.scaling_model --summary
    python -m benchmarks.scaling_model --measure [--json FILE]

FLOPs, gradients and memory come from the plan (``diffratio_fast.training.memory``, a step on fake tensors).
All other numbers are computed from the values of ``Machine``, which are assumptions and not measured.
``--measure`` fits the two constants of this machine's CPU (rate and overhead of a step) on two batch sizes
and predicts the others; with two processes it adds the averaging of gradients. docs/scaling.md explains the
formulas.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast import command
from diffratio_fast.errors import UserError

if TYPE_CHECKING:
    from diffratio_fast.config.run import RunConfig
    from diffratio_fast.data.dataset import DataSet

GIB = 2**30
PLANNED = (16, 32)
"""Batch sizes of the plans for the memory model; for smaller ones the optimizer step has the peak."""
COUNTS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Machine:
    """An assumed GPU and its connections: H200, eight per node, 400 Gb/s per GPU between nodes."""

    flops: float = 989e12
    """dense bfloat16 operations per second (data sheet)"""
    utilization: float = 0.35
    """fraction that a training step of a U-Net reaches"""
    memory: float = 141e9
    per_node: int = 8
    inside: float = 350e9
    """bytes per second between GPUs of a node (NVLink; data sheet: 450 GB/s)"""
    between: float = 45e9
    """bytes per second to another node (nominal: 50 GB/s)"""
    latency: float = 20e-6
    """seconds per message of a ring"""
    host: float = 40e9
    """bytes per second from the GPU to host memory"""
    disk: float = 2e9
    """bytes per second from a process to the file system"""
    overhead: float = 0.01
    """seconds of a step that do not depend on the batch size (launches, optimizer)"""
    hidden: float = 0.5
    """fraction of the computation that can overlap with the gradient exchange: most of the backward passes"""


@dataclass(frozen=True)
class Work:
    """Cost of a step of a run, from the plan; bytes are those of one copy of the networks."""

    batch: int
    flops: float
    """FLOPs per image with one pass per GPU; with several passes each generator pass runs twice."""
    flops_in_parts: float
    state: float
    gradients: float
    record_bytes: int
    fixed: float
    per_image: float
    """Peak bytes of a pass: ``fixed`` (state, gradients and other) and bytes per image."""

    def peak(self, images: int) -> float:
        return max(self.fixed + images * self.per_image, self.state + self.gradients)


def ring(size: float, count: int, machine: Machine, *, passes: int = 2) -> float:
    """Seconds of a ring over ``count`` GPUs: each sends (count - 1) / count of ``size`` in each pass.

    All-reduce is two passes (reduce-scatter and all-gather). The slowest link determines the time.
    """
    if count == 1:
        return 0.0
    speed = machine.inside if count <= machine.per_node else machine.between
    return passes * ((count - 1) / count * size / speed + (count - 1) * machine.latency)


def largest_pass(work: Work, local: int, available: float) -> int | None:
    """Largest power of two (or ``local``) of images per pass that fits ``available`` bytes, or None."""
    sizes = [images for images in (local, *(2**i for i in range(local.bit_length()))) if images <= local]
    return max((images for images in sizes if work.peak(images) <= available), default=None)


def predict(work: Work, count: int, machine: Machine, *, sharded: bool) -> dict[str, Any] | None:
    """Predict step time and memory of ``count`` GPUs; None if a GPU has no image or too little memory.

    Unsharded (DDP): every GPU stores the complete state. Sharded (FSDP2): it stores 1 / count of the state,
    and the weights are gathered for the forward passes and again for the backward passes.
    """
    if work.batch % count:
        return None
    local = work.batch // count
    spared = (work.state + work.gradients) * (1 - 1 / count) if sharded else 0.0
    images = largest_pass(work, local, machine.memory * 0.92 + spared)
    if images is None:
        return None
    flops = (work.flops if images == local else work.flops_in_parts) * local
    computing = flops / (machine.flops * machine.utilization)
    exchange = ring(work.gradients, count, machine)
    if sharded:  # reduce-scatter of gradients, all-gather of weights in forward and in backward passes
        passes = -(-local // images)
        exchange = ring(work.gradients, count, machine, passes=1)
        exchange += passes * 2 * ring(work.gradients, count, machine, passes=1)
    exposed = max(0.0, exchange - machine.hidden * computing)
    seconds = computing + exposed + machine.overhead
    return {
        "gpus": count,
        "way": "fsdp" if sharded else "ddp",
        "local_batch": local,
        "images_in_a_pass": images,
        "computing_s": computing,
        "exchange_s": exchange,
        "step_s": seconds,
        "images_per_second": work.batch / seconds,
        "efficiency": computing / seconds,
        "memory_bytes": work.peak(images) - spared,
        "loader_bytes_per_second_and_node": work.batch * work.record_bytes / seconds
        / max(1, math.ceil(count / machine.per_node)),
        "save_stall_s": work.state / (count if sharded else 1) / machine.host,
        "save_write_s": work.state / (count if sharded else 1) / machine.disk,
    }  # fmt: skip


def work_of(config: RunConfig, data: DataSet) -> Work:
    """Cost of a step of the run, from plans of two pass sizes; memory is linear in the images."""
    from diffratio_fast.training.memory import cost

    low, high = PLANNED
    few, many = (cost(replace(config, batch_size=n, micro_batch=None), data) for n in PLANNED)
    parts = cost(replace(config, batch_size=2, micro_batch=1), data)
    per_image = (many.peak - few.peak) / (high - low)
    element = 1 if data.kind == "image" else 2
    return Work(
        batch=config.batch_size,
        flops=many.flops / high,
        flops_in_parts=parts.flops / 2,
        state=many.state,
        gradients=many.gradients,
        record_bytes=math.prod(data.shape) * element,
        fixed=few.peak - low * per_image,
        per_image=per_image,
    )


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Format as Markdown: one row per number of GPUs and kind of parallelism."""
    lines = [
        "| GPUs | parallelism | images on each (in a pass) | computing, ms | exchange, ms | step, ms | "
        "images/s "
        "| efficiency | memory, GB | loader, MB/s a node | days |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        lines.append(
            f"| {row['gpus']} | {row['way']} | {row['local_batch']} ({row['images_in_a_pass']}) "
            f"| {row['computing_s'] * 1e3:.0f} | {row['exchange_s'] * 1e3:.0f} | {row['step_s'] * 1e3:.0f} "
            f"| {row['images_per_second']:,.0f} | {row['efficiency']:.0%} | {row['memory_bytes'] / 1e9:.1f} "
            f"| {row['loader_bytes_per_second_and_node'] / 1e6:,.0f} | {row['step_s'] * steps / 86400:.2f} |"
        )
    return "\n".join(lines)


PLANS = Path(__file__).parent.parent / "docs" / "presets.md"
ROW = re.compile(r"\| `([^`]+)` \| `train` \| ([\d.]+) \+ ([\d.]+) \| (\d+)[^|]*\| ([\d,.]+) \|")


def hidden_up_to(flops: float, gradients: float, batch: int, machine: Machine) -> int:
    """Largest number of GPUs (complete nodes) with the gradient exchange hidden by the backward passes."""
    rate = machine.flops * machine.utilization
    nodes = range(machine.per_node, 257, machine.per_node)
    hides = [n for n in nodes if ring(gradients, n, machine) <= machine.hidden * flops * batch / n / rate]
    return max(hides, default=0)


def summary(machine: Machine, larger: int = 2048) -> str:
    """Format computation and exchange of every preset as Markdown, from the plans in docs/presets.md."""
    lines = [
        "| preset (batch) | GFLOPs per image | gradients, GB | computing on 8, 16 GPUs, ms | exchange, ms "
        f"| hidden up to | with a batch of {larger} |",
        "|" + "---|" * 7,
    ]
    for name, first, second, batch, gigaflops in ROW.findall(PLANS.read_text()):
        flops, gradients = float(gigaflops.replace(",", "")) * 1e9, (float(first) + float(second)) * 4e6
        if flops < 1e11:  # digits and Fashion-MNIST are for a CPU
            continue
        computing = [flops * int(batch) / n / (machine.flops * machine.utilization) for n in (8, 16)]
        exchange = [ring(gradients, n, machine) for n in (8, 16)]
        most = [hidden_up_to(flops, gradients, b, machine) for b in (int(batch), larger)]
        lines.append(
            f"| `{name}` ({batch}) | {flops / 1e9:,.0f} | {gradients / 1e9:.2f} "
            f"| {computing[0] * 1e3:,.0f}, {computing[1] * 1e3:,.0f} "
            f"| {exchange[0] * 1e3:.0f}, {exchange[1] * 1e3:.0f} | {most[0]} GPUs | {most[1]} GPUs |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- on this machine

TINY: dict[str, Any] = {
    "generator": "backbone", "ratio_network": "encoder", "threads": 1, "device": "cpu",
    "backbone_options": json.dumps(
        {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    ),
}  # fmt: skip
FITTED, PREDICTED = (8, 64), (16, 32, 128)
TIMED = 7
RANK = """
import json, sys
from pathlib import Path
from benchmarks.scaling_model import timed_step
print(json.dumps(timed_step(int(sys.argv[1]))))
"""


def timed_step(batch: int) -> float | None:
    """Median CPU seconds of a step of the tiny U-Net in one process; None except on rank 0."""
    import torch

    from diffratio_fast.config.train import TrainConfig
    from diffratio_fast.runs.directory import RunDirectory
    from diffratio_fast.training.generator_run import Trainer
    from diffratio_fast.training.processes.world import joined

    config = TrainConfig(**TINY, batch_size=batch)
    with joined(torch.device("cpu")) as world, tempfile.TemporaryDirectory() as folder:
        run = Trainer("digits", config, RunDirectory(Path(folder)), world=world)
        batches = run.batches()
        times = []
        for _ in range(2 + TIMED):
            began = time.process_time()
            run.advance(next(batches))
            times.append(time.process_time() - began)
        return statistics.median(times[2:]) if world.main else None


def timed_on_two(batch: int) -> float:
    """The same with two processes, each with half of the batch."""
    command_line = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python",
        sys.executable, "-c", RANK, str(batch),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command_line, capture_output=True, text=True, env=environment, check=False)
    found = [line for line in result.stdout.splitlines() if line not in ("", "null")]
    if result.returncode or not found:
        raise UserError(f"two processes: {(result.stderr.splitlines() or ['no answer'])[-1][:200]}")
    return float(json.loads(found[-1]))


def averaging(size: float) -> float:
    """CPU seconds of a process for averaging ``size`` bytes of gradients with another (Gloo)."""
    script = (
        "import sys, time, torch, torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "t = torch.zeros(int(float(sys.argv[1])) // 4)\n"
        "times = []\n"
        "for _ in range(20):\n"
        "    d.barrier(); b = time.process_time(); d.all_reduce(t); times.append(time.process_time() - b)\n"
        "if d.get_rank() == 0: print(sorted(times)[10])\n"
        "d.destroy_process_group()\n"
    )
    line = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python",
        sys.executable, "-c", script, str(size),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    return float(result.stdout.split()[-1])


def measure() -> dict[str, Any]:
    """Predicted and measured step times on this machine's CPU, one and two processes.

    In CPU seconds of one process with one thread, which do not include other load.
    """
    import torch

    from benchmarks.harness import environment
    from diffratio_fast.config.train import TrainConfig
    from diffratio_fast.data import open_dataset
    from diffratio_fast.training.memory import cost

    planned = cost(TrainConfig(**TINY, batch_size=64), open_dataset("digits"))
    per_image = planned.flops / 64
    seconds = {batch: timed_step(batch) for batch in (*FITTED, *PREDICTED)}
    low, high = FITTED
    rate = (high - low) * per_image / (seconds[high] - seconds[low])  # type: ignore[operator]
    overhead = seconds[low] - low * per_image / rate  # type: ignore[operator]
    averaged = averaging(planned.gradients)
    rows = [
        {"processes": 1, "batch": batch, "predicted_s": overhead + batch * per_image / rate,
         "measured_s": seconds[batch], "fitted": batch in FITTED}
        for batch in sorted(seconds)
    ]  # fmt: skip
    for batch in (32, 128):
        predicted = overhead + batch / 2 * per_image / rate + averaged
        rows.append({"processes": 2, "batch": batch, "predicted_s": predicted,
                     "measured_s": timed_on_two(batch), "fitted": False})  # fmt: skip
    return {
        "environment": environment(torch.device("cpu")),
        "flops_per_image": per_image,
        "gradient_bytes": planned.gradients,
        "rate_flops": rate,
        "overhead_s": overhead,
        "averaging_s": averaged,
        "rows": rows,
    }


def main(argv: list[str]) -> int:
    parser = command.Parser(
        prog="python -m benchmarks.scaling_model", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", default="imagenet512-xs", metavar="NAME", help="preset to model")
    parser.add_argument("--gpus", default=",".join(map(str, COUNTS)), metavar="LIST", help="numbers of GPUs")
    parser.add_argument("--batch", type=int, metavar="N", help="images per step (default: the preset's)")
    parser.add_argument("--summary", action="store_true", help="instead: all presets, from docs/presets.md")
    parser.add_argument("--measure", action="store_true", help="instead: check the model on this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    arguments = parser.parse_args(argv)
    words = arguments.gpus.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            f"--gpus {arguments.gpus}: not a list of numbers; expected integers separated by commas"
        )
    result: dict[str, Any]
    if arguments.summary:
        print(summary(Machine()))
        return 0
    if arguments.measure:
        result = measure()
        for row in result["rows"]:
            how = "fitted" if row["fitted"] else f"{row['predicted_s'] / row['measured_s'] - 1:+.0%}"
            print(
                f"{row['processes']} processes, batch {row['batch']:>3}: predicted "
                f"{row['predicted_s'] * 1e3:7.1f} ms, measured {row['measured_s'] * 1e3:7.1f} ms ({how})"
            )
    else:
        from diffratio_fast.config.presets import PRESETS
        from diffratio_fast.config.train import TrainConfig
        from diffratio_fast.training.plan import planned_data

        if arguments.preset not in PRESETS:
            raise UserError(f"--preset {arguments.preset}: unknown; expected one of {', '.join(PRESETS)}")
        config = TrainConfig(**PRESETS[arguments.preset])
        if arguments.batch is not None:
            config = replace(config, batch_size=arguments.batch)
        steps, counts = config.steps, [int(word) for word in words]
        work = work_of(config, planned_data(arguments.preset, config)[0])
        machine = Machine()
        found = [predict(work, count, machine, sharded=way) for count in counts for way in (False, True)]
        rows = [row for row in found if row is not None]
        print(
            f"{arguments.preset}: {work.flops / 1e9:,.0f} GFLOPs per image, gradients "
            f"{work.gradients / 1e9:.2f} GB, state {work.state / 1e9:.2f} GB, {steps:,} steps of {work.batch}"
        )
        print(table(rows, steps))
        result = {"machine": asdict(machine), "preset": arguments.preset, "steps": steps, "rows": rows}
    if arguments.json is not None:
        from diffratio_fast.storage.writing import replace_file

        replace_file(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command.run(main)
