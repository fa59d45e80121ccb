"""The benchmark in small, from nothing: plays games, pre-trains, fine-tunes, probes, and says what the scores tell.

    python benchmarks/study.py --scale gpu                    about 20 minutes on an H200 with 16 cores
    python benchmarks/study.py --scale gpu --minutes 9        stops in time; the same command goes on
    python benchmarks/study.py --scale cpu                    tests the machinery in minutes; its scores tell nothing
    cp study/study*.md study/study*.png docs/                 publishes the page

1. data       benchmarks/players.py: scripted players record themselves. Real data is better; where it can be had:
              python download_data.py --data-dir D --games G --runs 1 --checkpoints C --rows-per-checkpoint 17500
              python benchmarks/study.py --scale gpu --data-dir D --games G --checkpoints C, such as 1 10 20 30 40
2. pretrain   Each method pre-trains the same small ResNet on the ID games, on the same number of stacks of frames.
3. finetune   Behaviour cloning of every game's last checkpoint, on each method's backbone, on a random one (random) and
              from scratch (e2e).
4. probe      Linear probes of the backbones, on rows that no pre-training has read.
5. report     study.md with the scores, IQM, probes, pictures, and what they say of the paper's claims (2406.06037).

All is written into --folder, logs of the scripts into its logs/. What is done is kept: the same command goes on, and a
pre-training from its checkpoint. --jobs processes run side by side, on one GPU, too.

The 20 minutes are an estimate: nothing of this has run on a GPU yet. From the rates in docs/performance.md of the full
ResNet-50 on an H200, 3 million stacks take 2,300 s for the 11 methods and 1,000 s for the second pre-trainings. This
network writes a ninth of the activations, which bound the speed: 6 minutes. On an H100, whose memory is slower, 8.

    data      2  875,000 rows at 1,500 a second and core; surround looks ahead, at 100 rows a second
    pretrain  8  15 at once, some 40 GB of GPU memory; 2 minutes to compile
    finetune  9  507 runs of 16 s, 16 at once: 3 s to start, 4 s for 785 steps, 9 s to play, by the CPU's speed
    probe     1  30 runs, 16 at once

A half-width ResNet with two blocks in a stage writes a third, takes 20 minutes to pre-train and 35 in all; no more than
10 at once fit into 80 GB: --width-multiplier 0.5 --blocks 2 2 2 2 --jobs 10. After --stage data, this shows in a minute
how well a size clones (guessing among n actions has a loss of log n):

    cd study && python ../pretrain_bc.py --data-dir replay --runs 1 --checkpoints 1 2 3 4 5 --games breakout \\
        --learning-rate 1e-3 --total-steps 4000 --width-multiplier 0.5 --blocks 2 2 2 2 --run-name try --overwrite
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import tyro
from common import ROOT, load, processor
from matplotlib.figure import Figure
from players import PLAYERS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

START = time.time()
bc = load("pretrain_bc")
eval_iqm = load("eval_iqm")
STACKS = {"curl": 1, "mae": 1, "atc": 2, "siammae": 2, "r3m": 3, "bc": 1, "spr": 5, "idm": 2, "spr_idm": 5, "dt": 8}
STACKS["cql"] = 2  # stacks of frames in a sample
SMALLER = {"spr": 4, "spr_idm": 4, "dt": 8}  # batches of long samples are smaller by this factor, as in the benchmark
CLONING_BATCH = 64  # small, as steps count more than samples when a new neck and head are trained for a few seconds
SCALES = {
    "gpu": dict(
        games=tuple(PLAYERS), methods=tuple(STACKS), twice=("curl", "atc", "mae", "bc"), seeds=3, jobs=16,
        width_multiplier=0.25, blocks=(1, 1, 1, 1), stacks=3_000_000, batch_size=512, rows=10_000, probe_rows=7_500,
        transitions=10_000, epochs=5, episodes=20, episode_steps=1_000,
    ),
    "cpu": dict(
        games=("space_invaders", "asterix"), methods=("atc", "bc"), twice=("bc",), seeds=2, jobs=2,
        width_multiplier=0.125, blocks=(1, 1, 1, 1), stacks=1_280, batch_size=32, rows=600, probe_rows=400,
        transitions=400, epochs=1, episodes=2, episode_steps=100,
    ),
}  # fmt: skip


# === arguments ========================================================================================================
@dataclass
class Args:
    scale: Literal["gpu", "cpu"]  # gives the defaults of the other flags
    stage: Literal["all", "data", "pretrain", "finetune", "probe", "report"] = "all"  # all: one after the other
    folder: Path = Path("study")  # for all that is made
    minutes: float = math.inf  # after these, running scripts are stopped; the same command goes on
    data_dir: Path | None = None  # data by download_data.py to use instead of scripted players'
    checkpoints: tuple[int, ...] = (1, 2, 3, 4, 5)  # of run 1; all for pre-training, the last one for cloning
    games: tuple[str, ...] | None = None  # to clone; the ID games are those of pre-training, too
    methods: tuple[str, ...] | None = None  # atc for pretrain_atc.py, which may be a patched copy, such as curl_cosine
    twice: tuple[str, ...] | None = None  # methods to pre-train with two seeds, and their patched copies
    seeds: int | None = None  # clonings of each game by each method; pre-trainings take turns
    width_multiplier: float | None = None  # of all ResNets
    blocks: tuple[int, int, int, int] | None = None  # of all ResNets
    rows: int | None = None  # rows of a checkpoint for pre-training, its first ones
    probe_rows: int | None = None  # rows of a checkpoint for the probes, the ones after these
    stacks: int | None = None  # stacks of frames that a pre-training sees: steps x samples x stacks in a sample
    batch_size: int | None = None  # samples in a step of pre-training: a quarter for spr and spr_idm, an eighth for dt
    # The paper's rates, 3e-6 (CURL) to 3e-4, are for two million steps; these are 6,000 at most. On a CPU, BC at 1e-3
    # took 5,000 steps of 64 samples to learn what is not obvious. One rate for all methods favours none of them.
    learning_rate: float = 1e-3  # of pre-training, the same for all methods
    transitions: int | None = None  # rows of a game's last checkpoint to clone
    epochs: int | None = None  # of cloning
    episodes: int | None = None  # of each evaluation
    episode_steps: int | None = None  # agent steps after which an episode is cut off
    jobs: int | None = None  # processes at a time
    resamples: int = 50_000  # bootstrap resamples of the report


def origin(method: str) -> str:
    """The script that a method is, or is a patched copy of: curl for curl and for curl_cosine"""
    return max((name for name in STACKS if f"{method}_".startswith(f"{name}_")), key=len, default="")


def pretrainings(args: Args, method: str) -> int:
    return 2 if origin(method) in args.twice else 1


def time_left(args: Args) -> float:
    return START + 60 * args.minutes - time.time()


def id_games(args: Args) -> list[str]:
    return [game for game in args.games if game in eval_iqm.ID_GAMES]


# === processes ========================================================================================================
def run_all(args: Args, stage: str, tasks: dict[str, list]) -> None:
    """Runs the tasks that are left, args.jobs at a time. A task is done if it has a log."""
    logs = args.folder / "logs"
    left = {name: command for name, command in tasks.items() if not (logs / f"{name}.log").exists()}
    print(f"{stage}: {len(left)} of {len(tasks)} runs to do", flush=True)
    threads = str(max(os.cpu_count() // args.jobs, 1))
    environment = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    # Freed memory is kept for the next step: on a CPU that is faster.
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}

    def run(name: str) -> None:
        if time_left(args) <= 0:
            return
        unfinished = logs / f"{name}.part"
        script, *flags = left[name]
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        with open(unfinished, "w") as log:
            options = dict(cwd=args.folder, env=environment | os.environ, stdout=log, stderr=subprocess.STDOUT)
            process = subprocess.Popen(command, **options)
            try:
                code = process.wait(time_left(args))
            except subprocess.TimeoutExpired:
                process.terminate()  # a pre-training saves its checkpoint
                process.wait()
                return
        if code:
            raise SystemExit(f"{script} failed:\n{unfinished.read_text()[-2000:]}\nAll it printed: {unfinished}")
        unfinished.rename(logs / f"{name}.log")

    logs.mkdir(exist_ok=True)
    clock = time.time()
    with ThreadPoolExecutor(args.jobs) as pool, open(args.folder / "times.jsonl", "a") as times:
        for _ in tqdm(pool.map(run, left), stage, len(left), unit="run", disable=not left):
            times.write(json.dumps({"stage": stage, "seconds": time.time() - clock}) + "\n")
            times.flush()
            clock = time.time()
    if not all((logs / f"{name}.log").exists() for name in left):
        raise SystemExit(f"{args.minutes:g} minutes are over, in stage {stage}. The same command goes on.")


# === stages ===========================================================================================================
def play(args: Args) -> None:
    if args.data_dir:
        return
    tasks = {}
    for game in args.games:
        rows = args.transitions
        if game in bc.DQN_REPLAY_GAMES:  # others are only cloned
            rows = max(rows, args.rows + args.probe_rows)
        flags = ["--data-dir", folder_of_data(args), "--games", game, "--rows", rows, "--jobs", 5]
        tasks[f"play_{game}"] = ["benchmarks/players.py", *flags]
    run_all(args, "data", tasks)


def folder_of_data(args: Args) -> Path:
    return args.data_dir or (args.folder / "replay").absolute()


def data_and_network(args: Args) -> list:
    network = ["--width-multiplier", args.width_multiplier, "--blocks", *args.blocks]
    return [*network, "--data-dir", folder_of_data(args), "--runs", 1]


def prepare(args: Args, games: list[str], checkpoints: tuple[int, ...], rows: int) -> None:
    """Once, as it takes too much memory in many processes at a time"""
    data = dict(data_dir=folder_of_data(args), runs=(1,), checkpoints=checkpoints)
    bc.prepare(bc.Args(cache_dir=args.folder / "cache", **data), games, rows)


def pretrain(args: Args) -> None:
    prepare(args, id_games(args), args.checkpoints, args.rows)
    shared = ["--games", *id_games(args), "--checkpoints", *args.checkpoints, "--rows-per-checkpoint", args.rows]
    shared += ["--learning-rate", args.learning_rate, "--resume", *data_and_network(args)]
    tasks = {}
    for method in args.methods:
        batch = args.batch_size // SMALLER.get(origin(method), 1)
        steps = args.stacks // (batch * STACKS[origin(method)])
        flags = ["--batch-size", batch, "--total-steps", steps, *shared]
        flags += ["--save-every", max(steps // 10, 1), "--eval-every", max(steps // 20, 1)]
        for seed in range(pretrainings(args, method)):
            name = f"{method}__{seed}"
            tasks[f"pretrain_{name}"] = [f"pretrain_{method}.py", "--run-name", name, "--seed", seed, *flags]
    run_all(args, "pretrain", tasks)


def finetune(args: Args) -> None:
    shared = ["--checkpoints", args.checkpoints[-1], "--num-transitions", args.transitions, "--epochs", args.epochs]
    shared += ["--batch-size", CLONING_BATCH, "--eval-episodes", args.episodes, "--no-compile"]
    shared += ["--max-episode-steps", args.episode_steps, *data_and_network(args)]
    tasks = {}
    for seed, game, method in product(range(args.seeds), args.games, ("random", "e2e", *args.methods)):
        backbone = {"random": [], "e2e": ["--no-freeze-backbone"]}.get(method)
        if backbone is None:
            backbone = ["--checkpoint", f"runs/{method}__{seed % pretrainings(args, method)}/checkpoint.pt"]
        command = ["finetune_bc.py", "--method", method, "--game", game, "--seed", seed, *backbone, *shared]
        tasks[f"finetune_{method}_{game}_{seed}"] = command
    run_all(args, "finetune", tasks)


def probed_splits(args: Args) -> dict[str, list[str]]:
    """Games by split, where there are any; eval_probe.py takes no far-OOD games."""
    games = {"ID": id_games(args), "near-OOD": [game for game in args.games if game in eval_iqm.NEAR_OOD_GAMES]}
    return {split: found for split, found in games.items() if found}


def probe(args: Args) -> None:
    """Of each pre-training, and of a random backbone with its seed"""
    rows, checkpoints = args.rows + args.probe_rows, args.checkpoints[-3:]
    prepare(args, [game for game in args.games if game in bc.DQN_REPLAY_GAMES], checkpoints, rows)
    # A game's rows without its padding are fewer: a part of those after the first args.rows is left to spare.
    shared = ["--rows-per-checkpoint", rows, "--held-out", 0.97 * args.probe_rows / rows, "--samples", 10**9]
    shared += ["--checkpoints", *checkpoints, *data_and_network(args)]
    shared += ["--epochs", 50, "--batch-size", 2048, "--learning-rate", 1e-3, "--rank-resamples", 20]
    tasks = {}
    for split, method in product(probed_splits(args), args.methods):
        for seed in range(pretrainings(args, method)):
            name = f"probe_{split}_{method}__{seed}"
            flags = ["--models", f"runs/{method}__{seed}/checkpoint.pt", "--output-dir", f"reports/{name}"]
            tasks[name] = ["eval_probe.py", *flags, "--games", *probed_splits(args)[split], "--seed", seed, *shared]
    run_all(args, "probe", tasks)


# === report ===========================================================================================================
AGNOSTIC, SPECIFIC = ("curl", "mae", "atc", "siammae"), ("bc", "spr", "idm")
IMAGE, VIDEO = ("curl", "mae"), ("atc", "siammae", "r3m")
PAGE = """# The benchmark in small

