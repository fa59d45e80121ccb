# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Scores of Atari-PB (arXiv 2406.06037): IQM, performance profiles and more, with 95% bootstrap confidence intervals.

A raw score s of a game becomes x = (s - low) / (high - low). low and high are the lesser and the greater of a random
agent's score and the reference's, a DQN's (far-OOD: a Rainbow's). The n scores x of a split's games and seeds give
(2108.13264):

    IQM             interquartile mean: the mean without the int(n/4) least and the int(n/4) greatest scores
    median, mean    over the games, of each game's mean over its seeds
    optimality gap  1 - mean of min(x, 1); less is better
    profile         for each tau of 0, 0.02, ..., 2: the share of the scores that are greater than tau
    P(X > Y)        probability of improvement of X over Y: the mean over their common games of P(x > y) + P(x = y) / 2,
                    where x is any of X's scores of the game and y any of Y's

Intervals are percentiles 2.5 and 97.5 of 50,000 stratified bootstrap resamples: for each game, as many scores as it has
are drawn from its own, with replacement, for X and Y independently.

All games need the same number of seeds. --allow-missing takes others: a score then weighs 1 / (its game's number of
seeds), so that all games weigh the same, and the IQM leaves out a quarter of the weight at either end.

Results that were not made alike are refused: of a method, by other arguments or another pre-training; of a method and
seed, from another backbone; of a game, on other data; methods pre-trained on other data; smoke tests beside others.
--allow-mixed takes them, and what is mixed then stands under the table.

    python eval_iqm.py                                        # the scores in results/, as the fine-tunings write them
    python eval_iqm.py --suites bc --methods random curl atc  # some of them
    python eval_iqm.py --improvement-over e2e                 # instead of over random
    python eval_iqm.py --csv scores.csv                       # anybody's, with columns suite, method, game, seed, score

Prints a table for each suite (bc, rainbow, zeroshot, ...) and split. Writes reports/iqm.md (also with all scores),
iqm.json, iqm.png, profiles.png and, where there is a method to compare with, improvement.png.
"""

import csv
import io
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm


# === arguments ========================================================================================================
@dataclass
class Args:
    results: Path = Path("results")  # folder of <suite>/<method>/<game>/seed<k>.json, as the fine-tunings write them
    csv: Path | None = None  # table of raw scores to read instead, with columns suite, method, game, seed, score
    suites: tuple[str, ...] = ()  # suites to show, in this order; default: all
    methods: tuple[str, ...] = ()  # methods to show, in this order; default: all
    improvement_over: str = ""  # method to compare the others with; default: random, where it is shown
    allow_missing: bool = False  # show, marked *, methods that lack games or seeds; each game weighs the same
    allow_mixed: bool = False  # show results that were not made alike; what is mixed stands under the table
    resamples: int = 50_000  # bootstrap resamples, for each method and split
    seed: int = 0  # random seed of the bootstrap
    output_dir: Path = Path("reports")  # folder for iqm.md, iqm.json and the figures


# === statistics =======================================================================================================
STATISTICS = {"iqm": "IQM", "median": "median", "mean": "mean", "optimality_gap": "optimality gap"}
ENDS = ("value", "low", "high")  # an estimate and the ends of its interval
TAU = np.arange(101) / 50  # of the profiles
NOT_IN_MEAN = "montezuma_revenge"  # its random and reference scores are 0: any score above becomes something huge
Scores = dict[tuple[str, int], float]  # a method's normalised scores, by (game, seed)


def by_game(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores x [n] in the order of their games, the games [g], and how many scores each has, counts [g]."""
    games, counts = np.unique([game for game, _ in scores], return_counts=True)
    return np.array([scores[cell] for cell in sorted(scores)]), games, counts


def game_means(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r, n] -> [r, g]"""
    return np.add.reduceat(x, np.cumsum(counts) - counts, axis=1) / counts


def interquartile_mean(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r, n] -> [r]"""
    if (counts == counts[0]).all():
        cut = x.shape[1] // 4
        return np.sort(x, axis=1)[:, cut : x.shape[1] - cut].mean(axis=1)
    order = np.argsort(x, axis=1)
    weights = np.repeat(1 / counts, counts)[order]  # [r, n], those of a game sum to 1
    quarter = len(counts) / 4
    kept = np.diff(weights.cumsum(axis=1).clip(quarter, 3 * quarter), axis=1, prepend=quarter)  # [r, n]
    return (kept * np.take_along_axis(x, order, axis=1)).sum(axis=1) / (2 * quarter)


