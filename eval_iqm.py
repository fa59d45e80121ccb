# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""Scores of Atari-PB (arXiv 2406.06037): IQM, performance profiles and more, with 95% bootstrap confidence intervals.

A raw score s of a game becomes x = (s - low) / (high - low), where low and high are the lesser and the greater of a
random agent's score and the reference's, a DQN's (far-OOD: a Rainbow's). The n scores x of a split's games and seeds
give (2108.13264):

    IQM             the interquartile mean: of what is left of the n without the int(n/4) least and greatest
    median, mean    over the games, of each game's mean over its seeds
    optimality gap  1 - mean of min(x, 1); less is better
    profile         for each tau of 0, 0.02, ..., 2: the share of the n that are greater than tau
    P(X > Y)        probability of improvement of X over Y: the mean over the games of P(x > y) + P(x = y) / 2, with x
                    and y any of X's and Y's scores of the game; by how much one is better does not count

An interval goes from the 2.5th to the 97.5th percentile of its statistic over 50,000 resamples of the scores. They are
stratified: for each game, as many of the game's own scores as there are get drawn, with replacement; of X and of Y
independently. For a profile these percentiles are known without drawing: those of infinitely many resamples.

    python eval_iqm.py                                        # the scores in results/, as the fine-tunings write them
    python eval_iqm.py --suites bc --methods random curl atc  # some of them
    python eval_iqm.py --improvement-over e2e                 # instead of over random
    python eval_iqm.py --csv scores.csv                       # anybody's, with columns suite, method, game, seed, score

Prints a table for each suite (bc, rainbow, zeroshot, ...) and split, in it the paper's methods in its groups, by what
they learn from, and after them all others. Writes reports/iqm.md, iqm.json, iqm.png, profiles.png and, where there is
a method to compare the others with, improvement.png.
"""

import csv
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke


# === arguments ========================================================================================================
@dataclass
class Args:
    results: Path = Path("results")  # a folder of <suite>/<method>/<game>/seed<k>.json, as the fine-tunings write them
    csv: Path | None = None  # a file of raw scores to read instead, with columns suite, method, game, seed, score
    suites: tuple[str, ...] = ()  # suites to show, in this order; none given: all
    methods: tuple[str, ...] = ()  # methods to show, in this order; none given: all
    improvement_over: str = ""  # the shown method to compare the others with; none given: random, if it is shown
    allow_missing: bool = False  # show, marked *, methods that lack games or seeds which others of their suite have
    resamples: int = 50_000  # of the bootstrap, for each method and split
    seed: int = 0  # of the bootstrap
    output_dir: Path = Path("reports")  # where iqm.md, iqm.json and the figures go


# === games [shared] ===================================================================================================
ID_GAMES = tuple(  # the 50 games of pre-training
    """air_raid amidar asteroids atlantis bank_heist battle_zone berzerk bowling boxing breakout carnival centipede
    chopper_command crazy_climber demon_attack double_dunk elevator_action enduro fishing_derby freeway frostbite gopher
    gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman name_this_game phoenix
    pitfall private_eye qbert road_runner robotank skiing solaris space_invaders star_gunner tennis time_pilot tutankham
    up_n_down video_pinball wizard_of_wor yars_revenge zaxxon""".split()
)
NEAR_OOD_GAMES = tuple("alien assault asterix beam_rider journey_escape pong pooyan riverraid seaquest venture".split())
FAR_OOD_GAMES = tuple("basic_math human_cannonball klax othello surround".split())
TABLE_GAMES = sorted(ID_GAMES + NEAR_OOD_GAMES)  # the DQN Replay games; game_id is a game's place in this list


def parse_game(name: str) -> str:
    """ALE's name of a game given as `ms_pacman` or `MsPacman`."""
    games = {game.replace("_", ""): game for game in sorted(ID_GAMES + NEAR_OOD_GAMES + FAR_OOD_GAMES)}
    if name.replace("_", "").lower() not in games:
        raise SystemExit(f"Unknown game {name!r}. Known are: {' '.join(games.values())}")
    return games[name.replace("_", "").lower()]