Written by `benchmarks/study.py --scale {scale}` on {machine}.

{played}

![A frame of each game](study-players.png)

## What the scores say of the paper's claims

A claim is about differences of IQMs, where the IQM of a group is the mean of its methods'. Each difference has a 95%
interval, by a stratified bootstrap over the seeds. The scores **support** a claim if all its intervals are above 0, and
**contradict** it if one is below 0. Otherwise, or with one seed, or without a game in a split, they **cannot tell**.
A resample draws pre-trainings and random backbones first, the same for all games, then clonings of each.

{claims}

The same claims, asked of the accuracy of linear probes, the mean over the splits. Its intervals add the error of the
test samples as if each method had its own. eval_probe.py takes no far-OOD games, so no claim about them can be told.

{probe_claims}

What limits this:

- It is small: {games} games and {seeds} seeds of cloning. Pre-trained twice: {twice}; the others once. No interval
  knows what another pre-training of these would give. With few seeds, the intervals of a bootstrap are too narrow.
- A ResNet of width {width_multiplier} with {depth} blocks; the benchmark's has width 1 and 16 blocks. Pre-training sees
  {stacks:,} stacks of frames; the benchmark's sees 1,000,000,000 or more.
- All methods share one learning rate. Another may suit some of them better.
- Where all methods score alike, at a game's ceiling or floor, nothing can be told. Some games are played by one action.
- An evaluation is {episodes} episodes of at most {episode_steps:,} steps; the reference scores are of whole ones. A cut
  episode scores less, but more where time costs points (skiing) or the player loses (pong, surround).