def bootstrap(statistics: Callable, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Values and ends of the intervals, [3, s]. `statistics` maps indices of scores, int [r, n], to [s, r]."""
    first = np.repeat(np.cumsum(counts) - counts, counts)  # [n], index of the first score of the same game
    size = np.repeat(counts, counts).astype(np.float32)  # [n], number of scores of the same game
    n = len(first)
    value = statistics(np.arange(n)[None])[:, 0]  # each score once
    samples = np.empty((len(value), resamples))
    rng = np.random.default_rng(seed)
    chunk = 1 + 2**15 // n  # resamples at a time: 256 KB, which stay in the processor's cache
    for i in range(0, resamples, chunk):
        part = samples[:, i : i + chunk]
        uniform = rng.random((part.shape[1], n), np.float32)
        part[:] = statistics(first + (uniform * size).astype(int))
    return np.stack([value, *np.percentile(samples, [2.5, 97.5], axis=1, overwrite_input=True)])


def estimate(scores: Scores, resamples: int, seed: int) -> dict[str, dict]:
    """STATISTICS and the profile, each with its interval."""
    x, games, counts = by_game(scores)
    in_mean = (games != NOT_IN_MEAN) | (len(games) == 1)
    weights = np.repeat(1 / (counts * len(counts)), counts)  # [n]
    taus_below = np.searchsorted(TAU, x)  # [n], number of taus that a score is above
    bins = len(TAU) + 1

    def statistics(drawn: np.ndarray) -> np.ndarray:
        r, scores = len(drawn), x.take(drawn)
        iqm = interquartile_mean(scores, counts)
        means = game_means(scores, counts)
        median, mean = np.median(means, axis=1), means[:, in_mean].mean(axis=1)
        gap = 1 - game_means(np.minimum(scores, 1), counts).mean(axis=1)
        bin_of = np.arange(r)[:, None] * bins + taus_below.take(drawn)
        histogram = np.bincount(bin_of.ravel(), np.tile(weights, r), r * bins).reshape(r, bins)
        profile = histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]  # [r, taus], weight above each tau
        return np.concatenate([[iqm, median, mean, gap], profile.T])

    found = bootstrap(statistics, counts, resamples, seed)
    estimates = {name: dict(zip(ENDS, found[:, i].tolist(), strict=True)) for i, name in enumerate(STATISTICS)}
    return estimates | {"profile": dict(zip(ENDS, found[:, len(STATISTICS) :].tolist(), strict=True))}


def improvement(x: Scores, y: Scores, resamples: int, seed: int) -> dict[str, float]:
    """P(X > Y) over the games that both have."""
    common = {game for game, _ in x} & {game for game, _ in y}
    x, games, n = by_game({cell: score for cell, score in x.items() if cell[0] in common})
    y, _, m = by_game({cell: score for cell, score in y.items() if cell[0] in common})
    wins = (x[:, None] > y) + (x[:, None] == y) / 2  # [len(x), len(y)]
    wins *= np.repeat(games, n)[:, None] == np.repeat(games, m)  # pairs of the same game
    wins /= np.repeat(len(games) * n * m, n)[:, None]  # summed, they give the mean over the games of the pairs' mean

    def statistics(drawn: np.ndarray) -> np.ndarray:
        cells = np.arange(len(drawn))[:, None] * drawn.shape[1] + drawn
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)  # that each score was drawn
        times_x, times_y = np.split(times.astype(float), [len(x)], axis=1)
        return (times_x @ wins * times_y).sum(axis=1)[None]

    found = bootstrap(statistics, np.concatenate([n, m]), resamples, seed)
    return dict(zip(ENDS, found[:, 0].tolist(), strict=True))


# === files [shared] ===================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


# === games [shared] ===================================================================================================
# ID, in distribution: for pre-training. OOD, out of distribution: for fine-tuning alone.
ID_GAMES = """air_raid amidar asteroids atlantis bank_heist battle_zone berzerk bowling boxing breakout carnival
    centipede chopper_command crazy_climber demon_attack double_dunk elevator_action enduro fishing_derby freeway
    frostbite gopher gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman
    name_this_game phoenix pitfall private_eye qbert road_runner robotank skiing solaris space_invaders star_gunner
    tennis time_pilot tutankham up_n_down video_pinball wizard_of_wor yars_revenge zaxxon""".split()  # for pre-training
NEAR_OOD_GAMES = "alien assault asterix beam_rider journey_escape pong pooyan riverraid seaquest venture".split()
FAR_OOD_GAMES = "basic_math human_cannonball klax othello surround".split()
DQN_REPLAY_GAMES = sorted(ID_GAMES + NEAR_OOD_GAMES)  # game_id is a game's place in this list


def parse_game(name: str, games: list[str]) -> str:
    """ALE's name of one of these games: `ms_pacman` for both `ms_pacman` and `MsPacman`"""
    for game in games:
        if game.replace("_", "") == name.replace("_", "").lower():
            return game
    raise SystemExit(f"Unknown game {name!r}. Choose from: {' '.join(games)}")


# === scores ===========================================================================================================
# Scores of a random agent and of the reference: DQN after 50M frames; for far-OOD games, Rainbow after 2M agent steps.
TABLE = """
    air_raid 579.25 7479.5, alien 227.8 2484.49, amidar 5.8 1207.74, assault 222.4 1525.24, asterix 210.0 2711.41,
    asteroids 719.1 698.37, atlantis 12850.0 853640.0, bank_heist 14.2 601.79, basic_math 0.0033 3.57,
    battle_zone 2360.0 17784.84, beam_rider 363.9 5852.42, berzerk 123.7 487.48, bowling 23.1 30.12, boxing 0.1 77.99,
    breakout 1.7 96.23, carnival 700.8 4784.84, centipede 2090.9 2583.03, chopper_command 811.0 2690.61,
    crazy_climber 10780.5 104568.76, demon_attack 152.1 6361.58, double_dunk -18.6 -6.54, elevator_action 4387.0 439.77,
    enduro 0.0 628.91, fishing_derby -91.7 0.58, freeway 0.0 26.27, frostbite 65.2 367.07, gopher 257.6 5479.9,
    gravitar 173.0 330.07, hero 1027.0 17325.44, human_cannonball 1.0767 5.56, ice_hockey -11.2 -5.84,
    jamesbond 29.0 573.31, journey_escape -19977.0 -3671.09, kangaroo 52.0 11485.98, klax 0.3734 2124.75,
    krull 1598.0 6097.63, kung_fu_master 258.5 23435.38, montezuma_revenge 0.0 0.0, ms_pacman 307.3 3402.4,
    name_this_game 2292.3 7278.65, othello -21.3233 -2.01, phoenix 761.4 4996.58, pitfall -229.4 -73.81,
    pong -20.7 16.61, pooyan 371.2 3211.96, private_eye 24.9 -16.04, qbert 163.9 10117.5, riverraid 1338.5 11638.93,
    road_runner 11.5 36925.47, robotank 2.2 59.77, seaquest 68.4 1600.66, skiing -17098.1 -15824.61,
    solaris 1236.3 1436.4, space_invaders 148.0 1794.24, star_gunner 664.0 42165.22, surround -9.9833 -7.81,
    tennis -23.8 -1.5, time_pilot 3568.0 3654.37, tutankham 11.4 103.84, up_n_down 533.4 8488.31, venture 0.0 39.13,
    video_pinball 16256.9 63406.11, wizard_of_wor 563.5 2065.8, yars_revenge 3092.9 23909.38, zaxxon 32.5 4538.57"""
SCORES = {game: (float(random), float(reference)) for game, random, reference in map(str.split, TABLE.split(","))}


def normalize(game: str, score: float) -> float:
    """DQN-normalised score, (score - low) / (high - low), where low and high are the two scores of the game, sorted"""
    low, high = sorted(SCORES[game])
    return (score - low) / (high - low + 1e-6)  # as in the original code: both are 0 in montezuma_revenge


# === results ==========================================================================================================
KEYS = ("suite", "method", "game", "seed", "score")
SPLITS = {"ID": ID_GAMES, "near-OOD": NEAR_OOD_GAMES, "far-OOD": FAR_OOD_GAMES}
SPLITS["all"] = ID_GAMES + NEAR_OOD_GAMES + FAR_OOD_GAMES
GROUPS = {  # the paper's methods, by what they learn from, in the order of the tables
    "baseline": "random e2e".split(),
    "image": "curl mae".split(),
    "video": "atc siammae r3m".split(),
    "demonstration": "bc spr idm spr_idm".split(),
    "trajectory": "dt cql_mse cql".split(),
}
GROUP_OF = {method: group for group, methods in GROUPS.items() for method in methods}
# What all results of a suite, or all of the same method, game or seed, have in common: a fact and these keys. A smoke
# test is on random play or has a shortened evaluation; the backbone is a digest of the pre-trained weights.
KEYS_OF = {"smoke_test": (), "backbone": ("method", "seed"), "data": ("game",)}
KEYS_OF |= dict.fromkeys("args.runs args.checkpoints args.num_transitions args.action_offset".split(), ("game",))
KEYS_OF |= {f"pretraining.{name}": () for name in "data games runs checkpoints rows_per_checkpoint".split()}
OTHERS = ("method",)  # keys of all other arguments of the fine-tuning (args) and the pre-training, but for these
IRRELEVANT = """seed data_dir play_rows cache_dir replay_dir results device compile video num_workers run_name resume
    overwrite log_every eval_every save_every""".split()
TOLD = "game games method checkpoint backbone pretraining data".split()  # arguments that a result tells elsewhere


def find_facts(record: dict) -> dict:
    """What a result is compared by, such as "args.epochs" and "pretraining.step". Older results have fewer facts."""
    facts = {name: record[name] for name in ("smoke_test", "backbone", "data") if name in record}
    if "pretraining" in record:
        pretraining = record["pretraining"] or {"step": None}  # without one, or from the authors' file
        facts |= {f"pretraining.{name}": value for name, value in pretraining.items() if name not in IRRELEVANT}
    args = record.get("args", {})
    return facts | {f"args.{name}": value for name, value in args.items() if name not in (*IRRELEVANT, *TOLD)}


def parse(place: str, record: dict) -> dict:
    """A result with its normalised score x and its facts."""
    absent = [key for key in KEYS if record.get(key) in (None, "")]
    if absent:
        raise SystemExit(f"{place} lacks {', '.join(absent)}.")
    try:
        game, seed = parse_game(record["game"], SPLITS["all"]), int(record["seed"])
        x = normalize(game, float(record["score"]))
    except (ValueError, SystemExit) as error:
        raise SystemExit(f"{place}: {error}") from error
    if not np.isfinite(x):
        raise SystemExit(f"{place}: the score is {record['score']}.")
    return record | {"place": place, "game": game, "seed": seed, "x": x, "facts": find_facts(record)}


def read_csv(path: Path) -> list[dict]:
    """Results from a table as spreadsheets write it, separated by commas, semicolons or tabs"""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not in UTF-8. Export it again, with this encoding.") from error
    lines = text.splitlines()
    separator = max(",;\t", key="".join(lines[:1]).count)
    reader = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)
    absent = [key for key in KEYS if key not in (reader.fieldnames or KEYS)]
    if absent:
        raise SystemExit(f"{path}, line 1: no {', '.join(absent)}, separated by commas, semicolons or tabs.")
    results = []
    for row in reader:
        record = {key: row[key] for key in KEYS}
        if any(record.values()):  # spreadsheets may end with blank rows
            if separator == ";":  # where 1.5 is written 1,5
                record["score"] = (record["score"] or "").replace(",", ".")
            results.append(parse(f"{path}, line {reader.line_num}", record))
    return results