# === scores [shared] ==================================================================================================
# A random agent's score and the reference's: DQN's after 50M frames, for the far-OOD games Rainbow's after 2M steps.
SCORES = {
    "air_raid": (579.25, 7479.5), "alien": (227.8, 2484.49), "amidar": (5.8, 1207.74), "assault": (222.4, 1525.24),
    "asterix": (210.0, 2711.41), "asteroids": (719.1, 698.37), "atlantis": (12850.0, 853640.0),
    "bank_heist": (14.2, 601.79), "basic_math": (0.0033, 3.57), "battle_zone": (2360.0, 17784.84),
    "beam_rider": (363.9, 5852.42), "berzerk": (123.7, 487.48), "bowling": (23.1, 30.12), "boxing": (0.1, 77.99),
    "breakout": (1.7, 96.23), "carnival": (700.8, 4784.84), "centipede": (2090.9, 2583.03),
    "chopper_command": (811.0, 2690.61), "crazy_climber": (10780.5, 104568.76), "demon_attack": (152.1, 6361.58),
    "double_dunk": (-18.6, -6.54), "elevator_action": (4387.0, 439.77), "enduro": (0.0, 628.91),
    "fishing_derby": (-91.7, 0.58), "freeway": (0.0, 26.27), "frostbite": (65.2, 367.07), "gopher": (257.6, 5479.9),
    "gravitar": (173.0, 330.07), "hero": (1027.0, 17325.44), "human_cannonball": (1.0767, 5.56),
    "ice_hockey": (-11.2, -5.84), "jamesbond": (29.0, 573.31), "journey_escape": (-19977.0, -3671.09),
    "kangaroo": (52.0, 11485.98), "klax": (0.3734, 2124.75), "krull": (1598.0, 6097.63),
    "kung_fu_master": (258.5, 23435.38), "montezuma_revenge": (0.0, 0.0), "ms_pacman": (307.3, 3402.4),
    "name_this_game": (2292.3, 7278.65), "othello": (-21.3233, -2.01), "phoenix": (761.4, 4996.58),
    "pitfall": (-229.4, -73.81), "pong": (-20.7, 16.61), "pooyan": (371.2, 3211.96), "private_eye": (24.9, -16.04),
    "qbert": (163.9, 10117.5), "riverraid": (1338.5, 11638.93), "road_runner": (11.5, 36925.47),
    "robotank": (2.2, 59.77), "seaquest": (68.4, 1600.66), "skiing": (-17098.1, -15824.61),
    "solaris": (1236.3, 1436.4), "space_invaders": (148.0, 1794.24), "star_gunner": (664.0, 42165.22),
    "surround": (-9.9833, -7.81), "tennis": (-23.8, -1.5), "time_pilot": (3568.0, 3654.37),
    "tutankham": (11.4, 103.84), "up_n_down": (533.4, 8488.31), "venture": (0.0, 39.13),
    "video_pinball": (16256.9, 63406.11), "wizard_of_wor": (563.5, 2065.8), "yars_revenge": (3092.9, 23909.38),
    "zaxxon": (32.5, 4538.57),
}  # fmt: skip


def normalize(game: str, score: float) -> float:
    """DQN-normalised score, (score - low) / (high - low), low and high the lesser and the greater of `SCORES[game]`.

    Montezuma's Revenge, where both are 0, is kept from a division by 0 as in the original code: 0 stays 0.
    """
    low, high = sorted(SCORES[game])
    return (score - low) / (high - low + 1e-6)