- Frames next to each other are alike, so the true intervals of the probes are wider.

## IQM of DQN-normalised scores

![IQM](study-iqm.png)

### {iqm}

## Scores

Means over the seeds, not normalised; those of random play and of the reference, which is a DQN or Rainbow, are of whole
episodes. Where nearly all of the cloned actions are one, all methods clone alike.

{scores}

## Pre-training

![Loss on held-out samples](study-loss.png)

## Probes

Accuracy of a linear layer that tells the action, on rows that no pre-training has read. {about}

{probes}

## Settings

{settings}
"""


SCRIPTED = """Scripted players made it, a few lines of code for each game that read the console's memory: no learning
agents, and not the benchmark's data. Checkpoints 1 to 5 play better and better; the last, with 5% random actions, is
cloned."""


def table(*rows: list) -> str:
    header, *rows = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def resample(x: np.ndarray, pretrained: list[int], error: np.ndarray, resamples: int) -> np.ndarray:
    """The values x [methods, games, seeds], then resamples of them: [1 + resamples, methods, games, seeds]

    A method's seed k is of its backbone k % n, n in `pretrained`. For each seed, a resample draws a backbone, the same
    for all games, then for each game one of that backbone's values. Noise with the errors [methods, games] is added.
    """
    rng = np.random.default_rng(0)
    games, seeds = x.shape[1:]
    again = np.empty((resamples, *x.shape))
    for method, n in enumerate(pretrained):
        first = rng.integers(min(n, seeds), size=(resamples, 1, seeds))  # the backbone; its values are first + n i
        values = (seeds - first + n - 1) // n  # their number
        drawn = first + n * (rng.random((resamples, games, seeds)) * values).astype(int)
        again[:, method] = np.take_along_axis(x[None, method], drawn, axis=2)
    again += rng.normal(size=(resamples, *error.shape, 1)) * error[:, :, None]
    return np.concatenate([x[None], again])


def judge(methods: list[str], splits: list[str], x: np.ndarray, centre: Callable, enough: bool) -> list[list[str]]:
    """A row for each claim: its name, its differences with intervals, the verdict.

    x [1 + resamples, methods, games, seeds] are values, then resamples; `splits` are the games'. `enough` is False if
    there are too few seeds for intervals.
    """

    def middle(group: tuple[str, ...], split: str) -> np.ndarray:
        """Mean over the group's methods of their IQMs or means, [1 + resamples]; nan if there is nothing to average"""
        chosen = [i for i, method in enumerate(methods) if method in group]
        columns = [i for i, of_game in enumerate(splits) if split in (of_game, "all")]
        if not chosen or not columns:
            return np.full(len(x), np.nan)
        values = x[:, chosen][:, :, columns].reshape(len(x) * len(chosen), -1)
        return centre(values).reshape(len(x), -1).mean(1)

    def gain(group: tuple[str, ...], split: str) -> np.ndarray:
        return middle(group, split) - middle(("random",), split)

    far = gain(SPECIFIC, "far-OOD")
    claims = {"Pre-training beats a random backbone": {"all splits": gain(tuple(STACKS), "all")}}
    claim = "Task-agnostic objectives (CURL, MAE, ATC, SiamMAE) help on all splits"
    claims[claim] = {split: gain(AGNOSTIC, split) for split in ("ID", "near-OOD", "far-OOD")}
    claim = "Task-specific objectives (BC, SPR, IDM) help ID and near-OOD more than far-OOD"
    claims[claim] = {f"{split} less far-OOD": gain(SPECIFIC, split) - far for split in ("ID", "near-OOD")}
    claim = "Video (ATC, SiamMAE, R3M) beats images (CURL, MAE)"
    claims[claim] = {"all splits": middle(VIDEO, "all") - middle(IMAGE, "all")}
    for method in methods:
        if method != origin(method) and origin(method) in methods:
            difference = middle((method,), "all") - middle((origin(method),), "all")
            claims[f"Ablation: {method} beats {origin(method)}"] = {"all splits": difference}

    rows = []
    for claim, differences in claims.items():
        low, high = np.percentile([values[1:] for values in differences.values()], [2.5, 97.5], axis=1)
        ends = zip(differences.items(), low, high, strict=True)
        cells = [f"{name}: {values[0]:.3f} [{least:.3f}, {most:.3f}]" for (name, values), least, most in ends]
        cells = [cell.replace("nan [nan, nan]", "no such scores") for cell in cells]
        verdict = "support it" if (low > 0).all() else "contradict it" if (high < 0).any() else "cannot tell"
        if np.isnan(low).any() or not enough:
            verdict = "cannot tell"
        rows.append([claim, "; ".join(cells), f"**{verdict}**"])
    return rows