def read(args: Args) -> list[dict]:
    if args.csv:
        return read_csv(args.csv.expanduser())
    results = []
    for path in sorted(args.results.expanduser().glob("*/*/*/seed*.json")):
        try:
            results.append(parse(f"{path}", json.loads(path.read_text())))
        except ValueError as error:
            raise SystemExit(f"{path} is damaged ({error}). Delete it and evaluate again.") from error
    return results


def choose(option: str, wanted: tuple[str, ...], found: set[str], first: Iterable[str] = ()) -> list[str]:
    """What an option asks for, in its order. If it asks for nothing: all that was found, `first` first."""
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise SystemExit(f"{option}: no scores of {', '.join(unknown)}, only of {', '.join(sorted(found))}.")
    return list(wanted) or [name for name in first if name in found] + sorted(found - set(first))


def load(args: Args) -> list[dict]:
    """The results to show, in the order of the report."""
    results, places = read(args), {}
    for result in results:
        key = tuple(result[name] for name in KEYS[:4])
        if key in places:
            raise SystemExit(f"{result['place']} repeats {places[key]}. Remove one of the two.")
        places[key] = result["place"]
    suites = choose("--suites", args.suites, {result["suite"] for result in results})
    methods = choose("--methods", args.methods, {result["method"] for result in results}, GROUP_OF)
    results = [result for result in results if result["suite"] in suites and result["method"] in methods]
    if not results:
        raise SystemExit(f"No results found in {args.csv or args.results / '<suite>/<method>/<game>/seed<k>.json'}.")
    return sorted(results, key=lambda result: (suites.index(result["suite"]), methods.index(result["method"])))


