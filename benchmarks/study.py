"""The benchmark in small, from nothing: plays games, pre-trains, fine-tunes, and says what the scores tell.

    python benchmarks/study.py --scale gpu        about 25 minutes on an H100 with 16 cores
    python benchmarks/study.py --scale cpu        about an hour on 2 cores

1. data       Rainbow agents with the Nature CNN learn each game with sticky actions. What they play is the data.
2. pretrain   Each method pre-trains the same small ResNet on the ID games, on the same number of stacks of frames.
3. finetune   Behaviour cloning of each game whose agent is better than random play: from each checkpoint, from a random
              backbone (random) and from scratch (e2e). And linear probes of the checkpoints.
4. report     A page with settings, times, scores, IQM, probes, and what they say of the paper's claims (2406.06037).

The same command goes on where it was cut off: what is done is kept, and a pre-training goes on from its checkpoint.
Everything is written into --folder. The scripts run as processes of their own, --jobs at a time; what they print is in
logs/. Both times are estimates: these settings have not been run, and nothing of the study on a GPU.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from common import ROOT, load, processor
from tqdm import tqdm

eval_iqm = load("eval_iqm")
STACKS = {"curl": 1, "mae": 1, "atc": 2, "siammae": 2, "r3m": 3, "bc": 1, "spr": 5, "idm": 2, "spr_idm": 5, "dt": 8}
STACKS["cql"] = 2  # stacks of frames in a sample
SMALLER = {"spr": 4, "spr_idm": 4, "dt": 8}  # batches of long samples are smaller by this factor, as in the benchmark
GAMES = ("freeway", "boxing", "road_runner", "breakout", "seaquest", "pong", "surround")
SCALES = {
    "gpu": dict(width_multiplier=0.5, blocks=(2, 2, 2, 2), play_steps=50_000, updates_per_step=0.25, stacks=800_000)
    | dict(batch_size=512, transitions=5_000, epochs=10, episodes=20, episode_steps=1_000, seeds=3, jobs=10)
    | dict(games=GAMES, methods=tuple(STACKS)),
    "cpu": dict(width_multiplier=0.25, blocks=(1, 1, 1, 1), play_steps=6_000, updates_per_step=0.4, stacks=12_800)
    | dict(batch_size=64, transitions=1_000, epochs=5, episodes=10, episode_steps=500, seeds=2, jobs=2)
    | dict(games=GAMES, methods=("curl", "mae", "atc", "bc", "idm")),
}
CHECKPOINTS = 5  # of a replay


# === arguments ========================================================================================================
@dataclass
class Args:
    scale: Literal["gpu", "cpu"]  # gives the defaults of the other flags
    stage: Literal["all", "data", "pretrain", "finetune", "report"] = "all"  # the one to do; all: one after the other
    folder: Path = Path("study")  # for all that is made
    page: Path | None = None  # what the report writes, figures beside it; default: study.md in the folder
    data_dir: Path | None = None  # data by download_data.py to use instead of playing; it must have all the games
    games: tuple[str, ...] | None = None  # to fine-tune on; the ID games are those of pre-training, too
    methods: tuple[str, ...] | None = None  # to pre-train with, such as atc; random and e2e are always there
    seeds: int | None = None  # fine-tunings of each method on each game; a method is pre-trained once
    width_multiplier: float | None = None  # of all ResNets
    blocks: tuple[int, int, int, int] | None = None  # of all ResNets
    play_steps: int | None = None  # agent steps that a data agent plays, in 5 replay checkpoints
    updates_per_step: float | None = None  # updates of a data agent for each agent step
    stacks: int | None = None  # stacks of frames that a pre-training sees: steps x samples x stacks in a sample
    batch_size: int | None = None  # samples in a step; of pre-training: a quarter for spr and spr_idm, an eighth for dt
    learning_rate: float = 3e-4  # of pre-training; the paper's, some far lower, are for a thousand times the steps
    transitions: int | None = None  # rows of a game's last replay checkpoint to fine-tune on
    epochs: int | None = None  # of fine-tuning
    episodes: int | None = None  # of each evaluation
    episode_steps: int | None = None  # agent steps after which an episode is cut off, a data agent's, too
    jobs: int | None = None  # processes at a time
    resamples: int = 50_000  # bootstrap resamples of the report


# === processes ========================================================================================================
def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def run_all(args: Args, stage: str, tasks: dict[str, list]) -> int:
    """Runs the tasks that are left, args.jobs at a time, and returns their number. A task is done if it has a log."""
    logs = args.folder / "logs"
    left = {name: command for name, command in tasks.items() if not (logs / f"{name}.log").exists()}
    print(f"{stage}: {len(left)} of {len(tasks)} runs to do", flush=True)
    # Freed memory is kept for the next step: on a CPU that is faster.
    environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    environment["OMP_NUM_THREADS"] = str(max(os.cpu_count() // args.jobs, 1))

    def run(name: str) -> None:
        unfinished = logs / f"{name}.part"
        script, *flags = left[name]
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        with open(unfinished, "w") as log:
            options = dict(cwd=args.folder, env=environment | os.environ, stdout=log, stderr=subprocess.STDOUT)
            code = subprocess.run(command, **options).returncode
        if code:
            raise SystemExit(f"{script} failed:\n{unfinished.read_text()[-2000:]}\nAll it printed: {unfinished}")
        unfinished.rename(logs / f"{name}.log")

    logs.mkdir(parents=True, exist_ok=True)
    clock = time.time()
    with ThreadPoolExecutor(args.jobs) as pool, open(args.folder / "times.jsonl", "a") as times:
        for _ in tqdm(pool.map(run, left), stage, len(left), unit="run", disable=not left):
            times.write(json.dumps({"stage": stage, "seconds": time.time() - clock, "commit": commit()}) + "\n")
            times.flush()
            clock = time.time()
    return len(left)


# === stages ===========================================================================================================
def play(args: Args) -> int:
    """Data agents, whose replays are laid out as the DQN Replay Dataset, and random play in the same evaluation."""
    shared = ["finetune_rainbow.py", "--encoder", "nature", "--results", "agents"]
    shared += ["--eval-episodes", args.episodes, "--max-episode-steps", args.episode_steps]
    agent = ["--seed", 1, "--total-steps", args.play_steps, "--updates-per-step", args.updates_per_step]
    agent += ["--learning-starts", args.play_steps // 12, "--exploration-steps", args.play_steps // 4]
    agent += ["--exploration-final", 0.05, "--learning-rate", 2.5e-4, "--repeat-action-probability", 0.25]
    agent += ["--save-replay", "replay", "--save-replay-every", args.play_steps // CHECKPOINTS]
    random = ["--method", "random_play", "--epsilon", 1, "--total-steps", 12, "--learning-starts", 11]
    tasks = {f"play_{game}": [*shared, "--game", game, *agent] for game in args.games}
    tasks |= {f"random_{game}": [*shared, "--game", game, *random] for game in args.games}
    return run_all(args, "data", tasks)


def table(*rows: list) -> str:
    header, *rows = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def data_agents(args: Args) -> tuple[list[str], str]:
    """The games whose agent is better than random play, and a table of the scores."""
    if args.data_dir:
        return list(args.games), "Played by others."
    better, rows = [], [["game", "agent", "random play", "better than random play"]]
    for game in args.games:
        means, errors = [], []
        for player, seed in (("nature", 1), ("random_play", 0)):
            path = args.folder / f"agents/rainbow/{player}/{game}/seed{seed}.json"
            scores = json.loads(path.read_text())["episode_scores"]
            means.append(np.mean(scores))
            errors.append(np.std(scores, ddof=1) / np.sqrt(len(scores)))
        if means[0] - means[1] > 2 * np.hypot(*errors):
            better.append(game)
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in zip(means, errors, strict=True)]
        rows.append([game, *cells, "yes" if game in better else "**no**"])
    return better, table(*rows)


def data_and_network(args: Args, pretraining: bool) -> list:
    """Pre-training reads all of a replay's checkpoints, fine-tuning the last one. A file's last row is never read."""
    flags = ["--width-multiplier", args.width_multiplier, "--blocks", *args.blocks]
    if pretraining:
        flags += ["--games", *(game for game in args.games if game in eval_iqm.ID_GAMES)]
    if args.data_dir:
        return [*flags, "--data-dir", args.data_dir]
    flags += ["--data-dir", "replay", "--runs", 1, "--checkpoints"]
    if pretraining:
        return [*flags, *range(1, CHECKPOINTS + 1), "--rows-per-checkpoint", args.play_steps // CHECKPOINTS - 1]
    return [*flags, CHECKPOINTS]


def pretrain(args: Args) -> int:
    tasks = {}
    for method in args.methods:
        batch = args.batch_size // SMALLER.get(method, 1)
        steps = args.stacks // (batch * STACKS[method])
        flags = ["--run-name", method, "--resume", "--total-steps", steps, "--save-every", max(steps // 10, 1)]
        flags += ["--batch-size", batch, "--learning-rate", args.learning_rate]
        tasks[f"pretrain_{method}"] = [f"pretrain_{method}.py", *flags, *data_and_network(args, pretraining=True)]
    return run_all(args, "pretrain", tasks)


def finetune(args: Args) -> int:
    games = data_agents(args)[0] or args.games  # cloning an agent that plays at random tells nothing
    checkpoints = {method: f"runs/{method}/checkpoint.pt" for method in args.methods}
    backbones = {"random": [], "e2e": ["--no-freeze-backbone"]}
    backbones |= {method: ["--checkpoint", checkpoint] for method, checkpoint in checkpoints.items()}
    shared = ["--num-transitions", args.transitions, "--epochs", args.epochs, "--batch-size", args.batch_size]
    shared += ["--eval-episodes", args.episodes, "--max-episode-steps", args.episode_steps, "--no-compile"]
    shared += data_and_network(args, pretraining=False)
    tasks = {}
    for seed, game, (method, backbone) in product(range(args.seeds), games, backbones.items()):
        command = ["finetune_bc.py", "--game", game, "--seed", seed, *backbone, *shared]
        tasks[f"finetune_{method}_{game}_{seed}"] = command
    tasks["probe"] = ["eval_probe.py", "--models", *checkpoints.values(), *data_and_network(args, pretraining=True)]
    return run_all(args, "finetune", tasks)


# === report ===========================================================================================================
AGNOSTIC, SPECIFIC = ("curl", "mae", "atc", "siammae"), ("bc", "spr", "idm")
IMAGE, VIDEO = ("curl", "mae"), ("atc", "siammae", "r3m")
PAGE = """# The benchmark in small: a run on {device}

