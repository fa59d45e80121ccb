"""Does Rainbow learn? Freeway with the Nature CNN on a CPU, 12,000 agent steps, three seeds, against fixed players.

    python benchmarks/rainbow_learning.py        about 6 minutes a seed on 2 cores; what is done already is kept

Trained is by record_replay.py. Prints a table; writes docs/rainbow-freeway.png and appends the figures to
benchmarks/rainbow_learning.json. The numbers are those of fine-tuning, but for shorter exploration, half an update a
step and a learning rate for so short a run.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
from common import ROOT, load
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = ROOT / "runs" / "rainbow_learning"
GAME, SEEDS = "freeway", (0, 1, 2)
SETTINGS = """--data-dir data --total-steps 12000 --steps-per-checkpoint 12000 --rows-per-checkpoint 0
    --replay-capacity 12000 --learning-starts 1000 --exploration-steps 3000 --exploration-final 0.01
    --updates-per-step 0.5 --learning-rate 2.5e-4""".split()


def main() -> None:
    module = load("finetune_rainbow")  # for its evaluation
    players = {"random": 1.0, "always up": 0.001}  # and their epsilon; up is action 1 of 3
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{GAME}: mean (least-greatest) of 20 games, or of the last two in training\n")
    print("| player | score | minutes |\n|---|---|---|")
    figures = {}
    for (name, epsilon), style in zip(players.items(), ("--", ":"), strict=True):
        args = module.Args(GAME, eval_episodes=20, epsilon=epsilon)
        scores, _ = module.play_episodes(GAME, lambda stacks, *_: np.tile([0, 1, 0], (len(stacks), 1)), args)
        figures[name] = scores.tolist()
        axes.axhline(scores.mean(), color="black", linestyle=style, label=f"{name}, 20 episodes")
        print(f"| {name} | {scores.mean():.2f} ({scores.min():g}-{scores.max():g}) | |", flush=True)
    for seed in SEEDS:
        command = [sys.executable, ROOT / "record_replay.py", "--game", GAME, "--seed", str(seed), *SETTINGS]
        subprocess.run(command, cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
        events = EventAccumulator(str(FOLDER / "runs" / f"record_replay__{GAME}__{seed}"))
        events.Reload()
        returns = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
        clock = [event.wall_time for event in events.Scalars("losses/loss")]
        scores, minutes = np.array([score for _, score in returns[-2:]]), (clock[-1] - clock[0]) / 60
        figures[f"seed {seed}"] = {"returns": returns, "minutes": minutes}
        print(f"| seed {seed} | {scores.mean():.2f} ({scores.min():g}-{scores.max():g}) | {minutes:.1f} |", flush=True)
        axes.plot(*zip(*returns, strict=True), marker="o", label=f"Rainbow, seed {seed}, in training")
    axes.set(xlabel="agent steps", ylabel="score of a game", title=f"{GAME}, Nature CNN")
    axes.legend()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / f"rainbow-{GAME}.png", dpi=110)
    content = {"time": time.strftime("%Y-%m-%d %H:%M"), "cpus": os.cpu_count(), "settings": SETTINGS} | figures
    with open(ROOT / "benchmarks" / "rainbow_learning.json", "a") as file:
        file.write(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