def by(key: str, results: list[dict]) -> dict[str, list[dict]]:
    groups = {}
    for result in results:
        groups.setdefault(result[key], []).append(result)
    return groups


def missing(results: list[dict]) -> dict[str, str]:
    """What methods of a suite lack: {"curl": "0 of 3 seeds of pong; 1 of 3 seeds of alien, qbert"}."""
    counts = Counter((result["method"], result["game"]) for result in results)
    games, most = sorted(by("game", results)), max(counts.values())
    lacking = {}
    for method in by("method", results):
        for n in range(most):
            few = [game for game in games if counts[method, game] == n]
            if few:
                lacking.setdefault(method, []).append(f"{n} of {most} seeds of {', '.join(few)}")
    return {method: "; ".join(parts) for method, parts in lacking.items()}


def mixed(results: list[dict]) -> list[str]:
    """The facts in which results of a suite must not differ and do: where, and an example of two values."""
    first, differing = {}, {}
    for result in results:
        for name, value in result["facts"].items():
            group = tuple(result[key] for key in KEYS_OF.get(name, OTHERS))
            other = first.setdefault((name, group), result)
            if other["facts"][name] != value:
                differing.setdefault(name, {}).setdefault(group, (other, result))
    lines = []
    for name, examples in differing.items():
        where = [" seed ".join(map(str, group)) for group in examples if group]  # such as "atc", "atc seed 0", "pong"
        one, other = next(iter(examples.values()))
        values = [f"{json.dumps(result['facts'][name])} in {result['place']}" for result in (one, other)]
        lines.append(f"{', '.join([one['suite'], *where])}: {name} is {', but '.join(values)}.")
    return lines


