"""Several processes against one, checkpoints, and what it costs to resume.

    python benchmarks/scale.py

ATC of a quarter of the width, batch 64, fp32, under torchrun with 1, 2 and as many more processes as there are cores
(or GPUs) for, which share the cores: samples per second of all together, in five stretches of four steps, and by how
much the losses differ from those of one process. Then the checkpoint of a full ResNet-50 with its optimizer's state:
its size, the time to write it, and the time to check and read it, which is what --resume adds to a run's start.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ALLOCATOR, ROOT, ROUNDS, begin, in_new_process, load, median, record, shown, start, table, take_turns
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = "--width-multiplier 0.25 --blocks 1 1 1 1 --batch-size 64 --games pong freeway --precision fp32 --log-every 1"
STEPS = 4 + 4 * ROUNDS + 1  # the first four warm up
UNITS = torch.cuda.device_count() or os.cpu_count()


def run(folder: str, processes: int) -> dict[str, list[float]]:
    """Samples per second of all processes, in stretches of 4 steps, and the losses of the steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "pretrain_atc.py"), *SMALL.split(), "--total-steps", str(STEPS)]
    command += ["--run-name", str(processes)]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    subprocess.run(command, cwd=folder, env=os.environ | ALLOCATOR | threads, capture_output=True, check=True)
    events = EventAccumulator(f"{folder}/runs/{processes}", {"scalars": 0})
    events.Reload()
    losses = events.Scalars("losses/loss")
    times = [event.wall_time for event in losses[3:-1:4]]  # the last step has an evaluation after it
    rates = [4 * 64 / (after - before) for before, after in itertools.pairwise(times)]
    return {"samples per second": rates, "losses": [event.value for event in losses]}


def checkpoints(name: str, folder: str) -> dict:
    """Gigabytes of a script's checkpoint, and seconds to write and to read it."""
    module = load(f"pretrain_{name}")
    args = module.Args(batch_size=2, games=("pong",), cache_dir=Path(folder, "cache"), play_rows=200)
    data = module.prepare(args, args.games, 0)
    objective = module.Objective(args)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    batch = module.Windows(data, objective.length, 2, 0, "train")[0]
    objective(module.on_device(batch, torch.device("cpu")))[0].backward()
    optimizer.step()
    path, plain_args = Path(folder, f"{name}.pt"), {"games": ["pong"]}

    def write() -> dict[str, float]:
        clock = time.perf_counter()
        module.save_checkpoint(path, objective, optimizer, 1, plain_args)
        return {"seconds": time.perf_counter() - clock}

    def read() -> dict[str, float]:
        clock = time.perf_counter()
        module.load_checkpoint(path, objective, optimizer, plain_args)
        return {"seconds": time.perf_counter() - clock}

    return take_turns({"write": write, "read": read}) | {"gigabytes": path.stat().st_size / 1e9}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        numbers = [n for n in (1, 2, 4, 8) if n <= UNITS]
        found = figures["processes"] = {n: run(folder, n) for n in numbers}
        for n in numbers:
            pairs = zip(found[n]["losses"], found[1]["losses"], strict=True)
            differences = [abs(loss - one) / one for loss, one in pairs]
            rates = found[n]["samples per second"]
            ratio = median(rates) / median(found[1]["samples per second"])
            rows.append([str(n), shown(rates), f"{ratio:.2f}", f"{max(differences):.1e}"])
            rows[-1].append(f"{differences[0]:.1e}")
        header = ["processes", "samples/s", "over one", f"largest relative difference of a loss in {STEPS} steps"]
        header += ["at the first step"]
        table(f"pretrain_atc.py {SMALL}", header, rows)

        rows = []
        for name in ("atc", "mae", "dt"):
            found = figures[f"checkpoint, {name}"] = in_new_process(["checkpoints", name, folder])
            row = [name, f"{found['gigabytes']:.2f}"]
            rows.append([*row, *(shown(found[action]["seconds"]) for action in ("write", "read"))])
        table("Checkpoints of the full ResNet-50", ["script", "GB", "seconds to write", "seconds to read"], rows)
    record("scale", figures)


if __name__ == "__main__":
    start([checkpoints], main)