def judge_scores(args: Args, results: dict) -> list[list[str]]:
    methods = ["random", *args.methods]
    splits = [next(split for split, games in eval_iqm.SPLITS.items() if game in games) for game in args.games]
    keys = product(methods, args.games, range(args.seeds))
    x = [eval_iqm.normalize(game, results[method, game, seed]["score"]) for method, game, seed in keys]
    x = np.reshape(x, (len(methods), len(args.games), args.seeds))
    pretrained = [args.seeds, *(pretrainings(args, method) for method in args.methods)]  # every seed has a random one
    x = resample(x, pretrained, np.zeros(x.shape[:2]), args.resamples)
    return judge(methods, splits, x, lambda x: eval_iqm.interquartile_mean(x, np.ones(1)), enough=args.seeds > 1)


def judge_probes(args: Args) -> tuple[list[list[str]], str, str]:
    """The claims, a table of the accuracies, and of how many samples they are"""
    splits = list(probed_splits(args))
    pretrained = {method: pretrainings(args, method) for method in args.methods}
    twice = max(pretrained, key=pretrained.get)  # a method whose reports have a random backbone of each seed
    pretrained = {"random": pretrained[twice]} | pretrained

    def measured(method: str, split: str, seed: int) -> dict[str, float]:
        """Action accuracy and its interval: value, low, high"""
        run = f"{twice if method == 'random' else method}__{seed % pretrained[method]}"
        content = json.loads((args.folder / f"reports/probe_{split}_{run}/probe.json").read_text())
        return content["results"]["random" if method == "random" else run]["action"]

    x = np.empty((len(pretrained), len(splits), pretrained[twice]))
    error, rows = np.empty(x.shape[:2]), [["backbone", *splits]]
    for m, method in enumerate(pretrained):
        for s, split in enumerate(splits):
            found = [measured(method, split, seed) for seed in range(x.shape[2])]
            x[m, s] = [accuracy["value"] for accuracy in found]
            error[m, s] = (found[0]["high"] - found[0]["low"]) / (2 * 1.96)
        for seed in range(pretrained[method]):
            cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**measured(method, split, seed)) for split in splits]
            rows.append([f"{method}, seed {seed}", *cells])
    reports = [args.folder / f"reports/probe_{split}_{twice}__0" for split in splits]
    constant = [json.loads((report / "probe.json").read_text())["constant"]["action"]["value"] for report in reports]
    rows.append(["none: each game's commonest action", *(f"{accuracy:.3f}" for accuracy in constant)])
    samples = [(report / "probe.md").read_text().split("\n\n")[2] for report in reports]
    about = " ".join(f"{split}: {text}." for split, text in zip(splits, samples, strict=True))
    x = resample(x, list(pretrained.values()), error, args.resamples)
    return judge(list(pretrained), splits, x, lambda x: x.mean(1), enough=True), table(*rows), about