# === report ===========================================================================================================
def estimate_all(results: list[dict], args: Args, over: str, title: str) -> dict[str, dict[str, dict]]:
    """The estimates of each method."""
    scores, estimates = {}, {}
    for result in results:
        scores.setdefault(result["method"], {})[result["game"], result["seed"]] = result["x"]
    for method in tqdm(scores, title, unit="method", leave=False):
        estimates[method] = estimate(scores[method], args.resamples, args.seed)
        common = {game for game, _ in scores[method]} & {game for game, _ in scores.get(over, ())}
        if common and method != over:
            estimates[method]["improvement"] = improvement(scores[method], scores[over], args.resamples, args.seed)
    return estimates


def describe(results: list[dict], split: str) -> dict:
    """What the estimates of a split rest on."""
    counts = Counter((result["method"], result["game"]) for result in results)
    games, least, most = by("game", results), min(counts.values()), max(counts.values())
    seeds = f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most > 1)}"
    lacking = missing(results)
    notes = [f"{method}* has only {what}." for method, what in lacking.items()]
    if least < most:
        notes.append("Each game weighs the same, whatever its number of seeds.")
    if least == 1:
        notes.append("Games with a single seed add nothing to the width of an interval.")
    if NOT_IN_MEAN in games and len(games) > 1:
        notes.append(f"The mean leaves out {NOT_IN_MEAN}: its random score is its reference score.")
    smoke_test = any(result.get("smoke_test") for result in results)
    if smoke_test:
        notes.append("Smoke tests, on random play or with a shortened evaluation, do not tell how good a method is.")
    notes += [f"Mixed: {line}" for line in mixed(results)]
    for result in results:
        done = result.get("pretraining")
        if done and done["step"] < done["total_steps"]:
            steps = f"step {done['step']:,} of {done['total_steps']:,}"
            notes.append(f"{result['method']}: pre-training is unfinished, at {steps}.")
    coverage = f"{len(games)} of {len(SPLITS[split])} games, {seeds}"
    return {"coverage": coverage, "marked": list(lacking), "smoke_test": smoke_test, "notes": [*dict.fromkeys(notes)]}


