"""Several processes against one: samples per second of all together, and by how much their losses differ.

    python benchmarks/scale.py

ATC in fp32 under torchrun with 1, 2, 4 and 8 processes, as many as there are GPUs, or cores, which they then share: the
full network on GPUs, a quarter of the width on a CPU.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ALLOCATOR, ROOT, ROUNDS, begin, median, record, shown, start, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

UNITS = torch.cuda.device_count() or os.cpu_count()
BATCH, SMALL = (512, "") if torch.cuda.is_available() else (64, "--width-multiplier 0.25 --blocks 1 1 1 1")
ARGUMENTS = f"--batch-size {BATCH} --games pong freeway --precision fp32 --log-every 1 {SMALL}"
STEPS = 4 + 4 * ROUNDS + 1  # the first four warm up


def run(folder: str, processes: int) -> dict[str, list[float]]:
    """Samples per second of all processes, in stretches of 4 steps, and the losses of the steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "pretrain_atc.py"), *ARGUMENTS.split(), "--total-steps", str(STEPS)]
    command += ["--run-name", str(processes)]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    subprocess.run(command, cwd=folder, env=os.environ | ALLOCATOR | threads, stdout=sys.stderr, check=True)
    events = EventAccumulator(str(Path(folder, "runs", str(processes))), {"scalars": 0})
    events.Reload()
    losses = events.Scalars("losses/loss")
    times = [event.wall_time for event in losses[3:-1:4]]  # the last step has an evaluation after it
    rates = [4 * BATCH / (after - before) for before, after in itertools.pairwise(times)]
    return {"samples per second": rates, "losses": [event.value for event in losses]}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = {n: run(folder, n) for n in (1, 2, 4, 8) if n <= UNITS}
    one = found[1]
    for n, figures in found.items():
        rates = figures["samples per second"]
        differences = [abs(a - b) / b for a, b in zip(figures["losses"], one["losses"], strict=True)]
        row = [str(n), shown(rates), f"{median(rates) / median(one['samples per second']):.2f}"]
        rows.append([*row, f"{differences[0]:.1e}", f"{max(differences):.1e}"])
    header = ["processes", "samples/s", "over one", "relative difference of the first loss", f"of {STEPS}, at most"]
    table(f"pretrain_atc.py {ARGUMENTS}", header, rows)
    record("scale", found)


if __name__ == "__main__":
    start([], main)