# === files [shared] ===================================================================================================
@contextmanager
def atomic_write(path: Path):
    """A file to write that takes the place of `path` in one move once it is complete, and vanishes on an error."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > 3600:  # what a process was writing as it was killed
                    other.unlink()
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} cannot be written ({error!r}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """Ends the program if no file could be written into a folder that is there or is to be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise SystemExit(f"{folder} cannot be written: {existing} is no folder, or a protected one. Choose another.")


# === numbers [shared] =================================================================================================
def check_numbers(args, at_least_0: str, at_least_1: str) -> None:
    """Ends the program if one of the arguments of these names is less or not finite; --max-grad-norm may be inf."""
    for least, names in enumerate((at_least_0, at_least_1)):
        for name in names.split():
            value = getattr(args, name)
            limit = math.inf if isinstance(value, float) else 2**63
            if not least <= value < limit and (name, value) != ("max_grad_norm", math.inf):
                raise SystemExit(f"--{name.replace('_', '-')} must be at least {least}, and below {limit}.")


# === reading ==========================================================================================================
KEYS = ("suite", "method", "game", "seed", "score")
Scores = dict[tuple[str, int], float]  # a method's normalised scores, by (game, seed)


def parse(where: str, record: dict) -> tuple[tuple[str, str, str, int], float]:
    """(suite, method, game, seed) and the normalised score of a record that stands at `where`."""
    texts = {key: str(record[key]).strip() for key in KEYS if record.get(key) is not None}
    if absent := [key for key in KEYS if not texts.get(key)]:
        raise SystemExit(f"{where} has no {', '.join(absent)}. A score needs {', '.join(KEYS)}.")
    suite, method, game, seed, score = texts.values()
    try:
        game = parse_game(game)
        key, normalized = (suite, method, game, int(seed)), normalize(game, float(score))
    except SystemExit as error:
        raise SystemExit(f"{where}: {error}") from None
    except ValueError:
        normalized = math.nan
    if not math.isfinite(normalized):
        raise SystemExit(f"{where}: seed {seed} must be an integer and score {score} a finite number.")
    return key, normalized


def read_results(folder: Path) -> Iterable[tuple[str, dict]]:
    """Every result file's path and content, which agree."""
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. Fine-tune first, or say where scores are: --results or --csv.")
    for path in sorted(folder.glob("*/*/*/seed*.json")):
        try:
            record = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SystemExit(f"{path} cannot be read ({error}). Delete it and evaluate again.") from error
        in_path = dict(zip(KEYS, (*path.parts[-4:-1], path.stem.removeprefix("seed")), strict=False))
        if parse(f"{path}", record) != parse(f"{path}", record | in_path):
            content = ", ".join(f"{key} {record[key]}" for key in in_path)
            raise SystemExit(f"{path} does not fit its path, it holds {content}. Move it to where that belongs.")
        yield f"{path}", record