def as_markdown(title: str, estimates: dict, facts: dict, over: str) -> str:
    """A table with aligned columns, its coverage above, its notes below."""
    columns = dict(STATISTICS)
    if any("improvement" in row for row in estimates.values()):
        columns["improvement"] = f"P(> {over})"
    width = 1 + max(len("method"), *map(len, estimates))
    lines = [f"## {title}{', smoke test' * facts['smoke_test']}: {facts['coverage']}", ""]
    lines += [f"| {'method':{width}} | learns from   | {' | '.join(f'{name:>24}' for name in columns.values())} |"]
    lines += [f"| {'-' * width} | {'-' * 13} | {' | '.join(['-' * 23 + ':'] * len(columns))} |"]
    for method, row in estimates.items():
        name = method + "*" * (method in facts["marked"])
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[c]) if c in row else "-" for c in columns]
        cells = " | ".join(f"{cell:>24}" for cell in cells)
        lines += [f"| {name:{width}} | {GROUP_OF.get(method, 'other'):13} | {cells} |"]
    for note in facts["notes"]:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def scores_as_markdown(suite: str, results: list[dict]) -> str:
    """A table of games and methods: the mean of the raw scores over the seeds, and their number"""
    methods = by("method", results)
    width = max(14, *map(len, methods))
    lines = [f"## {suite}: mean raw scores (number of seeds)", ""]
    lines += [f"| {'game':17} | {' | '.join(f'{method:>{width}}' for method in methods)} |"]
    lines += [f"| {'-' * 17} | {' | '.join(['-' * (width - 1) + ':'] * len(methods))} |"]
    for game, of_game in sorted(by("game", results).items()):
        cells = dict.fromkeys(methods, "-")
        for method, of_method in by("method", of_game).items():
            scores = [float(result["score"]) for result in of_method]
            cells[method] = f"{np.mean(scores):.2f} ({len(scores)})"
        lines += [f"| {game:17} | {' | '.join(f'{cell:>{width}}' for cell in cells.values())} |"]
    return "\n".join(lines) + "\n"


# === figures ==========================================================================================================
SHADES = {"baseline": "Greys", "image": "Blues", "video": "Greens", "demonstration": "Oranges", "trajectory": "Purples"}
SHADES["other"] = "RdPu"  # of methods that are not the paper's
matplotlib.rcParams["text.parse_math"] = False  # names with a $ are drawn as they are


def colours(methods: set[str]) -> dict[str, tuple]:
    """A colour for each method, a shade of its group's. The paper's methods always have the same."""
    found = {}
    for group, members in (GROUPS | {"other": sorted(methods - GROUP_OF.keys())}).items():
        shades = np.linspace(0.4, 0.9, max(len(members), 2))
        for method, shade in zip(members, shades, strict=False):
            found[method] = matplotlib.colormaps[SHADES[group]](shade)
    return found


