"""What the benchmarks share: importing a script, runs that take turns, processes of their own, tables and records.

A measurement is a function of a benchmark that returns figures as JSON has them. Where memory or the allocator matters,
it is called in a process of its own.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALLOCATOR = {  # glibc's settings: freed memory, up to 16 GB, is used again; it is asked for by 64 MB, in huge pages
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864"
    ":glibc.malloc.hugetlb=1"
}


def load(name: str):
    """A script as a module, imported as nobody would but a benchmark or a test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def memory(kind: str) -> float:
    """This process's memory in GB, of a kind in /proc/self/status: VmHWM is the most it had, RssAnon is its own."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024**2


def start_process(call: list, **environment: str) -> subprocess.Popen:
    """Starts a measurement, `call` is its name and arguments, of this benchmark in a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("GLIBC_", "MALLOC_"))}
    command = [sys.executable, sys.argv[0], "--measure", json.dumps(call)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=inherited | environment, **pipes)


def figures_of(process: subprocess.Popen) -> dict:
    """Sends the process a line, for which it may wait, and returns its figures."""
    printed, _ = process.communicate("\n")
    if process.returncode:
        raise SystemExit(f"{process.args} failed")
    return json.loads(printed.splitlines()[-1])


def in_new_process(call: list, **environment: str) -> dict:
    return figures_of(start_process(call, **environment))


def take_turns(ways: dict, rounds: int = ROUNDS) -> dict[str, dict[str, list[float]]]:
    """The figures of every way, a function of no arguments, in lists of one for each round; the ways take turns."""
    found = {way: {} for way in ways}
    for _ in range(rounds):
        for way, measure in ways.items():
            for name, value in measure().items():
                found[way].setdefault(name, []).append(value)
    return found


def shown(values: list[float]) -> str:
    """Median (least-greatest), to three digits."""
    low, middle, high = (f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in (min(values), median(values), max(values)))
    return f"{middle} ({low}-{high})"


def median(values: list[float]) -> float:
    return statistics.median(values)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} cores of {name}"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def begin(what: str, rounds: int = ROUNDS) -> None:
    print(f"{what}\n\n{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {rounds}")
    print("alternating runs (least-greatest)\n", flush=True)


def record(name: str, figures: dict) -> None:
    """Appends the figures, each run's, to benchmarks/<name>.json, a line of JSON for each call."""
    content = {"time": time.strftime("%Y-%m-%d %H:%M"), "machine": processor(), "torch": torch.__version__}
    with open(ROOT / "benchmarks" / f"{name}.json", "a") as file:
        file.write(json.dumps(content | figures) + "\n")


def start(measurements: list, main) -> None:
    """Runs the benchmark, or the one measurement that `start_process` asks for."""
    if sys.argv[1:2] == ["--measure"]:
        name, *arguments = json.loads(sys.argv[2])
        print(json.dumps({function.__name__: function for function in measurements}[name](*arguments)))
    else:
        main(sys.argv[1:])
