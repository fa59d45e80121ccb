"""A training step of every pre-training script with the full ResNet-50: ours, the plain way, and the machine's limit.

    python benchmarks/step.py             all scripts, on the GPU if there is one
    python benchmarks/step.py atc mae

All ways do what the training loop does with a batch. On a GPU, at the script's own batch size: ours is the script's
default (bfloat16, compiled, channels_last, fused AdamW); the plain way is what the original code does (eager, float16
with a GradScaler, contiguous, AdamW not fused); the ceiling is ours without the norms. Scripts are compiled four at a
time, then timed one after the other. On a CPU, 16 samples: ours is the script's default, the plain way is in fp32 and
contiguous, and "share" is a step's floating-point operations per second over those of two 3x3 convolutions alone in
the same precision (64 channels on 42 x 42 pixels, 256 on 11 x 11, forward and backward).
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import (
    ALLOCATOR,
    DEVICE,
    ROOT,
    ROUNDS,
    begin,
    figures_of,
    in_new_process,
    load,
    median,
    memory,
    record,
    shown,
    start,
    start_process,
    table,
    take_turns,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ON_GPU = DEVICE.type == "cuda"
GAMES = ["ms_pacman", "breakout", "freeway", "road_runner"]
CPU_BATCH = 16
CONVOLUTIONS = ((64, 42), (256, 11))  # channels, pixels a side
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, without sparsity


class Trainer:
    """A script's objective, and its training step in one of the ways."""

    def __init__(self, name: str, way: str, cache: str):
        self.module = load(f"pretrain_{name}")
        if way == "ceiling":
            self.module.Norm = lambda channels: nn.Identity()
        args = self.module.Args(cache_dir=Path(cache))
        if not ON_GPU:
            args.batch_size = CPU_BATCH // 8 if name == "dt" else CPU_BATCH
        shards, _ = self.module.prepare(args, GAMES, args.rows_per_checkpoint)
        torch.manual_seed(0)
        self.objective = self.module.Objective(args).to(DEVICE)
        _, self.precision = self.module.set_up_device(DEVICE.type, "auto", compiles=False)
        if way != "plain":
            self.objective.to(memory_format=torch.channels_last)
        else:
            self.precision = torch.autocast(DEVICE.type, torch.float16, enabled=ON_GPU)
        data = self.module.Windows(shards, self.objective.length, args.batch_size, 0, "train")
        self.batches = [data.batch(i) for i in range(4)]
        self.learned = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        adam = dict(lr=args.learning_rate, betas=args.betas, eps=args.adam_eps, weight_decay=args.weight_decay)
        self.optimizer = torch.optim.AdamW(self.learned, **adam, **({} if way == "plain" else {"fused": True}))
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=way == "plain" and ON_GPU)
        self.model = torch.compile(self.objective) if ON_GPU and way != "plain" else self.objective
        self.args, self.steps = args, 0

    def step(self) -> None:
        batch = self.module.unpack(*self.batches[self.steps % 4], DEVICE)
        with self.precision:
            loss, _ = self.model(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.learned, self.args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.objective.update_target(self.steps)
        self.steps += 1

    def seconds(self, steps: int = 1) -> float:
        wait()
        clock = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait()
        return (time.perf_counter() - clock) / steps

    def operations(self) -> int:
        """Of a sample, forward and backward, in FLOP."""
        rows, game_id = self.batches[0]
        with FlopCounterMode(display=False) as counter, self.precision:
            self.objective(self.module.unpack(rows[:1], game_id[:1], DEVICE))[0].backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# === on a GPU =========================================================================================================
def on_gpu(name: str, cache: str) -> dict:
    """Compiles, says so, waits for a line, then times: samples per second, GB, GFLOP a sample, seconds to compile."""
    trainers = {way: Trainer(name, way, cache) for way in ("ours", "ceiling")}
    operations = trainers["ours"].operations()
    seconds = {way: trainer.seconds() for way, trainer in trainers.items()}
    torch.cuda.empty_cache()
    print("compiled", flush=True)
    input()
    trainers["plain"] = Trainer(name, "plain", cache)

    def measure(way: str) -> dict[str, float]:
        torch.cuda.empty_cache()  # of the way before
        trainers[way].seconds(2)
        torch.cuda.reset_peak_memory_stats()
        rate = trainers[way].args.batch_size / trainers[way].seconds(6)
        return {"samples per second": rate, "GB": torch.cuda.max_memory_allocated() / 1e9}

    ways = take_turns({way: partial(measure, way) for way in ("ours", "plain", "ceiling")}, rounds=3)
    batch_size = trainers["ours"].args.batch_size
    return {"gigaflop": operations / 1e9, "compiling": seconds, "batch size": batch_size, "ways": ways}


def compile_first(call: list):
    """A process that has compiled and waits."""
    process = start_process(call, TORCHINDUCTOR_COMPILE_THREADS=str(max(1, os.cpu_count() // 4)))
    for line in process.stdout:
        if line == "compiled\n":
            break
    return process


def gpu_table(names: list[str], cache: str) -> dict:
    names = sorted(names, key=lambda name: name != "siammae")  # compiled first and timed last: it needs most memory
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in torch.cuda.get_device_name()), float("nan"))
    figures, rows = {}, []
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"  # nothing is compiled already
    with ThreadPoolExecutor(4) as pool:
        processes = list(pool.map(compile_first, [["on_gpu", name, cache] for name in names]))
    for name, process in reversed(list(zip(names, processes, strict=True))):
        found = figures[name] = figures_of(process)
        rates = {way: of["samples per second"] for way, of in found["ways"].items()}
        ours, plain, ceiling = (median(rates[way]) for way in ("ours", "plain", "ceiling"))
        row = [name, str(found["batch size"]), *map(shown, rates.values()), f"{ours / plain:.2f}"]
        row += [f"{ours / ceiling:.0%}", f"{found['gigaflop'] * 1e9 * ours / peak:.1%}"]
        row.append(f"{found['compiling']['ours']:.0f}")
        rows.append(row + [f"{max(found['ways'][way]['GB']):.1f}" for way in ("ours", "plain")])
    header = ["script", "batch", "ours, samples/s", "plain", "ceiling", "ours / plain (target 3.4)"]
    header += ["ours / ceiling (target 62%)", "MFU", "s to compile", "ours, GB", "plain, GB"]
    table("Steps at the scripts' own batch sizes", header, sorted(rows))
    return figures


# === on a CPU =========================================================================================================
def convolution_rate(dtype: torch.dtype) -> float:
    """FLOP per second of the two convolutions alone, each as long as the other."""
    rates = []
    for channels, side in CONVOLUTIONS:
        x = torch.randn(CPU_BATCH, channels, side, side, dtype=dtype, requires_grad=True)
        x = x.to(memory_format=torch.channels_last)
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
        convolution.to(memory_format=torch.channels_last)
        gradient = torch.randn_like(x)
        convolution(x).backward(gradient)  # warms up
        clock = time.perf_counter()
        for _ in range(3):
            convolution(x).backward(gradient)
        operations = 3 * 3 * 2 * CPU_BATCH * side**2 * channels**2 * 9  # 3 repetitions, forward and twice backward
        rates.append(operations / (time.perf_counter() - clock))
    return 2 / sum(1 / rate for rate in rates)


def on_cpu(name: str, cache: str) -> dict:
    """Samples per second and share of the convolutions' rate of both ways, and the FLOP of a sample."""
    trainers = {way: Trainer(name, way, cache) for way in ("ours", "plain")}
    operations = trainers["plain"].operations()

    def figures(way: str) -> dict[str, float]:
        trainer = trainers[way]
        rate = trainer.args.batch_size / trainer.seconds()
        with trainer.precision:
            half = torch.is_autocast_enabled("cpu")
        of_convolutions = convolution_rate(torch.bfloat16 if half else torch.float32)
        return {"samples per second": rate, "share": operations * rate / of_convolutions}

    for trainer in trainers.values():
        trainer.seconds()
    return {"gigaflop": operations / 1e9, "ways": take_turns({way: partial(figures, way) for way in trainers})}


def allocated(cache: str) -> dict:
    """Samples per second of ATC, for the allocator's settings that this process has, and the peak of its memory."""
    trainer = Trainer("atc", "ours", cache)
    trainer.seconds(2)
    return {"samples per second": [CPU_BATCH / trainer.seconds() for _ in range(ROUNDS)], "GB": memory("VmHWM")}


def cpu_tables(names: list[str], cache: str) -> dict:
    figures, rows = {}, []
    for name in names:
        found = figures[name] = in_new_process(["on_cpu", name, cache], **ALLOCATOR)
        ours, plain = (found["ways"][way] for way in ("ours", "plain"))
        ratio = median(ours["samples per second"]) / median(plain["samples per second"])
        row = [name, f"{found['gigaflop']:.1f}", *(shown(of["samples per second"]) for of in (ours, plain))]
        rows.append([*row, f"{ratio:.2f}", f"{median(ours['share']):.0%}", f"{median(plain['share']):.0%}"])
    header = ["script", "GFLOP a sample", "ours, samples/s", "plain, samples/s", "ours / plain (target 2)"]
    header += ["ours, share (target 55%)", "plain, share"]
    table(f"Steps of {CPU_BATCH} samples (DT: {CPU_BATCH // 8} of 8 stacks) on the CPU", header, rows)

    rows = []
    for setting, environment in {"default": {}, "as recommended": ALLOCATOR}.items():
        found = figures[f"allocator, {setting}"] = in_new_process(["allocated", cache], **environment)
        rows.append([setting, shown(found["samples per second"]), f"{found['GB']:.2f}"])
    table("ATC by the allocator's settings", ["settings", "samples/s", "peak GB"], rows)
    return figures


def main(names: list[str]) -> None:
    names = names or sorted(path.stem.removeprefix("pretrain_") for path in ROOT.glob("pretrain_*.py"))
    begin(__doc__.partition("\n")[0], 3 if ON_GPU else ROUNDS)
    with tempfile.TemporaryDirectory() as cache:
        module = load("pretrain_atc")
        module.prepare(module.Args(cache_dir=Path(cache)), GAMES, rows=1)  # plays them
        record("step", (gpu_table if ON_GPU else cpu_tables)(names, cache))


if __name__ == "__main__":
    start([on_gpu, on_cpu, allocated], main)