def draw(tables: dict, facts: dict, name: str, caption: str) -> Figure:
    """The estimates of this name: a row of panels for each suite, a panel for each split."""
    shown = {suite: [m for m, row in splits["all"].items() if name in row] for suite, splits in tables.items()}
    shown = {suite: methods for suite, methods in shown.items() if methods}
    colour_of = colours(set().union(*shown.values()))
    style_of = dict(zip(colour_of, itertools.cycle(("-", "--", ":", "-.")), strict=False))  # shades alone are alike
    heights = [2.6 if name == "profile" else 1 + 0.25 * len(methods) for methods in shown.values()]
    figure, legend = Figure((11.5, 0.6 + sum(heights)), layout="constrained"), {}
    if any(of["all"]["marked"] for of in facts.values()):
        caption += "; *: lacks games or seeds"
    figure.supxlabel(caption, fontsize=9)
    rows = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (suite, methods), row in zip(shown.items(), rows, strict=True):
        title = suite + ", smoke test" * facts[suite]["all"]["smoke_test"]
        row.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = row.subplots(1, len(tables[suite]), sharey=True, squeeze=False)[0]
        for split, panel in zip(tables[suite], panels, strict=True):
            panel.set_title(f"{split}\n{facts[suite][split]['coverage']}", fontsize=8, loc="left")
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(labelsize=8, left=False)
            if name == "profile":
                panel.set(xlim=(TAU[0], TAU[-1]), ylim=(0, 1.02))
            else:
                panel.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
                panel.use_sticky_edges = False  # space for the numbers beside the bars
                panel.margins(x=0.2)
                if name == "improvement":
                    panel.axvline(0.5, color="gray", linewidth=0.8)
            for y, method in enumerate(methods):
                if name not in tables[suite][split].get(method, ()):
                    continue
                (value, low, high), colour = tables[suite][split][method][name].values(), colour_of[method]
                if name == "profile":
                    panel.fill_between(TAU, low, high, color=colour, alpha=0.12, linewidth=0)
                    (legend[method],) = panel.plot(TAU, value, style_of[method], color=colour, linewidth=1.2)
                else:  # a bar from low to high, a dot at the value
                    legend[GROUP_OF.get(method, "other")] = panel.barh(y, high - low, left=low, color=colour)
                    panel.plot(value, y, "o", color="white", markeredgecolor="black", markersize=4)
                    mark = "*" * (method in facts[suite][split]["marked"])
                    panel.text(max(value, high), y, f"  {value:.2f}{mark}", va="center", fontsize=7)
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


# === main =============================================================================================================
def report(args: Args) -> None:
    if args.resamples < 1:
        raise SystemExit("--resamples must be at least 1.")
    results = load(args)
    suites, methods = by("suite", results), set(by("method", results))
    for suite, of_suite in suites.items():
        lines = mixed(of_suite)
        if lines and not args.allow_mixed:
            raise SystemExit(f"{lines[0]}\nMake one of them again, choose other --methods, or use --allow-mixed.")
        lines = [f"{suite}: {method} has only {what}." for method, what in missing(of_suite).items()]
        if lines and not args.allow_missing:
            raise SystemExit("\n".join([*lines, "Evaluate the rest, choose other --methods, or use --allow-missing."]))
    over = args.improvement_over or "random" * ("random" in methods)
    choose("--improvement-over", (over,) if over else (), methods)
    args.output_dir = args.output_dir.expanduser()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tables, facts, text = {suite: {} for suite in suites}, {suite: {} for suite in suites}, ""
    for suite, split in itertools.product(suites, SPLITS):
        of_split = [result for result in suites[suite] if result["game"] in SPLITS[split]]
        if of_split:
            tables[suite][split] = estimate_all(of_split, args, over, f"{suite}, {split}")
            facts[suite][split] = describe(of_split, split)
            text += as_markdown(f"{suite}, {split}", tables[suite][split], facts[suite][split], over) + "\n"

    interval = "95% stratified bootstrap intervals"
    figures = {"iqm": draw(tables, facts, "iqm", f"IQM of DQN-normalised scores; bars: {interval}")}
    caption = f"x: DQN-normalised score; y: share of runs above it; bands: {interval}"
    figures["profiles"] = draw(tables, facts, "profile", caption)
    if any("improvement" in row for splits in tables.values() for row in splits["all"].values()):
        figures["improvement"] = draw(tables, facts, "improvement", f"P(X > {over}); bars: {interval}")

    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in figures)
    metadata = {"resamples": args.resamples, "seed": args.seed, "improvement_over": over, "tau": TAU.tolist()}
    metadata |= {"groups": GROUPS, "splits": facts}
    scores = "\n".join(scores_as_markdown(suite, of_suite) for suite, of_suite in suites.items())
    files = {"iqm.md": f"# DQN-normalised scores with {interval}\n\n{pictures}\n\n{text}\n{scores}".encode()}
    files["iqm.json"] = json.dumps({"results": tables, "metadata": metadata}, indent=2).encode()
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        files[f"{name}.png"] = image.getvalue()
    for name, content in files.items():
        with whole_file(args.output_dir / name) as temporary:
            temporary.write_bytes(content)
    if "improvement" not in figures:
        (args.output_dir / "improvement.png").unlink(missing_ok=True)  # of an earlier report
    print(f"{text}Written to {args.output_dir}: {', '.join(files)}")


if __name__ == "__main__":
    report(tyro.cli(Args, description=__doc__))