Written by `benchmarks/study.py`: games played, methods pre-trained, behaviour cloned, all from nothing.

## What the scores say of the paper's claims

A claim is about differences of IQMs, where the IQM of a group is the mean of its methods'. Each difference has a 95%
interval, by a stratified bootstrap over the seeds. The scores **support** a claim if all its intervals are above 0, and
**contradict** it if one is below 0. Otherwise, or with one seed, or without a game in a split, they **cannot tell**.

{claims}

What limits this:

- {kept} games and {seeds} seeds of fine-tuning. With few seeds, the intervals of a bootstrap are too narrow.
- Near a game's ceiling or floor, where all methods score alike, nothing can be told.
- A method is pre-trained once. No interval knows what another seed of pre-training would give.
- A ResNet of width {width_multiplier} with {depth} blocks; the benchmark's has width 1 and 16 blocks.
- Pre-training sees {stacks:,} stacks of frames; the benchmark's sees 1,000,000,000 or more.
- An evaluation is {episodes} episodes of at most {episode_steps:,} steps. A cut episode scores less than a whole one;
  the reference scores are of whole ones.

## Data agents

Mean score ± standard error, in an evaluation as after fine-tuning. An agent is better than random play if the
difference is more than two standard errors. Other games are not fine-tuned on: their clones tell nothing.
If no agent is better, all games are fine-tuned on, and nothing is concluded.