def cloned_files(args: Args, game: str) -> list[Path]:
    where = SimpleNamespace(data_dir=folder_of_data(args), checkpoints=args.checkpoints)
    return bc.find_files(where, game, 1, args.checkpoints[-1])


def draw_losses(args: Args) -> Figure:
    columns = min(4, len(args.methods))
    rows = math.ceil(len(args.methods) / columns)
    figure = Figure((3 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, method in zip(panels, args.methods, strict=False):
        for seed in range(pretrainings(args, method)):
            events = EventAccumulator(str(args.folder / f"runs/{method}__{seed}"))
            points = events.Reload().Scalars("eval/loss")
            panel.plot([point.step for point in points], [point.value for point in points], label=f"seed {seed}")
        panel.set_title(method, fontsize=9)
    for panel in list(panels):  # of no method
        panel.axis("off")
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("loss on held-out samples", fontsize=9)
    return figure


def draw_players(args: Args) -> Figure:
    """A frame of each game, from the last checkpoint's file"""
    figure = Figure((1.2 * len(args.games), 1.4), layout="constrained")
    for game, panel in zip(args.games, figure.subplots(1, len(args.games), squeeze=False)[0], strict=True):
        observation, *_ = cloned_files(args, game)
        panel.imshow(bc.read_npy(observation, min(300, args.transitions))[-1], cmap="gray", vmin=0, vmax=255)
        panel.set_title(game, fontsize=7)
        panel.axis("off")
    return figure


def report(args: Args) -> None:
    methods = ["random", "e2e", *args.methods]
    flags = ["--suites", "bc", "--methods", *methods, "--resamples", str(args.resamples)]
    if subprocess.run([sys.executable, ROOT / "eval_iqm.py", *flags], cwd=args.folder).returncode:
        raise SystemExit("eval_iqm.py failed.")
    results = {}
    for key in product(methods, args.games, range(args.seeds)):
        method, game, seed = key
        results[key] = json.loads((args.folder / f"results/bc/{method}/{game}/seed{seed}.json").read_text())
    claims = judge_scores(args, results)
    probe_claims, probes, about = judge_probes(args)

    scores = [["game", "commonest action", "random play", "reference", *methods]]
    for game in args.games:
        share = np.bincount(bc.read_npy(cloned_files(args, game)[1], args.transitions)).max() / args.transitions
        means = [np.mean([results[method, game, seed]["score"] for seed in range(args.seeds)]) for method in methods]
        scores.append([game, f"{share:.0%}", *(f"{score:.1f}" for score in (*eval_iqm.SCORES[game], *means))])
    settings = [["setting", "value"]]
    for name, value in asdict(args).items():
        if name not in ("stage", "folder", "minutes", "data_dir"):
            settings.append([name, " ".join(value) if name in ("games", "methods", "twice") else value])
    times = [json.loads(line) for line in (args.folder / "times.jsonl").read_text().splitlines()]
    for stage in ("data", "pretrain", "finetune", "probe"):
        seconds = sum(line["seconds"] for line in times if line["stage"] == stage)
        settings.append([f"minutes by the clock, {stage}", f"{seconds / 60:.1f}"])

    sources = {result["data"] for result in results.values()}
    parts = {
        "machine": processor(),
        "played": f"The data is {' and '.join(sorted(sources))}. {SCRIPTED if 'scripted_play' in sources else ''}",
        "claims": table(["claim", "differences of IQMs", "these scores"], *claims),
        "probe_claims": table(["claim", "differences of accuracies", "these probes"], *probe_claims),
        "iqm": (args.folder / "reports/iqm.md").read_text().partition("\n## ")[2].replace("\n## ", "\n### ").strip(),
        "scores": table(*scores),
        "about": about,
        "probes": probes,
        "settings": table(*settings),
    }
    parts["twice"] = ", ".join(method for method in args.methods if pretrainings(args, method) == 2) or "none"
    shutil.copy(args.folder / "reports/iqm.png", args.folder / "study-iqm.png")
    draw_losses(args).savefig(args.folder / "study-loss.png", dpi=150)
    draw_players(args).savefig(args.folder / "study-players.png", dpi=150)
    parts |= {"games": len(args.games), "depth": sum(args.blocks)}
    (args.folder / "study.md").write_text(PAGE.format(**asdict(args) | parts))
    print(f"Written: {args.folder / 'study.md'}")


# === main =============================================================================================================
STAGES = {"data": play, "pretrain": pretrain, "finetune": finetune, "probe": probe, "report": report}
MAY_CHANGE = "stage folder minutes methods seeds jobs resamples".split()  # when a study goes on


def main(args: Args) -> None:
    for name, value in SCALES[args.scale].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for method in args.methods:
        if not origin(method) or not (ROOT / f"pretrain_{method}.py").exists():
            raise SystemExit(f"--methods {method}: no pretrain_{method}.py in {ROOT} that is named after an original.")
    args.folder, args.data_dir = args.folder.resolve(), args.data_dir and args.data_dir.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings, path = json.loads(json.dumps(asdict(args), default=str)), args.folder / "settings.json"
    old = json.loads(path.read_text()) if path.exists() else settings
    changed = {name: value for name, value in old.items() if name not in MAY_CHANGE and settings.get(name) != value}
    if changed:
        raise SystemExit(f"{args.folder} was begun with {changed}: go on with these, or choose another --folder.")
    path.write_text(json.dumps(settings, indent=2))
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
