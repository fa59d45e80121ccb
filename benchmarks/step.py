"""Where the time and memory of a training step go, for every pre-training script: full ResNet-50, batch 16, CPU.

    python benchmarks/step.py                   all scripts; appends the figures to benchmarks/step.json
    python benchmarks/step.py atc mae

Each script runs in a process of its own, 2 steps to warm up, 5 by the clock and 5 under torch's profiler, done as its
training loop does them; then in another process the plain way, in fp32 without channels_last. What the backward pass
does belongs to the networks if the operation of the forward pass that it differentiates does.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parent.parent
BATCH, WARM_UP, STEPS = 16, 2, 5
GAMES = ("ms_pacman", "breakout", "freeway", "road_runner")


def load(script: str):
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
    """Time per step by what it was spent on."""

    def total(chosen) -> float:
        return sum(event.time_range.elapsed_us() for event in chosen) / 1e3 / STEPS

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


def measure(name: str, plain: bool, cache: Path) -> dict:
    """One script's figures: milliseconds per step, and peak memory of the process in GB."""
    module = load(f"pretrain_{name}")
    args = module.Args(batch_size=BATCH, games=GAMES, cache_dir=cache, play_rows=200)
    shards = module.prepare(args, args.games, 0)
    device = torch.device("cpu")
    torch.manual_seed(0)
    objective = module.Objective(args)
    if not plain:
        objective.to(memory_format=torch.channels_last)
    precision = module.autocast(device, "fp32" if plain else "auto")
    data = module.Windows(shards, objective.length, BATCH, 0, "train")
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    adam = dict(lr=args.learning_rate, betas=args.betas, eps=args.adam_eps, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(parameters, **adam, fused=True)
    label_networks(objective)

    def step(i: int) -> None:
        batch = module.on_device(data[i], device)
        with record_function("forward"), precision:
            loss, _ = objective(batch)
        loss.backward()
        with record_function("clip"):
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        with record_function("optimizer"):
            optimizer.step()
        optimizer.zero_grad()
        with record_function("momentum"):
            if hasattr(objective, "update_target"):
                objective.update_target(i)

    for i in range(WARM_UP):
        step(i)
    start = time.perf_counter()
    for i in range(STEPS):
        step(WARM_UP + i)
    found = {"step": (time.perf_counter() - start) / STEPS * 1e3}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found["peak_gb"] = int(peak.split()[1]) / 1024**2
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(STEPS):
            step(WARM_UP + STEPS + i)
    return found | milliseconds(profiler.events())


def main(names: list[str]) -> None:
    names = names or sorted(path.stem.removeprefix("pretrain_") for path in ROOT.glob("pretrain_*.py"))
    print(f"batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds a step\n")
    print("| script | step | networks | objective | momentum | clip | AdamW | outside | peak | plain step, peak |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            for plain in ("", "plain"):
                command = [sys.executable, __file__, "--measure", name, plain, cache]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rows[name, plain] = json.loads(output.splitlines()[-1])
            row, other = rows[name, ""], rows[name, "plain"]
            parts = [row[part] for part in ("networks", "objective", "momentum", "clip", "optimizer")]
            print(
                f"| {name} | {row['step']:.0f} | {' | '.join(f'{part:.0f}' for part in parts)} | "
                f"{(1 - parts[0] / sum(parts)):.1%} | {row['peak_gb']:.2f} GB | "
                f"{other['step']:.0f}, {other['peak_gb']:.2f} GB |",
                flush=True,
            )
    content = {"time": time.strftime("%Y-%m-%d %H:%M"), "machine": platform.machine(), "cpus": os.cpu_count()}
    content |= {"batch": BATCH, "threads": torch.get_num_threads(), "torch": torch.__version__}
    content["figures"] = [{"script": name, "plain": bool(plain)} | row for (name, plain), row in rows.items()]
    with open(ROOT / "benchmarks" / "step.json", "a") as file:
        file.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3] == "plain", Path(sys.argv[4]))))
    else:
        main(sys.argv[1:])