def read_csv(path: Path) -> Iterable[tuple[str, dict]]:
    """Every row of a table, and where it stands."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            if absent := [key for key in KEYS if key not in (reader.fieldnames or ())]:
                raise SystemExit(f"{path} lacks columns {', '.join(absent)}. Line 1 must name {', '.join(KEYS)}.")
            for record in reader:
                yield f"{path}, line {reader.line_num}", record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as CSV ({error}).") from error


def load(args: Args) -> dict[str, dict[str, Scores]]:
    """The scores to show, as [suite][method][game, seed]."""
    suites, places = {}, {}
    for where, record in read_csv(args.csv) if args.csv else read_results(args.results):
        key, score = parse(where, record)
        if key in places:
            raise SystemExit(f"{where} repeats {' '.join(map(str, key))} of {places[key]}. Remove one of the two.")
        places[key] = where
        suite, method, *cell = key
        suites.setdefault(suite, {}).setdefault(method, {})[tuple(cell)] = score
    if not suites:
        raise SystemExit(f"No results found in {args.csv or args.results / '<suite>/<method>/<game>/seed<k>.json'}.")
    suites = {suite: suites[suite] for suite in choose("--suites", args.suites, suites, [])}
    order = choose("--methods", args.methods, set().union(*suites.values()), list(GROUP_OF))
    suites = {suite: {method: of[method] for method in order if method in of} for suite, of in suites.items()}
    return {suite: methods for suite, methods in suites.items() if methods}


def choose(option: str, wanted: tuple[str, ...], found: Iterable[str], first: list[str]) -> list[str]:
    """What an option asks for, in its order; if it asks for nothing, all that was found, `first` first."""
    if unknown := [name for name in wanted if name not in found]:
        raise SystemExit(f"{option}: there are no scores of {', '.join(unknown)}, only of {', '.join(sorted(found))}.")
    return list(dict.fromkeys(wanted)) or [name for name in first if name in found] + sorted(set(found) - set(first))


def reference(args: Args, suites: dict[str, dict[str, Scores]]) -> str:
    """The method that the others are compared with; none, if it has a game in common with none of them."""
    over = args.improvement_over or "random"
    if args.improvement_over:
        choose("--improvement-over", (over,), set().union(*suites.values()), [])
    for methods in suites.values():
        games = {game for game, _ in methods.get(over, ())}
        if any(game in games for method, scores in methods.items() if method != over for game, _ in scores):
            return over
    if args.improvement_over:
        raise SystemExit(f"--improvement-over: {over} has no game in common with another method of its suite.")
    return ""


def lacks(methods: dict[str, Scores]) -> dict[str, str]:
    """What methods lack that others have: {"curl": "seed 0, 1 of alien, pong; seed 2 of qbert"}."""
    cells, found = sorted(set().union(*methods.values())), {}
    for method, scores in methods.items():
        seeds, games = {}, {}  # the seeds a game lacks, the games that lack these seeds
        for game, seed in cells:
            if (game, seed) not in scores:
                seeds[game] = f"{seeds[game]}, {seed}" if game in seeds else f"seed {seed}"
        for game, which in seeds.items():
            games.setdefault(which, []).append(game)
        if games:
            found[method] = "; ".join(f"{which} of {', '.join(names)}" for which, names in games.items())
    return found


# === statistics =======================================================================================================
STATISTICS = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap"}
ENDS = ("value", "low", "high")  # an estimate, and its interval's ends
TAU = np.arange(101) / 50  # of the profiles


def has_range(game: str) -> bool:
    """Whether low and high differ; of montezuma_revenge they do not, and a score above 0 counts as something huge."""
    return SCORES[game][0] != SCORES[game][1]


def trimmed_mean(scores: np.ndarray, cut: int) -> np.ndarray:
    """The mean of every row of [r, n] without its `cut` least and greatest (NumPy sorts faster than it partitions)."""
    return np.sort(scores, axis=1)[:, cut : scores.shape[1] - cut].mean(axis=1)


def aggregate(scores: np.ndarray, counts: np.ndarray, in_mean: np.ndarray) -> np.ndarray:
    """STATISTICS [4, r] of every row of [r, n]: counts[0] scores of the first game, counts[1] of the second, ...

    in_mean bool [games] says which games the mean is over; of none it is NaN.
    """
    game_means = np.add.reduceat(scores, np.cumsum(counts) - counts, axis=1) / counts  # [r, games]
    iqm = trimmed_mean(scores, scores.shape[1] // 4)
    median = trimmed_mean(game_means, (len(counts) - 1) // 2)  # all but the one or two in the middle are cut
    mean = game_means[:, in_mean].mean(axis=1) if in_mean.any() else np.full(len(scores), np.nan)
    return np.stack([iqm, median, mean, 1 - np.minimum(scores, 1).mean(axis=1)])


def bootstrap(statistics: Callable, counts: np.ndarray, resamples: int, seed: int) -> list[dict[str, float | None]]:
    """Value, low and high end (None: undefined) of each of `statistics`, of sum(counts) = n scores, a game's together.

    It maps which scores are drawn, int [r, n], to [statistics, r]; counts [games] says how many are of each game.
    """
    first = np.repeat(np.cumsum(counts) - counts, counts)  # [n], where the scores of every score's game begin
    size = np.repeat(counts, counts).astype(np.float32)  # [n], how many they are
    value = statistics(np.arange(len(first))[None])[:, 0]  # each of the scores once
    rng, samples = np.random.default_rng(seed), np.empty((len(value), resamples))
    chunk = 1 + 2**15 // len(first)  # resamples at a time: 256 KB, which stay in the processor's cache
    for i in range(0, resamples, chunk):
        part = samples[:, i : i + chunk]
        part[:] = statistics(first + (rng.random((part.shape[1], len(first)), np.float32) * size).astype(int))
    low, high = np.percentile(samples, [2.5, 97.5], axis=1)
    rows = [[None if math.isnan(end) else end for end in row] for row in np.stack([value, low, high], axis=1).tolist()]
    return [dict(zip(ENDS, row, strict=True)) for row in rows]


def by_game(scores: Scores) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The scores [n], game by game, the games, and how many scores each has, [games]."""
    games, counts = np.unique([game for game, _ in scores], return_counts=True)
    return np.array([scores[cell] for cell in sorted(scores)]), games.tolist(), counts


