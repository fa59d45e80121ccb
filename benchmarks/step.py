"""A training step of every pre-training script: full ResNet-50, batch 16, against the plain way and the machine.

    python benchmarks/step.py                   all scripts, on the GPU if there is one
    python benchmarks/step.py atc mae
    python benchmarks/step.py --profile atc     where the step's time goes

All ways do what the training loop does with a batch. The plain one computes in fp32 and in contiguous format, with
PyTorch's defaults for AdamW. "Share" is a step's floating-point operations per second over those of convolutions alone
in the same precision, timed between the steps: 3x3, of 64 channels on 42 x 42 pixels and of 256 on 11 x 11, forward and
backward. On CUDA, a second table has the memory at batch 512, and compiled steps.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import (
    ALLOCATOR,
    ROOT,
    ROUNDS,
    begin,
    in_new_process,
    load,
    median,
    peak_memory,
    record,
    shown,
    start,
    table,
    take_turns,
)
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

BATCH, PROFILED = 16, 5  # samples of a step; steps to profile
GAMES = ("ms_pacman", "breakout", "freeway", "road_runner")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONVOLUTIONS = ((64, 42), (256, 11))  # channels, pixels a side


class Trainer:
    """A script's objective, and its training step in one of the ways."""

    def __init__(self, name: str, way: str, cache: str, batch_size: int = 0, compiled: bool = False):
        self.module, self.batch_size = load(f"pretrain_{name}"), batch_size or (BATCH // 8 if name == "dt" else BATCH)
        args = self.module.Args(batch_size=self.batch_size, games=GAMES, cache_dir=Path(cache), play_rows=200)
        shards = self.module.prepare(args, args.games, 0)
        torch.manual_seed(0)
        self.objective = self.module.Objective(args).to(DEVICE)
        if way != "plain":
            self.objective.to(memory_format=torch.channels_last)
        self.precision = self.module.autocast(DEVICE, "auto" if way == "ours" else "fp32")
        self.data = self.module.Windows(shards, self.objective.length, self.batch_size, 0, "train")
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        adam = dict(lr=args.learning_rate, betas=args.betas, eps=args.adam_eps, weight_decay=args.weight_decay)
        self.optimizer = torch.optim.AdamW(self.parameters, **adam, **({} if way == "plain" else {"fused": True}))
        self.max_grad_norm, self.steps = args.max_grad_norm, 0
        self.model = torch.compile(self.objective) if compiled else self.objective

    def step(self) -> None:
        batch = self.module.on_device(self.data[self.steps], DEVICE)
        with record_function("forward"), self.precision:
            loss, _ = self.model(batch)
        loss.backward()
        with record_function("clip"):
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        with record_function("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        with record_function("momentum"):
            if hasattr(self.objective, "update_target"):
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
        sample = {name: value[:1] for name, value in self.module.on_device(self.data[0], DEVICE).items()}
        with FlopCounterMode(display=False) as counter, self.precision:
            self.objective(sample)[0].backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def convolution_rate(dtype: torch.dtype) -> float:
    """FLOP per second of the two convolutions alone, each as long as the other."""
    rates = []
    for channels, side in CONVOLUTIONS:
        x = torch.randn(BATCH, channels, side, side, device=DEVICE, dtype=dtype, requires_grad=True)
        x = x.to(memory_format=torch.channels_last)
        convolution = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(DEVICE, dtype)
        convolution.to(memory_format=torch.channels_last)
        gradient = torch.randn_like(x)
        for repetition in range(4):
            if repetition == 1:  # the first one warms up
                wait()
                clock = time.perf_counter()
            convolution(x).backward(gradient)
        wait()
        operations = 3 * 3 * 2 * BATCH * side**2 * channels**2 * 9  # 3 repetitions, forward and twice backward
        rates.append(operations / (time.perf_counter() - clock))
    return 2 / sum(1 / rate for rate in rates)


def measure(name: str, cache: str) -> dict:
    """Images per second and share of the convolution rate of both ways, and the FLOP of a sample."""
    trainers = {way: Trainer(name, way, cache) for way in ("ours", "plain")}
    operations = trainers["plain"].operations()

    def figures(way: str) -> dict[str, float]:
        trainer = trainers[way]
        rate = trainer.batch_size / trainer.seconds()
        with trainer.precision:
            half = torch.is_autocast_enabled(DEVICE.type)
        of_convolutions = convolution_rate(torch.bfloat16 if half else torch.float32)
        return {"samples per second": rate, "share": operations * rate / of_convolutions}

    for trainer in trainers.values():
        trainer.seconds()
    return {"gigaflop": operations / 1e9, "ways": take_turns({way: partial(figures, way) for way in trainers})}


def allocated(cache: str) -> dict:
    """Samples per second of ATC, for the allocator's settings that this process has, and the peak of its memory."""
    trainer = Trainer("atc", "ours", cache)
    trainer.seconds(2)
    return {"samples per second": [BATCH / trainer.seconds() for _ in range(ROUNDS)], "GB": peak_memory()}


def on_cuda(name: str, cache: str, compiled: bool) -> dict:
    """Samples per second, FLOP per second and peak memory at batch 512; whether norms keep channels_last."""
    trainer = Trainer(name, "ours", cache, batch_size=512, compiled=compiled)
    operations = trainer.operations()
    formats = []
    norms = [module for module in trainer.objective.modules() if isinstance(module, torch.nn.GroupNorm)]
    hooks = [norm.register_forward_hook(lambda _, inputs, output: formats.append(output)) for norm in norms]
    if not compiled:
        trainer.step()
    kept = [x.is_contiguous(memory_format=torch.channels_last) for x in formats if x.dim() == 4]
    for hook in hooks:
        hook.remove()
    formats.clear()
    trainer.seconds(3)
    torch.cuda.reset_peak_memory_stats()
    rates = [512 / trainer.seconds(4) for _ in range(ROUNDS)]
    memory = torch.cuda.max_memory_allocated() / 1e9
    return {"samples per second": rates, "teraflops": median(rates) * operations / 1e12, "GB": memory, "kept": kept}


# === where the time goes ==============================================================================================
def label_networks(objective: torch.nn.Module) -> None:
    """Wraps all that the networks compute into a range `networks` of the profile."""

    def labelled(function):
        def call(*args, **kwargs):
            with record_function("networks"):
                return function(*args, **kwargs)

        return call

    parts = [objective.backbone, objective.neck, objective.head, *getattr(objective, "target", {}).values()]
    for part in parts:
        for name in ("forward", "tokens", "features", "roll_out", "actions"):  # whichever it has
            if hasattr(part, name):
                setattr(part, name, labelled(getattr(part, name)))


def milliseconds(events: list) -> dict[str, float]:
    """Time per step by what it was spent on.

    What the backward pass does belongs to the networks if the forward operation that it differentiates does.
    """

    def total(chosen) -> float:
        return sum(event.time_range.elapsed_us() for event in chosen) / 1e3 / PROFILED

    labels = ("forward", "clip", "optimizer", "momentum")
    found = {label: total(event for event in events if event.name == label) for label in labels}
    ranges = [event.time_range for event in events if event.name == "networks"]
    of_networks = {
        event.sequence_nr
        for event in events
        if event.sequence_nr >= 0 and any(r.start <= event.time_range.start <= r.end for r in ranges)
    }
    backward = [event for event in events if event.name.startswith("autograd::engine::evaluate_function")]
    own = [event for event in backward if event.sequence_nr in of_networks or event.name.endswith("AccumulateGrad")]
    networks_forward = total(event for event in events if event.name == "networks")
    found["networks"] = networks_forward + total(own)
    found["objective"] = found.pop("forward") - networks_forward + total(backward) - total(own)
    return found


def profiled(name: str, cache: str) -> dict[str, float]:
    trainer = Trainer(name, "ours", cache)
    label_networks(trainer.objective)
    found = {"step": trainer.seconds(2) * 1e3, "GB": peak_memory()}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            trainer.step()
    return found | milliseconds(profiler.events())


# === tables ===========================================================================================================
def main(names: list[str]) -> None:
    to_profile = names[:1] == ["--profile"]
    names = names[to_profile:] or sorted(path.stem.removeprefix("pretrain_") for path in ROOT.glob("pretrain_*.py"))
    begin(__doc__.partition("\n")[0])
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        if to_profile:
            for name in names:
                figures[name] = in_new_process(["profiled", name, cache], **ALLOCATOR)
            parts = ["step", "networks", "objective", "momentum", "clip", "optimizer", "GB"]
            rows = [[name, *(f"{found[part]:.3g}" for part in parts)] for name, found in figures.items()]
            table("Milliseconds of a step, and the peak of memory", ["script", *parts], rows)
            return
        rows = []
        for name in names:
            found = figures[name] = in_new_process(["measure", name, cache], **ALLOCATOR)
            ours, plain = (found["ways"][way] for way in ("ours", "plain"))
            ratio = median(ours["samples per second"]) / median(plain["samples per second"])
            row = [name, f"{found['gigaflop']:.1f}", *(shown(of["samples per second"]) for of in (ours, plain))]
            row += [f"{ratio:.2f}", f"{median(ours['share']):.0%}", f"{median(plain['share']):.0%}"]
            rows.append(row)
        header = ["script", "GFLOP a sample", "ours, samples/s", "plain, samples/s", "ours / plain (target 2)"]
        header += ["ours, share (target 55%)", "plain, share"]
        table(f"Steps of {BATCH} samples (DT: {BATCH // 8} of 8 stacks), {DEVICE.type}", header, rows)

        if DEVICE.type == "cpu":
            settings = {"default": {}, "as recommended": ALLOCATOR}
            rows = []
            for setting, environment in settings.items():
                found = figures[f"allocator, {setting}"] = in_new_process(["allocated", cache], **environment)
                rows.append([setting, shown(found["samples per second"]), f"{found['GB']:.2f}"])
            table("ATC by the allocator's settings", ["settings", "samples/s", "peak GB"], rows)
            print("CUDA (MFU, memory at batch 512, compiled steps, format of norms): not measured, there is no GPU.\n")
        else:
            rows, module = [], load("pretrain_atc")
            peak = next((p for n, p in module.PEAK_FLOPS.items() if n in torch.cuda.get_device_name()), float("nan"))
            for name in names:
                for compiled in (False, True):
                    found = in_new_process(["on_cuda", name, cache, compiled])
                    figures[f"{name}, batch 512, {compiled=}"] = found
                    row = [name, str(compiled), shown(found["samples per second"]), f"{found['teraflops']:.0f}"]
                    row += [f"{found['teraflops'] * 1e12 / peak:.0%}", f"{found['GB']:.1f}"]
                    rows.append([*row, f"{sum(found['kept'])} of {len(found['kept'])}" if not compiled else ""])
            header = ["script", "compiled", "samples/s", "TFLOP/s", "MFU (target on an H100: 40%)", "GB"]
            table("Steps of 512 samples on CUDA", [*header, "norms that keep channels_last"], rows)
    record("step", figures)


if __name__ == "__main__":
    start([measure, allocated, on_cuda, profiled], main)