{agents}

## IQM of DQN-normalised scores

![IQM]({name}.png)

### {iqm}

## Scores

Means over the seeds, not normalised.

{scores}

## Probes

![Probes]({name}-probe.png)

{probes}

## Settings

{settings}

{times}
"""


def judge(methods: list[str], games: list[str], x: np.ndarray, resamples: int) -> list[list[str]]:
    """A row for each claim: its name, its differences with intervals, the verdict. x [methods, games, seeds]"""
    seeds = x.shape[2]
    drawn = np.random.default_rng(0).integers(seeds, size=(resamples, *x.shape))
    x = np.concatenate([x[None], np.take_along_axis(x[None], drawn, axis=3)])  # the scores, then their resamples

    def iqm(group: tuple[str, ...], split: str) -> np.ndarray:
        """Mean of the methods' IQMs, [1 + resamples]; nan if there is nothing to average"""
        chosen = [i for i, method in enumerate(methods) if method in group]
        columns = [i for i, game in enumerate(games) if game in eval_iqm.SPLITS[split]]
        if not chosen or not columns:
            return np.full(len(x), np.nan)
        scores = x[:, chosen][:, :, columns].reshape(len(x) * len(chosen), -1)
        return eval_iqm.interquartile_mean(scores, np.ones(1)).reshape(len(x), -1).mean(1)

    def gain(group: tuple[str, ...], split: str) -> np.ndarray:
        return iqm(group, split) - iqm(("random",), split)

    splits, far = ("ID", "near-OOD", "far-OOD"), gain(SPECIFIC, "far-OOD")
    claims = {"Pre-training beats a random backbone": {"all splits": gain(tuple(STACKS), "all")}}
    claim = "Task-agnostic objectives (CURL, MAE, ATC, SiamMAE) help on all splits"
    claims[claim] = {split: gain(AGNOSTIC, split) for split in splits}
    claim = "Task-specific objectives (BC, SPR, IDM) help ID and near-OOD more than far-OOD"
    claims[claim] = {f"{split} less far-OOD": gain(SPECIFIC, split) - far for split in splits[:2]}
    claim = "Video (ATC, SiamMAE, R3M) beats images (CURL, MAE)"
    claims[claim] = {"all splits": iqm(VIDEO, "all") - iqm(IMAGE, "all")}

    rows = []
    for claim, differences in claims.items():
        low, high = np.percentile([x[1:] for x in differences.values()], [2.5, 97.5], axis=1)
        ends = zip(differences.items(), low, high, strict=True)
        cells = [f"{name}: {x[0]:.3f} [{least:.3f}, {most:.3f}]" for (name, x), least, most in ends]
        cells = [cell.replace("nan [nan, nan]", "no such scores") for cell in cells]
        verdict = "support it" if (low > 0).all() else "contradict it" if (high < 0).any() else "cannot tell"
        if seeds == 1 or np.isnan(low).any():
            verdict = "cannot tell"
        rows.append([claim, "; ".join(cells), f"**{verdict}**"])
    return rows