def estimate(scores: Scores, resamples: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Estimates of STATISTICS, a function of these scores and the seed alone."""
    x, games, counts = by_game(scores)
    in_mean = np.array([has_range(game) for game in games])
    rows = bootstrap(lambda drawn: aggregate(x.take(drawn), counts, in_mean), counts, resamples, seed)
    return dict(zip(STATISTICS, rows, strict=True))


def profile(scores: Scores) -> dict[str, list[float]]:
    """The share of the scores above each of TAU, and its interval's ends, each [taus].

    A score drawn for a game is above tau with the chance q that any of the game's scores is. With F(k) the chance that
    at most k of those drawn so far are above, one more makes it (1 - q) F(k) + q F(k - 1).
    """
    x, _, counts = by_game(scores)
    above = x[:, None] > TAU  # [n, taus]
    chances = np.add.reduceat(above, np.cumsum(counts) - counts, axis=0, dtype=float) / counts[:, None]  # [games, taus]
    at_most = np.ones((len(x) + 1, len(TAU)))  # F(k)
    for chance in np.repeat(chances, counts, axis=0):
        at_most -= chance * np.diff(at_most, axis=0, prepend=0)
    low, high = ((at_most < end).sum(axis=0) / len(x) for end in (0.025, 0.975))
    return dict(zip(ENDS, (above.mean(axis=0).tolist(), low.tolist(), high.tolist()), strict=True))


def improvement(x: Scores, y: Scores, resamples: int, seed: int) -> dict[str, float | None]:
    """Estimate of the probability of improvement of X over Y, on the games that both have."""
    common = {game for game, _ in x} & {game for game, _ in y}
    (xs, games, n), (ys, _, m) = (by_game({cell: of[cell] for cell in of if cell[0] in common}) for of in (x, y))
    of_x, of_y = (np.repeat(np.arange(len(games)), counts) for counts in (n, m))  # the games of the scores, as numbers
    same, before = of_x[:, None] == of_y, of_x[:, None] > of_y  # [len(xs), len(ys)]
    # A draw says which of its game's ys it is, from the least on: all are equally probable, so none need be sorted.
    less = (before | same & (ys < xs[:, None])).sum(axis=1)  # [len(xs)], where the ys that a score beats end, and
    up_to = less + (same & (ys == xs[:, None])).sum(axis=1)  # where those equal to it do
    starts = np.repeat(np.cumsum(m) - m, n)  # [len(xs)], where the ys of a score's game begin
    weights = np.repeat(1 / (n * m * len(games)), n)  # [len(xs)], to the mean of a game's pairs, and of the games

    def probability(drawn: np.ndarray) -> np.ndarray:  # [r, len(xs) + len(ys)] -> [1, r]
        row, (of_xs, of_ys) = np.arange(len(drawn))[:, None], np.split(drawn, [len(xs)], axis=1)
        cells = row * len(ys) + of_ys - len(xs)
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)  # how often each of ys got drawn
        ahead = np.pad(times.cumsum(axis=1), ((0, 0), (1, 0)))  # [r, len(ys) + 1], draws among the first k of ys
        row *= len(ys) + 1
        beaten = (ahead.take(row + less[of_xs]) + ahead.take(row + up_to[of_xs])) / 2 - starts  # a tie is half a win
        return (beaten * weights).sum(axis=1)[None]  # no @: on busy cores BLAS's threads wait long for each other

    return bootstrap(probability, np.concatenate([n, m]), resamples, seed)[0]


# === report ===========================================================================================================
SPLITS = {"ID": ID_GAMES, "near-OOD": NEAR_OOD_GAMES, "far-OOD": FAR_OOD_GAMES}
SPLITS["all"] = ID_GAMES + NEAR_OOD_GAMES + FAR_OOD_GAMES
GROUPS = {  # the paper's methods, in the order to show them, by what they learn from
    "baseline": "random e2e".split(),
    "image": "curl mae".split(),
    "video": "atc siammae r3m".split(),
    "demonstration": "bc spr idm spr_idm".split(),
    "trajectory": "dt cql_mse cql".split(),
}
GROUP_OF = {method: group for group, methods in GROUPS.items() for method in methods}
SHADES = {"baseline": "Greys", "image": "Blues", "video": "Greens", "demonstration": "Oranges", "trajectory": "Purples"}
SHADES["other"] = "RdPu"  # of methods that are not the paper's


def about(split: str, methods: dict[str, Scores], over: str) -> dict:
    """What the estimates on a split rest on."""
    marked, cells = lacks(methods), sorted(set().union(*methods.values()))
    counts = Counter(game for game, _ in cells)  # seeds of each game
    least, most = min(counts.values()), max(counts.values())
    seeds = "1 seed" if most == 1 else f"{most} seeds" if least == most else f"{least} to {most} seeds"
    notes = [f"{method}* lacks {what}." for method, what in marked.items()]
    if marked and over in methods:
        notes.append(f"P(> {over}) is over the games that a method has in common with {over}.")
    notes += [f"The mean leaves out {g}: its random score is its reference score." for g in counts if not has_range(g)]
    if least == 1:
        single = list(counts.values()).count(1)
        notes.append(f"Games with a single seed ({single} of {len(counts)}) add nothing to the width of the intervals.")
    return {
        "coverage": f"{len(counts)} of {len(SPLITS[split])} games, {seeds}",
        "games": list(counts),
        "seeds": sorted({seed for _, seed in cells}),
        "marked": list(marked),
        "notes": notes,
    }


def as_markdown(heading: str, estimates: dict, facts: dict, over: str) -> str:
    """A table with aligned columns, its coverage above, its notes below."""
    columns = STATISTICS | ({"improvement": f"P(> {over})"} if over else {})
    lines = [["method", "learns from", *columns.values()]]
    for method, row in estimates.items():
        ends = [row.get(name, {"value": None}).values() for name in columns]
        numbers = ["-" if None in e else "{:.3f} [{:.3f}, {:.3f}]".format(*e) for e in ends]
        lines.append([method + "*" * (method in facts["marked"]), GROUP_OF.get(method, "other"), *numbers])
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])] for line in lines]
    lines.insert(1, [*("-" * width for width in widths[:2]), *("-" * (width - 1) + ":" for width in widths[2:])])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"## {heading}: {facts['coverage']}", rows, *facts["notes"]]) + "\n"


# === figures ==========================================================================================================
def colours(results: dict) -> dict[str, tuple]:
    """A colour for each method, a shade of its group's; the paper's methods always have the same."""
    groups = GROUPS | {"other": sorted({m for of in results.values() for m in of["all"]} - GROUP_OF.keys())}
    shades = {group: np.linspace(0.4, 0.9, max(len(methods), 2)) for group, methods in groups.items()}
    return {
        method: matplotlib.colormaps[SHADES[group]](shade)
        for group, methods in groups.items()
        for method, shade in zip(methods, shades[group], strict=False)
    }


def panels(results: dict, facts: dict, heights: list[float], caption: str) -> tuple[Figure, list[tuple]]:
    """A figure with a row for each suite, so high in inches, and a panel for each split: all (suite, split, panel)."""
    columns = [split for split in SPLITS if any(split in splits for splits in results.values())]
    longest = max(len(method) for splits in results.values() for method in splits["all"])
    width = 0.5 + 2.5 * len(columns) + 0.08 * longest
    figure, found = Figure((max(width, 6.5), 0.6 + sum(heights)), layout="constrained"), []
    if any(splits["all"]["marked"] for splits in facts.values()):
        caption += "; *: some games or seeds are missing"
    figure.supxlabel(caption, fontsize=9, parse_math=False)
    rows = figure.subfigures(len(results), 1, height_ratios=heights, squeeze=False)[:, 0]
    for suite, row in zip(results, rows, strict=True):
        row.suptitle(suite, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
        for split, panel in zip(columns, row.subplots(1, len(columns), squeeze=False)[0], strict=True):
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(labelsize=8, left=False)
            if split in results[suite]:
                panel.set_title(f"{split}\n{facts[suite][split]['coverage']}", fontsize=8, loc="left")
                found.append((suite, split, panel))
            else:
                panel.set_axis_off()
    return figure, found


def draw_rows(results: dict, facts: dict, name: str, line: float, caption: str) -> Figure:
    """A row for each method, with the estimate of that name and its interval, by groups; a line at what is neutral."""
    orders = {suite: [m for m, row in of["all"].items() if name in row] for suite, of in results.items()}
    orders = {suite: order for suite, order in orders.items() if order}
    results = {suite: results[suite] for suite in orders}
    figure, found = panels(results, facts, [1.0 + 0.25 * len(order) for order in orders.values()], caption)
    colour_of, labelled = colours(results), set()
    for suite, split, panel in found:
        order, row_of = orders[suite], results[suite][split]
        groups = [GROUP_OF.get(method, "other") for method in order]
        for y, method in enumerate(order):
            if y and groups[y] != groups[y - 1]:
                panel.axhline(y - 0.5, color="lightgray", linewidth=0.6)
            if name not in row_of.get(method, ()):
                continue
            value, low, high = row_of[method][name].values()
            panel.barh(y, value - line, left=line, color=colour_of[method])
            edge = withStroke(linewidth=2.4, foreground="white")  # also seen on a dark bar
            panel.plot([low, high], [y, y], color="black", linewidth=1.2, path_effects=[edge])
            mark = "*" * (method in facts[suite][split]["marked"])
            panel.text(max(value, high, line), y, f" {value:.2f}{mark}", va="center", fontsize=7)
        panel.axvline(line, color="black", linewidth=0.8)
        panel.margins(x=0.2)
        panel.locator_params("x", nbins=6)
        panel.set_ylim(len(order) - 0.5, -0.5)
        labels = [] if suite in labelled else order
        labelled.add(suite)
        panel.set_yticks(range(len(labels)), labels, parse_math=False)
    shown = {GROUP_OF.get(method, "other") for order in orders.values() for method in order}
    middle = {group: matplotlib.colormaps[shades](0.65) for group, shades in SHADES.items() if group in shown}
    handles = [Patch(color=colour, label=group) for group, colour in middle.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def draw_profiles(results: dict, facts: dict) -> Figure:
    """Performance profiles: a line for each method, a band its interval."""
    caption = "x: DQN-normalised score; y: share of runs above it; bands: 95% stratified bootstrap intervals"
    figure, found = panels(results, facts, [2.6] * len(results), caption)
    colour_of, lines = colours(results), {}
    styles = itertools.cycle(("-", "--", ":", "-."))  # beside the colours: the shades of a group are alike
    style_of = dict(zip(colour_of, styles, strict=False))
    for suite, split, panel in found:
        for method, row in results[suite][split].items():
            value, low, high = row["profile"].values()
            colour, style = colour_of[method], style_of[method]
            (lines[method],) = panel.plot(TAU, value, style, color=colour, linewidth=1.2)
            panel.fill_between(TAU, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_xlim(TAU[0], TAU[-1])
        panel.set_ylim(0, 1.02)
    order = [method for method in colour_of if method in lines]
    handles = [lines[method] for method in order]
    legend = figure.legend(handles, order, loc="outside right upper", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


# === main =============================================================================================================
def report(args: Args) -> None:
    check_numbers(args, "seed", "resamples")
    check_writable(args.output_dir)
    suites = load(args)
    lacking = [f"{s}: {method} lacks {cells}." for s, of in suites.items() for method, cells in lacks(of).items()]
    if lacking and not args.allow_missing:
        advice = "Others of the suite have these. Evaluate them, choose other --methods, or accept it: --allow-missing"
        raise SystemExit("\n".join([*lacking, advice]))

    over = reference(args, suites)
    results, facts, text = {suite: {} for suite in suites}, {suite: {} for suite in suites}, ""
    for suite, methods in suites.items():
        for split, games in SPLITS.items():
            scores = {method: {cell: of[cell] for cell in of if cell[0] in games} for method, of in methods.items()}
            if not any(scores.values()):
                continue
            estimates = {}
            for method, of in scores.items():
                if of:
                    estimates[method] = estimate(of, args.resamples, args.seed) | {"profile": profile(of)}
                if method != over and {game for game, _ in of} & {game for game, _ in scores.get(over, ())}:
                    estimates[method]["improvement"] = improvement(of, scores[over], args.resamples, args.seed)
            results[suite][split], facts[suite][split] = estimates, about(split, scores, over)
            compared = over if any("improvement" in row for row in estimates.values()) else ""
            text += as_markdown(f"{suite}, {split}", estimates, facts[suite][split], compared) + "\n"

    interval = "lines: 95% stratified bootstrap intervals"
    figures = {"iqm": draw_rows(results, facts, "iqm", 0, f"IQM of DQN-normalised scores, {interval}")}
    figures["profiles"] = draw_profiles(results, facts)
    if over:
        caption = f"probability of improvement over {over}, {interval}"
        figures["improvement"] = draw_rows(results, facts, "improvement", 0.5, caption)
    title = "# DQN-normalised scores with 95% stratified bootstrap intervals"
    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in figures)
    metadata = {"resamples": args.resamples, "seed": args.seed, "improvement_over": over, "tau": TAU.tolist()}
    content = {"results": results, "metadata": metadata | {"groups": GROUPS, "splits": facts}}
    with atomic_write(args.output_dir / "iqm.md") as file:
        file.write(f"{title}\n\n{pictures}\n\n{text}".encode())
    with atomic_write(args.output_dir / "iqm.json") as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode())
    for name, figure in figures.items():
        with atomic_write(args.output_dir / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=150)
    if not over:  # nor is there a figure of an earlier report
        (args.output_dir / "improvement.png").unlink(missing_ok=True)
    print(f"{text}Written to {args.output_dir}: iqm.md, iqm.json, {', '.join(f'{name}.png' for name in figures)}")


if __name__ == "__main__":
    report(tyro.cli(Args, description=__doc__))
