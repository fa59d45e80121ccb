"""Does Rainbow learn? Freeway with the Nature CNN on a CPU, 12,000 agent steps, three seeds, against fixed players.

    python benchmarks/rainbow_learning.py        about 6 minutes a seed on 2 cores; what is done already is kept

Prints a table; writes docs/rainbow-freeway.png and appends the figures to benchmarks/rainbow_learning.json. The numbers
are the script's, but for shorter exploration, half an update a step and a learning rate for so short a run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "rainbow_learning"
GAME, SEEDS = "freeway", (0, 1, 2)
SETTINGS = """--encoder nature --precision fp32 --total-steps 12000 --learning-starts 1000 --exploration-steps 3000
    --updates-per-step 0.5 --learning-rate 2.5e-4 --eval-episodes 20""".split()


def load():
    spec = importlib.util.spec_from_file_location("finetune_rainbow", ROOT / "finetune_rainbow.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    play = load().play_episodes
    players = {"random": (None, 1.0), "always up": (lambda stacks: np.ones(len(stacks), int), 0.001)}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{GAME}, 20 episodes each: mean (least-greatest)\n\n| player | score | minutes |\n|---|---|---|")
    figures = {}
    for (name, (act, epsilon)), style in zip(players.items(), ("--", ":"), strict=True):
        scores, _ = play(GAME, act, 20, 27_000, epsilon, seed=0)
        figures[name] = scores.tolist()
        axes.axhline(scores.mean(), color="black", linestyle=style, label=f"{name}, 20 episodes")
        print(f"| {name} | {scores.mean():.2f} ({scores.min():g}-{scores.max():g}) | |", flush=True)
    for seed in SEEDS:
        command = [sys.executable, ROOT / "finetune_rainbow.py", "--game", GAME, "--seed", str(seed), *SETTINGS]
        subprocess.run(command, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((FOLDER / "results" / "rainbow" / "nature" / GAME / f"seed{seed}.json").read_text())
        events = EventAccumulator(str(FOLDER / "runs" / f"finetune_rainbow__nature__{GAME}__{seed}"))
        events.Reload()
        returns = [(event.step, event.value) for event in events.Scalars("charts/episode_return")]
        clock = [event.wall_time for event in events.Scalars("losses/loss")]
        scores, minutes = np.array(result["episode_scores"]), (clock[-1] - clock[0]) / 60
        figures[f"seed {seed}"] = {"scores": scores.tolist(), "returns": returns, "minutes": minutes}
        print(f"| seed {seed} | {scores.mean():.2f} ({scores.min():g}-{scores.max():g}) | {minutes:.1f} |", flush=True)
        (line,) = axes.plot(*zip(*returns, strict=True), marker="o", label=f"Rainbow, seed {seed}, in training")
        axes.plot(12_000, scores.mean(), marker="*", markersize=12, color=line.get_color())
    axes.set(xlabel="agent steps", ylabel="score of an episode", title=f"{GAME}; stars: evaluation, 20 episodes")
    axes.legend()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / f"rainbow-{GAME}.png", dpi=110)
    content = {"time": time.strftime("%Y-%m-%d %H:%M"), "cpus": os.cpu_count(), "settings": SETTINGS} | figures
    with open(ROOT / "benchmarks" / "rainbow_learning.json", "a") as file:
        file.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