def report(args: Args) -> None:
    better, agents = data_agents(args)
    games = better or args.games
    methods, results = ["random", "e2e", *args.methods], {}
    for method, game, seed in product(methods, games, range(args.seeds)):
        path = args.folder / f"results/bc/{method}/{game}/seed{seed}.json"
        results[method, game, seed] = json.loads(path.read_text())
    with open(args.folder / "scores.csv", "w", newline="") as file:
        rows = [["bc", *key, result["score"]] for key, result in results.items()]
        csv.writer(file).writerows([eval_iqm.KEYS, *rows])
    flags = ["--csv", "scores.csv", "--methods", *methods, "--resamples", str(args.resamples)]
    subprocess.run([sys.executable, ROOT / "eval_iqm.py", *flags], cwd=args.folder, check=True)

    x = [results[key]["normalized_score"] for key in product(methods, games, range(args.seeds))]
    x = np.reshape(x, (len(methods), len(games), args.seeds))
    claims = judge(methods, games, x, args.resamples) if better else [["all", "no agent is better", "**cannot tell**"]]
    scores = [["game", *methods]]
    for game in games:
        means = [np.mean([results[method, game, seed]["score"] for seed in range(args.seeds)]) for method in methods]
        scores.append([game, *(f"{mean:.2f}" for mean in means)])
    settings = {name: " ".join(map(str, x)) if isinstance(x, tuple) else x for name, x in asdict(args).items()}
    settings |= {"data_dir": "given" if args.data_dir else "none: games played here"}
    settings |= {"machine": processor()}
    shown = [item for item in settings.items() if item[0] not in ("stage", "folder", "page")]
    times = [json.loads(line) for line in (args.folder / "times.jsonl").read_text().splitlines()]
    clock = [["stage", "minutes by the clock", "commits of the scripts"]]
    for stage in STAGES:
        lines = [line for line in times if line["stage"] == stage]
        if lines:
            minutes = sum(line["seconds"] for line in lines) / 60
            clock.append([stage, f"{minutes:.1f}", " ".join(dict.fromkeys(line["commit"] for line in lines))])

    page = args.page or args.folder / "study.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.folder / "reports/iqm.png", page.with_suffix(".png"))
    shutil.copy(args.folder / "reports/probe.png", page.with_name(f"{page.stem}-probe.png"))
    parts = {
        "device": "a GPU" if torch.cuda.is_available() else "a CPU",
        "claims": table(["claim", "differences of IQMs", "these scores"], *claims),
        "agents": agents,
        "iqm": (args.folder / "reports/iqm.md").read_text().partition("\n## ")[2].replace("\n## ", "\n### ").strip(),
        "scores": table(*scores),
        "probes": (args.folder / "reports/probe.md").read_text().split("\n\n", 2)[2].strip(),
        "settings": table(["setting", "value"], *shown),
        "times": table(*clock),
    }
    page.write_text(PAGE.format(**parts, **asdict(args), kept=len(games), depth=sum(args.blocks), name=page.stem))
    print(f"Written: {page}")


# === main =============================================================================================================
STAGES = {"data": play, "pretrain": pretrain, "finetune": finetune, "report": report}
MAY_CHANGE = "stage folder page methods seeds jobs resamples".split()  # when a study goes on


def main(args: Args) -> None:
    for name, value in SCALES[args.scale].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.data_dir = args.data_dir and args.data_dir.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings, path = json.loads(json.dumps(asdict(args), default=str)), args.folder / "settings.json"
    old = json.loads(path.read_text()) if path.exists() else settings
    changed = {name: value for name, value in old.items() if name not in MAY_CHANGE and settings[name] != value}
    if changed:
        raise SystemExit(f"{args.folder} was begun with {changed}: go on with these, or choose another --folder.")
    path.write_text(json.dumps(settings, indent=2))

    page = args.page or args.folder / "study.md"
    stages = ["data", "pretrain", "finetune"] if args.stage == "all" else [args.stage]
    ran = [STAGES[stage](args) for stage in stages if not (stage == "data" and args.data_dir)]
    if args.stage == "all" and page.exists() and not any(ran):
        print(f"{page} is there already. To write it again: --stage report")
    elif args.stage == "all":
        report(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
