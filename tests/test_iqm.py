"""eval_iqm.py against rliable, exact enumeration and the golden scores, and as its user sees it."""

import copy
import csv
import itertools
import json
import math
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load
from PIL import Image
from rliable import library, metrics

GOLDEN = Path(__file__).parent / "golden" / "scores.csv"
ORACLES = {
    "iqm": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality_gap": metrics.aggregate_optimality_gap,
}

iqm = load("eval_iqm.py")
GAMES = sorted(set(iqm.SPLITS["all"]) - {"montezuma_revenge"})
Table = dict[str, list[float]]  # the scores of each game


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def report(**args: object) -> dict:
    """iqm.json of a report on x.csv, if there is one, else on results/."""
    source = {"csv": Path("x.csv")} if Path("x.csv").exists() else {}
    iqm.report(iqm.Args(**source | {"resamples": 20} | args))
    return json.loads(Path("reports", "iqm.json").read_text())


def refuses(**args: object) -> str:
    """The message with which the script ends, before it writes anything."""
    with pytest.raises(SystemExit) as stopped:
        report(**args)
    assert not Path("reports").exists()
    assert isinstance(stopped.value.code, str)  # which Python prints, to exit with 1
    return stopped.value.code


def write_csv(rows: list[tuple]) -> None:
    with open("x.csv", "w", newline="") as file:
        csv.writer(file).writerows([("suite", "method", "game", "seed", "score"), *rows])


def write_result(suite: str, method: str, game: str, seed: int, score: float = 1.0, **others: object) -> Path:
    path = Path("results", suite, method, game, f"seed{seed}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(suite=suite, method=method, game=game, seed=seed, score=score) | others))
    return path


def raw(game: str, normalized: float) -> float:
    low, high = sorted(iqm.SCORES[game])
    return low + normalized * (high - low)


def cells(table: Table) -> dict[tuple[str, int], float]:
    """As the script has them."""
    return {(game, seed): score for game, scores in table.items() for seed, score in enumerate(scores)}


def matrix(seeds: int, games: int) -> tuple[np.ndarray, dict]:
    """Normalised scores [seeds, games] with heavy tails, as rliable has them and as the script does."""
    scores = np.random.default_rng([seeds, games]).standard_t(2, (seeds, games)) + 0.7
    return scores, cells(dict(zip(GAMES, scores.T.tolist(), strict=False)))


def tied(seeds: int, games: int, seed: int) -> tuple[np.ndarray, dict]:
    """Scores [seeds, games] in steps of 0.1, so that some are equal to each other and to a tau."""
    scores = np.random.default_rng(seed).integers(-2, 15, (seeds, games)) / 10
    return scores, cells(dict(zip(GAMES, scores.T.tolist(), strict=False)))


# === the same number of seeds of every game: rliable ==================================================================
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (3, 2), (3, 5), (5, 26), (10, 7), (4, 50), (3, 64)])
def test_values_equal_rliable(shape):
    scores, of = matrix(*shape)
    estimates = iqm.estimate(of, resamples=1, seed=0)
    for name, oracle in ORACLES.items():
        assert np.isclose(estimates[name]["value"], oracle(scores), rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("shape", [(3, 26), (10, 4)])
def test_intervals_agree_with_rliable(shape):
    scores, of = matrix(*shape)
    np.random.seed(0)  # noqa: NPY002, rliable draws from this
    together = lambda x: np.array([oracle(x) for oracle in ORACLES.values()])  # noqa: E731
    _, intervals = library.get_interval_estimates({"it": scores}, together, reps=5_000)
    estimates = iqm.estimate(of, resamples=20_000, seed=0)
    for name, (low, high) in zip(ORACLES, intervals["it"].T, strict=True):
        # The 2.5th percentile of 5,000 draws of a normal distribution has a standard error of 1% of the interval.
        assert abs(estimates[name]["low"] - low) < 0.05 * (high - low), name
        assert abs(estimates[name]["high"] - high) < 0.05 * (high - low), name


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (5, 26)])
def test_profiles_equal_rliable(shape):
    """The share of runs above tau, strictly, at every tau; the bands to within what 2,000 resamples tell."""
    scores, of = tied(*shape, seed=3)
    found = iqm.estimate(of, 5_000, seed=0)["profile"]
    np.random.seed(0)  # noqa: NPY002
    expected, bands = library.create_performance_profile({"it": scores}, iqm.TAU, reps=2_000)
    np.testing.assert_allclose(found["value"], expected["it"], rtol=1e-12, atol=1e-12)
    for end, band in zip(("low", "high"), bands["it"], strict=True):
        apart = np.abs(np.array(found[end]) - band) * scores.size  # in runs
        assert apart.max() <= 1 + 1e-9 and apart.mean() < 0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (5, 26), (3, 64)])
def test_probability_of_improvement_equals_rliable(shape):
    (x, of_x), (y, of_y) = tied(*shape, seed=1), tied(*shape, seed=2)
    found = iqm.improvement(of_x, of_y, 20_000, seed=0)
    assert found["value"] == pytest.approx(metrics.probability_of_improvement(x, y), rel=1e-6)
    reverse = iqm.improvement(of_y, of_x, 10, seed=0)
    assert reverse["value"] == pytest.approx(1 - found["value"], rel=1e-6)
    if shape not in ((3, 2), (2, 5)):  # one has no interval, of the others it takes rliable minutes
        return
    np.random.seed(0)  # noqa: NPY002
    together = lambda x, y: np.array([metrics.probability_of_improvement(x, y)])  # noqa: E731
    _, intervals = library.get_interval_estimates({"x,y": (x, y)}, together, reps=1_000)
    low, high = intervals["x,y"][:, 0]
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.12 * (high - low) + 1e-6)


# === different numbers of seeds: the definitions, and all resamples ===================================================
def average(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def plain_statistics(table: Table) -> dict[str, float]:
    """The definitions, of lists: as if every score stood in its game so often that all games have equally many."""
    many = math.lcm(*map(len, table.values()), 4)  # a multiple of 4: exactly a quarter of them is cut at either end
    scores = sorted(score for of in table.values() for score in of for _ in range(many // len(of)))
    cut = len(scores) // 4
    means = sorted(average(of) for of in table.values())
    return {
        "iqm": average(scores[cut:-cut]),
        "median": average(means[(len(means) - 1) // 2 : len(means) // 2 + 1]),
        "mean": average([average(of) for game, of in table.items() if game != "montezuma_revenge"]),
        "optimality_gap": 1 - average([min(score, 1) for score in scores]),
    }


def resamples_of(table: Table) -> list[Table]:
    """All that are equally probable."""
    drawn = itertools.product(*(itertools.product(of, repeat=len(of)) for of in table.values()))
    return [dict(zip(table, of, strict=True)) for of in drawn]


UNEQUAL = {"pong": [0.3], "qbert": [0.12, 1.25], "zaxxon": [-0.17, 0.42, 0.93]}  # 1 * 4 * 27 equally probable resamples


def test_values_are_their_definitions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = [1, 2, *rng.integers(1, 6, rng.integers(1, 12))]
        table = {game: rng.normal(0.5, 0.6, n).tolist() for game, n in zip(iqm.SPLITS["ID"][25:], counts, strict=False)}
        estimates = iqm.estimate(cells(table), 1, seed=0)
        assert {name: estimates[name]["value"] for name in ORACLES} == pytest.approx(plain_statistics(table))


def test_a_game_with_many_seeds_weighs_as_one_with_few():
    """As rliable has it after each of 8 games' scores are repeated to 6 seeds."""
    scores = np.random.default_rng(0).normal(0.6, 0.5, (6, 8))
    few = [scores[: (1, 2, 3, 6)[j % 4], j] for j in range(8)]
    repeated = np.stack([np.repeat(of, 6 // len(of)) for of in few], axis=1)
    estimates = iqm.estimate(cells(dict(zip(GAMES, few, strict=False))), 1, seed=0)
    for name, oracle in ORACLES.items():
        assert estimates[name]["value"] == pytest.approx(oracle(repeated), abs=1e-12), name
    expected = (repeated[..., None] > iqm.TAU).mean(axis=(0, 1))
    np.testing.assert_allclose(estimates["profile"]["value"], expected, atol=1e-12)


def test_intervals_are_those_of_all_resamples():
    estimates = iqm.estimate(cells(UNEQUAL), 50_000, seed=0)
    exact = [plain_statistics(resample) for resample in resamples_of(UNEQUAL)]
    assert len(exact) == 108
    for name in ORACLES:
        values = sorted(of[name] for of in exact)
        assert estimates[name]["low"] == pytest.approx(values[2]), name  # 2/108 < 2.5% < 3/108
        assert estimates[name]["high"] == pytest.approx(values[-3]), name


def test_bands_of_profiles_are_those_of_all_resamples():
    found = iqm.estimate(cells(UNEQUAL), 50_000, seed=0)["profile"]
    for i, tau in enumerate(iqm.TAU):
        shares = sorted(average([np.mean(np.array(of) > tau) for of in x.values()]) for x in resamples_of(UNEQUAL))
        assert found["low"][i] == pytest.approx(shares[2]), tau
        assert found["high"][i] == pytest.approx(shares[-3]), tau
    assert found["value"][15] == pytest.approx((0 + 1 / 2 + 2 / 3) / 3)  # at 0.3 that score itself is not above


def test_improvement_is_its_definition():
    """By hand, and against all equally probable resamples; a game that only one of the two has does not count."""
    x = {"pong": [0.3, 0.7], "qbert": [0.1], "klax": [5.0]}
    y = {"pong": [0.3, 0.5, 0.7], "qbert": [0.1, 0.0], "alien": [9.0]}
    found = iqm.improvement(cells(x), cells(y), 50_000, seed=0)
    beats = lambda a, b: np.mean([(p > q) + (p == q) / 2 for p in a for q in b])  # noqa: E731
    assert found["value"] == pytest.approx(((0.5 + 0 + 0 + 1 + 1 + 0.5) / 6 + (0.5 + 1) / 2) / 2)
    draws = [list(itertools.product(of, repeat=len(of))) for of in (x["pong"], y["pong"], y["qbert"])]
    exact = [(beats(a, b) + beats([0.1], c)) / 2 for a, b, c in itertools.product(*draws)]  # 4 * 27 * 4
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(exact, [2.5, 97.5], method="inverted_cdf"))


def test_improvement_does_not_count_by_how_much():
    (_, x), (_, y) = tied(3, 5, seed=1), tied(3, 5, seed=2)
    mapped = [{cell: math.exp(5 * score) - 3 for cell, score in of.items()} for of in (x, y)]
    assert iqm.improvement(*mapped, 40, seed=0) == iqm.improvement(x, y, 40, seed=0)


# === the bootstrap ====================================================================================================
def test_resampling_is_within_games():
    """Seeds alike, games not: unstratified resampling would give a wide interval, ours has no width."""
    equal = iqm.estimate(cells({game: [float(j)] * 3 for j, game in enumerate(GAMES[:8])}), 1_000, seed=0)
    assert equal["mean"] == equal["iqm"] == {"value": 3.5, "low": 3.5, "high": 3.5}
    unequal = iqm.estimate(cells({game: [float(j)] * (1 + j) for j, game in enumerate(GAMES[:8])}), 1_000, seed=0)
    assert [*unequal["iqm"].values()] == pytest.approx([3.5] * 3)


def test_resampling_is_independent_in_every_game():
    """Games alike, seeds not: resampling whole seeds would give [0, 1], the games' own draws average out."""
    estimates = iqm.estimate(cells({game: [0.0, 1.0] for game in GAMES[:50]}), 5_000, seed=0)
    deviation = np.sqrt(0.25 / 100)  # of the mean of 100 fair coins
    assert estimates["mean"]["low"] == pytest.approx(0.5 - 1.96 * deviation, abs=0.02)
    assert estimates["mean"]["high"] == pytest.approx(0.5 + 1.96 * deviation, abs=0.02)


def test_the_order_of_scores_does_not_count_and_the_seed_does():
    _, of = matrix(4, 9)
    shuffled = {(game, 3 * seed + 5): score for (game, seed), score in reversed(of.items())}
    first, other = iqm.estimate(of, 200, seed=0), iqm.estimate(of, 200, seed=1)
    assert iqm.estimate(shuffled, 200, seed=0) == first
    assert other["iqm"]["value"] == first["iqm"]["value"]
    assert other["iqm"]["low"] != first["iqm"]["low"]


def test_memory_is_bounded():
    """20,000 resamples are 31 MB of scores, had they all to be there at once; what is kept of them are 17 MB."""
    (_, x), (_, y) = matrix(3, 64), tied(3, 64, seed=0)
    for compute, limit in ((lambda: iqm.estimate(x, 20_000, 0), 40e6), (lambda: iqm.improvement(x, y, 20_000, 0), 8e6)):
        tracemalloc.start()
        compute()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


# === normalisation ====================================================================================================
def golden() -> list[dict]:
    with open(GOLDEN, newline="") as file:
        return list(csv.DictReader(file))


def test_games_and_scores_are_the_benchmarks():
    splits = {"id": iqm.ID_GAMES, "near_ood": iqm.NEAR_OOD_GAMES, "far_ood": iqm.FAR_OOD_GAMES}
    rows = golden()
    assert len(rows) == len(iqm.SCORES) == 65
    assert {split: {row["game"] for row in rows if row["split"] == split} for split in splits} == {
        split: set(games) for split, games in splits.items()
    }
    expected = {row["game"]: (float(row["random_score"]), float(row["reference_score"])) for row in rows}
    assert expected == iqm.SCORES


def test_normalize():
    for row in golden():
        game, random, reference = row["game"], float(row["random_score"]), float(row["reference_score"])
        inverted = game in ("asteroids", "elevator_action", "private_eye")
        assert inverted == (reference < random)
        if game == "montezuma_revenge":
            assert iqm.normalize(game, 0) == 0
            assert iqm.normalize(game, 1) == pytest.approx(1e6)
        else:
            assert iqm.normalize(game, random) == pytest.approx(float(inverted), abs=1e-5), game
            assert iqm.normalize(game, reference) == pytest.approx(float(not inverted), abs=1e-5), game
            assert iqm.normalize(game, 2 * reference - random) == pytest.approx(-1 if inverted else 2, abs=1e-5), game


def test_the_whole_benchmark():
    values = {"ID": 0.25, "near-OOD": 0.5, "far-OOD": 0.75}
    write_csv([("bc", "atc", g, 0, raw(g, x)) for split, x in values.items() for g in iqm.SPLITS[split]])
    content = report()
    for split, value in values.items():
        row = content["results"]["bc"][split]["atc"]
        assert [row["iqm"]["value"], row["mean"]["value"]] == pytest.approx([value] * 2, abs=1e-5)
    coverage = [of["coverage"] for of in content["metadata"]["splits"]["bc"].values()]
    assert coverage == [f"{n} of {n} games, 1 seed" for n in (50, 10, 5, 65)]


def test_montezuma_is_left_out_of_the_mean_only():
    games = ["amidar", "freeway", "montezuma_revenge", "qbert"]
    x = np.array([[0.2, 0.4, 0.0, 0.9], [0.3, 0.5, 1e8, 0.8], [0.1, 0.7, 0.0, 1.2]])  # 100 points are 1e8
    scores = [[x[i, j] * 1e-6 if j == 2 else raw(game, x[i, j]) for j, game in enumerate(games)] for i in range(3)]
    rows = [("bc", "atc", game, i, scores[i][j]) for i in range(3) for j, game in enumerate(games)]
    write_csv([*rows, *(("bc", "atc", "pong", i, 0) for i in range(3))])
    content = report()
    for name, oracle in ORACLES.items():
        expected = oracle(np.delete(x, 2, axis=1) if name == "mean" else x)
        assert content["results"]["bc"]["ID"]["atc"][name]["value"] == pytest.approx(expected, rel=1e-5), name
    splits = content["metadata"]["splits"]["bc"]
    noted = {split: any("montezuma_revenge" in note for note in of["notes"]) for split, of in splits.items()}
    assert noted == {"ID": True, "near-OOD": False, "all": True}


# === input ============================================================================================================
HEADER = "suite,method,game,seed,score\n"
GOOD = HEADER + "bc,atc,pong,0,1\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", ["No results", "x.csv"]),
        ("suite,method,seed,points\nbc,atc,0,1\n", ["x.csv, line 1", "no game, score, separated by commas"]),
        (GOOD.replace(",", "|"), ["x.csv, line 1", "no suite, ", "separated by commas, semicolons or tabs"]),
        (GOOD + "bc,atc,breakout,0\n", ["x.csv, line 3", "score"]),
        (GOOD + "bc,,breakout,,1\n", ["x.csv, line 3", "method, seed"]),
        (GOOD + "bc,atc,tetris,0,1\n", ["x.csv, line 3", "'tetris'"]),
        (GOOD + "bc,atc,breakout,0,nan\n", ["x.csv, line 3", "score is nan"]),
        (GOOD + "bc,atc,breakout,0,1e400\n", ["x.csv, line 3", "score is 1e400"]),
        (GOOD + "bc,atc,breakout,0,many\n", ["x.csv, line 3", "'many'"]),
        (GOOD + "bc,atc,breakout,1.5,1\n", ["x.csv, line 3", "'1.5'"]),
        (GOOD + "bc,atc,qbert,0,1\nbc,atc,Pong,0,7\n", ["x.csv, line 4", "x.csv, line 2"]),
    ],
)
def test_bad_csv(content, named):
    Path("x.csv").write_text(content)
    message = refuses()
    assert len(message.splitlines()) == 1
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"suite": "bc", "metho', "damaged"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0}', "score"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0, "score": NaN}', "score is nan"),
        ('{"suite": "bc", "method": "atc", "game": "tetris", "seed": 0, "score": 1}', "'tetris'"),
        ('{"suite": "bc", "method": "curl", "game": "pong", "seed": 0, "score": 1}', "repeats"),  # a copy
    ],
)
def test_bad_result_file(content, named):
    write_result("bc", "curl", "pong", 0)
    path = write_result("bc", "atc", "pong", 0)
    path.write_text(content)
    message = refuses()
    assert str(path) in message and named in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"results": Path("nowhere")}, ["No results", "nowhere"]),
        ({"resamples": 0}, ["--resamples must be at least 1"]),
        ({"suites": ("bc", "rainbow")}, ["--suites", "rainbow", "only of bc"]),
        ({"methods": ("atc", "spr")}, ["--methods", "spr", "only of atc"]),
        ({"improvement_over": "spr"}, ["--improvement-over", "spr", "only of atc"]),
    ],
)
def test_bad_options(args, named):
    write_result("bc", "atc", "pong", 0)
    message = refuses(**args)
    assert all(part in message for part in named), message


SHEET = "suite,method,game,seed,score\nbc,mine_é,pong,0,-1.5\nbc,mine_é,qbert,0,250\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_as_spreadsheets_write_it(encoding, separator):
    """With blank rows at the end, of which some have separators; a decimal comma where semicolons separate."""
    text = SHEET.replace(",", separator) + "\n" + 6 * separator + "\n\n"
    text = text.replace("-1.5", "-1,5") if separator == ";" else text
    Path("x.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    results = iqm.load(iqm.Args(csv=Path("x.csv")))
    found = [(result["suite"], result["method"], result["game"], result["seed"], result["x"]) for result in results]
    scores = {"pong": -1.5, "qbert": 250}
    assert found == [("bc", "mine_é", game, 0, iqm.normalize(game, score)) for game, score in scores.items()]


def test_csv_in_another_encoding():
    Path("x.csv").write_bytes(SHEET.encode("cp1252"))
    assert refuses() == "x.csv is not in UTF-8. Export it again, with this encoding."
    Path("x.csv").write_bytes(SHEET.replace("é", "e").encode("utf-16-le"))  # without its mark
    assert refuses().startswith("x.csv, line 1: no suite, ")


def test_csv_and_results_give_the_same():
    rng, rows = np.random.default_rng(0), []
    kinds = ("bc", "rainbow"), ("curl", "atc"), ("ms_pacman", "pong", "klax"), range(3)
    for suite, method, game, seed in itertools.product(*kinds):
        rows.append((suite, method, game, seed, raw(game, rng.normal())))
        write_result(*rows[-1], split="?", episode_scores=[1, 2], versions={})  # as it was before there was `backbone`
    Path("results", "bc", "atc", "pong", ".seed0.json.tmp").write_text("{")  # of a run that was cut off
    from_results = report()
    write_csv([(suite, method, game.replace("ms_pacman", "MsPacman"), *rest) for suite, method, game, *rest in rows])
    text = "\ufeff" + Path("x.csv").read_text().replace(",", ", ")  # as spreadsheets write it
    Path("x.csv").write_text(text, encoding="utf-8")
    assert report() == from_results
    assert set(from_results["results"]["bc"]) == {"ID", "near-OOD", "far-OOD", "all"}


# === missing games and seeds ==========================================================================================
INCOMPLETE = [
    *(("bc", "curl", game, seed, 1) for game in ("pong", "alien", "qbert") for seed in range(3)),
    *(("bc", "atc", game, seed, 2) for game in ("pong", "alien") for seed in range(2)),
    *(("rainbow", "atc", "klax", seed, 2) for seed in range(2)),
]


def test_missing_games_and_seeds_are_refused():
    write_csv(INCOMPLETE)
    message = refuses()
    assert "bc: atc has only 0 of 3 seeds of qbert; 2 of 3 seeds of alien, pong." in message
    assert "--allow-missing" in message and "curl" not in message and "rainbow" not in message
    facts = report(methods=("atc",))["metadata"]["splits"]["bc"]["all"]  # methods that are not shown do not count
    assert (facts["coverage"], facts["marked"]) == ("2 of 65 games, 2 seeds", [])


def test_allow_missing(capsys):
    write_csv(INCOMPLETE)
    content = report(allow_missing=True)
    splits = content["metadata"]["splits"]["bc"]
    assert {split: of["coverage"] for split, of in splits.items()} == {
        "ID": "1 of 50 games, 3 seeds",
        "near-OOD": "2 of 10 games, 2 to 3 seeds",
        "all": "3 of 65 games, 2 to 3 seeds",
    }
    assert splits["near-OOD"]["marked"] == ["atc"]
    assert list(content["results"]["bc"]["ID"]) == ["curl"]
    value = np.mean([iqm.normalize("pong", 2), iqm.normalize("alien", 2)])
    assert content["results"]["bc"]["near-OOD"]["atc"]["mean"]["value"] == pytest.approx(value)
    printed = capsys.readouterr().out
    assert any(line.startswith("| atc* ") for line in printed.splitlines())
    assert any(line.startswith("| curl  ") for line in printed.splitlines())
    assert "\natc* has only 2 of 3 seeds of alien, pong.\n" in printed
    assert "## rainbow, far-OOD: 1 of 5 games, 2 seeds" in printed
    assert "rainbow, ID" not in printed


def test_unequal_seeds_are_refused_within_a_method():
    """Nine games with a seed at 0 and one with 30 seeds at 1: the one is a tenth of the score, not three quarters."""
    games = [*iqm.SPLITS["ID"][:8], "breakout", "boxing"]
    rows = [("bc", "atc", game, 0, raw(game, 0)) for game in games[:9]]
    write_csv([*rows, *(("bc", "atc", "boxing", i, raw("boxing", 1)) for i in range(30))])
    message = refuses()
    assert "bc: atc has only 1 of 30 seeds of air_raid" in message and "boxing" not in message
    content = report(allow_missing=True)
    row = content["results"]["bc"]["ID"]["atc"]
    values = [row[name]["value"] for name in ORACLES]
    assert values == pytest.approx([0, 0, 0.1, 0.9], abs=1e-5)
    assert row["profile"]["value"][25] == pytest.approx(0.1)
    facts = content["metadata"]["splits"]["bc"]["ID"]
    assert facts["marked"] == ["atc"] and facts["coverage"] == "10 of 50 games, 1 to 30 seeds"
    assert "Each game weighs the same, whatever its number of seeds." in facts["notes"]
    assert "Games with a single seed add nothing to the width of an interval." in facts["notes"]


def test_unequal_seeds_are_refused_between_methods():
    """Their number counts, not which they are."""
    write_csv([("bc", method, "pong", seed, 1) for method, n in (("atc", 3), ("curl", 2)) for seed in range(n)])
    assert "bc: curl has only 2 of 3 seeds of pong." in refuses()
    write_csv([("bc", method, "pong", seed, 1) for method, n in (("atc", 0), ("curl", 7)) for seed in range(n, n + 3)])
    assert report()["metadata"]["splits"]["bc"]["all"]["notes"] == []


# === results of one origin ============================================================================================
DATA = {"runs": [1, 2], "checkpoints": [1, 2], "rows_per_checkpoint": 10_000, "games": ["pong"], "data": "dqn_replay"}
REAL = {
    "smoke_test": False,
    "backbone": "1f00",
    "data": "dqn_replay",
    "pretraining": {"step": 100, "total_steps": 100, "learning_rate": 3e-4, **DATA},
    "args": {"epochs": 100, "eval_episodes": 100, "runs": [1], "checkpoints": [50], "num_transitions": 50_000}
    | {"action_offset": 0, "seed": 0, "device": "cpu", "data_dir": "/data", "results": "results", "video": False},
}
BASELINE = {"backbone": None, "pretraining": None}


def write_results(changes: Callable = lambda method, game, seed: {}) -> None:
    """Two methods and random on two games with two seeds, alike but for the changes, {"args.epochs": 7} for example."""
    for method, game, seed in itertools.product(("random", "atc", "curl"), ("pong", "qbert"), range(2)):
        facts = copy.deepcopy(REAL) | (BASELINE if method == "random" else {})
        for name, value in changes(method, game, seed).items():
            name, _, inner = name.partition(".")
            if inner and facts[name]:
                facts[name][inner] = value
            elif not inner:
                facts[name] = value
        write_result("bc", method, game, seed, **facts)


def notes(content: dict) -> list[str]:
    return content["metadata"]["splits"]["bc"]["all"]["notes"]


# What may differ is between groups of results, what must not is within a group.
BETWEEN_METHODS = lambda method, game, seed: method == "atc"  # noqa: E731
BETWEEN_SEEDS = lambda method, game, seed: (method, seed) == ("atc", 1)  # noqa: E731
BETWEEN_GAMES = lambda method, game, seed: game == "qbert"  # noqa: E731
WITHIN_A_GAME = lambda method, game, seed: (method, game) == ("atc", "qbert")  # noqa: E731
WITHIN_A_SEED = lambda method, game, seed: (method, game, seed) == ("atc", "qbert", 1)  # noqa: E731
FOR_ALL = lambda method, game, seed: True  # noqa: E731


@pytest.mark.parametrize(
    ("name", "value", "may", "must_not", "where"),
    [
        ("args.epochs", 7, BETWEEN_METHODS, BETWEEN_SEEDS, "atc"),
        ("args.eval_episodes", 10, BETWEEN_METHODS, WITHIN_A_GAME, "atc"),
        ("pretraining.step", 50, BETWEEN_METHODS, BETWEEN_SEEDS, "atc"),
        ("pretraining.learning_rate", 1e-5, BETWEEN_METHODS, WITHIN_A_GAME, "atc"),
        ("pretraining.data", "jat", FOR_ALL, BETWEEN_METHODS, ""),
        ("pretraining.games", ["pong", "alien"], FOR_ALL, BETWEEN_METHODS, ""),
        ("pretraining.rows_per_checkpoint", 5, FOR_ALL, BETWEEN_METHODS, ""),
        ("backbone", "2e11", BETWEEN_SEEDS, WITHIN_A_SEED, "atc seed 1"),
        ("backbone", None, BETWEEN_METHODS, WITHIN_A_SEED, "atc seed 1"),
        ("data", "rainbow", BETWEEN_GAMES, WITHIN_A_GAME, "qbert"),
        ("args.checkpoints", [2], BETWEEN_GAMES, WITHIN_A_GAME, "qbert"),
        ("args.num_transitions", 500, BETWEEN_GAMES, WITHIN_A_GAME, "qbert"),
        ("args.action_offset", 1, BETWEEN_GAMES, WITHIN_A_GAME, "qbert"),
    ],
)
def test_what_must_be_alike_and_what_need_not(name, value, may, must_not, where):
    write_results(lambda *result: {name: value} if may(*result) else {})
    assert iqm.mixed(iqm.load(iqm.Args())) == []
    write_results(lambda *result: {name: value} if must_not(*result) else {})
    what, advice = refuses().splitlines()
    assert what.startswith(f"bc{where and ', '}{where}: {name} is ")
    outer, _, inner = name.partition(".")
    before = REAL[outer][inner] if inner else REAL[outer]
    values = dict(re.findall(r"(?:is|but) (.+?) in results/bc/(.+?)\.json", what))
    assert set(values) == {json.dumps(before), json.dumps(value)}
    for told, place in values.items():
        method, game, seed = place.split("/")
        assert (told == json.dumps(value)) == must_not(method, game, int(seed.removeprefix("seed")))
    assert advice.endswith("choose other --methods, or use --allow-mixed.")
    older = [path for path in Path("results").glob("*/*/*/*.json") if must_not(*path.parts[2:4], int(path.stem[4:]))]
    for path in older:
        record = json.loads(path.read_text())
        (record[outer] or {}).pop(inner, None) if inner else record.pop(outer)
        path.write_text(json.dumps(record))
    assert iqm.mixed(iqm.load(iqm.Args())) == []  # what only one of two has is not compared


def test_a_method_is_with_or_without_pretraining():
    write_results(lambda *result: BASELINE if BETWEEN_SEEDS(*result) else {})
    assert "bc, atc: pretraining.step is 100 in " in refuses() and "but null in " in refuses()


def test_what_cannot_change_a_score_need_not_be_alike():
    paths = ["data_dir", "cache_dir", "results", "checkpoint", "run_name"]
    free = [*paths, "seed", "device", "compile", "overwrite", "resume", "num_workers", "play_rows", "video"]
    free += ["log_every", "eval_every", "save_every"]
    write_results(lambda *result: {f"args.{name}": result for name in free})
    assert iqm.mixed(iqm.load(iqm.Args())) == []
    free.remove("checkpoint")
    write_results(lambda *result: {f"pretraining.{name}": result for name in free})
    assert iqm.mixed(iqm.load(iqm.Args())) == []


def test_suites_are_compared_by_themselves():
    write_results()
    for method, game, seed in itertools.product(("random", "atc"), ("pong", "qbert"), range(2)):
        write_result("rainbow", method, game, seed, **REAL | {"data": "online", "args": {"total_steps": 50_000}})
    report()


def test_what_is_mixed_stands_under_the_table():
    """Every rule that is broken, where it is broken in full, and only in the tables in which it is."""

    def changes(method, game, seed):
        epochs = {"args.epochs": 7} if seed == 1 and method != "random" else {}
        data = {"data": "jat"} if (method, game) == ("curl", "qbert") else {}
        backbone = {"backbone": "2e11"} if (method, game) == ("atc", "qbert") else {}
        return epochs | data | backbone

    write_results(changes)
    content = report(allow_mixed=True)
    expected = [
        "Mixed: bc, atc seed 0, atc seed 1: backbone is ",
        "Mixed: bc, qbert: data is ",
        "Mixed: bc, curl, atc: args.epochs is 100 in results/bc/curl/pong/seed0.json, but 7 in results/bc/",
    ]
    found = [note for note in notes(content) if note.startswith("Mixed")]
    assert len(found) == len(expected)
    for beginning in expected:
        assert any(note.startswith(beginning) for note in found), beginning
    assert all(note in Path("reports", "iqm.md").read_text() for note in found)
    near = content["metadata"]["splits"]["bc"]["near-OOD"]["notes"]  # pong alone
    assert [note[:24] for note in near if "Mixed" in note] == ["Mixed: bc, curl, atc: ar"]


def test_smoke_tests_are_not_mixed_with_others():
    write_result("bc", "atc", "pong", 0, **REAL)
    write_result("bc", "random", "pong", 0, **REAL | {"smoke_test": True, "backbone": None, "pretraining": None})
    message = refuses()
    assert len(message.splitlines()) == 2
    assert "bc: smoke_test is false in results/bc/atc/pong/seed0.json, but true in results/bc/random/" in message or (
        "bc: smoke_test is true in results/bc/random/pong/seed0.json, but false in results/bc/atc/" in message
    )
    assert "--allow-mixed" in message
    report(methods=("atc",))
    assert "smoke test" not in Path("reports", "iqm.md").read_text()
    content = report(allow_mixed=True)
    assert any(note.startswith("Mixed: bc: smoke_test is ") for note in notes(content))
    assert content["metadata"]["splits"]["bc"]["all"]["smoke_test"]


def test_smoke_tests_alone_say_so(capsys):
    for method, seed in itertools.product(("random", "atc"), range(2)):
        write_result("bc", method, "pong", seed, **REAL | {"smoke_test": True})
        write_result("rainbow", method, "pong", seed, **REAL)
    content = report()
    assert "## bc, near-OOD, smoke test: 1 of 10 games, 2 seeds" in capsys.readouterr().out
    text = Path("reports", "iqm.md").read_text()
    assert "## bc, all, smoke test: " in text and "## rainbow, all: " in text
    assert any("do not tell how good a method is" in note for note in notes(content))
    for name in ("iqm", "profile"):
        figure = iqm.draw(content["results"], content["metadata"]["splits"], name, "caption")
        titles = [row.get_suptitle() for row in figure.subfigs]
        assert titles == ["bc, smoke test", "rainbow"]


def test_unfinished_pretraining_is_noted():
    unfinished = {"step": 1_200, "total_steps": 5_000, "data": "dqn_replay"}
    for seed in range(2):
        write_result("bc", "random", "pong", seed, **REAL | {"backbone": None, "pretraining": None})
        write_result("bc", "atc", "pong", seed, **REAL)
        write_result("bc", "curl", "pong", seed, **REAL | {"pretraining": unfinished})
    assert notes(report()) == ["curl: pre-training is unfinished, at step 1,200 of 5,000."]


# === what is shown ====================================================================================================
def test_order_and_choice():
    """The paper's methods in its order, then all others; or what is asked for."""
    paper = "random e2e curl mae atc siammae r3m bc spr idm spr_idm dt cql_mse cql".split()
    methods = ["zeta", "alpha", *paper[::-1]]
    rows = [(suite, m, "pong", i, i) for suite in ("zeroshot", "bc") for m in methods for i in range(2)]
    write_csv([*rows, *(("bc", "only_bc", "pong", i, i) for i in range(2))])
    content = report()
    assert list(content["results"]) == ["bc", "zeroshot"]
    assert list(content["results"]["zeroshot"]["all"]) == [*paper, "alpha", "zeta"]
    assert list(itertools.chain(*content["metadata"]["groups"].values())) == paper
    table = Path("reports", "iqm.md").read_text().partition("## bc, all")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")][2:]
    groups = dict(rows)
    assert [groups[m] for m in ("e2e", "mae", "r3m", "spr_idm", "dt", "cql", "zeta")] == [
        *("baseline", "image", "video", "demonstration", "trajectory", "trajectory", "other"),
    ]
    results = report(suites=("zeroshot", "bc"), methods=("zeta", "only_bc", "atc"))["results"]
    assert {suite: list(splits["all"]) for suite, splits in results.items()} == {
        "zeroshot": ["zeta", "atc"],
        "bc": ["zeta", "only_bc", "atc"],
    }
    assert list(results) == ["zeroshot", "bc"]


COMPARED = [("bc", m, g, i, raw(g, x + i / 9)) for m, x in (("random", 0), ("atc", 0.1), ("curl", 1)) for g in GAMES[:4]
            for i in range(3)]  # fmt: skip


def test_improvement_over_random_or_another():
    write_csv([*COMPARED, *(("zeroshot", "bc", "pong", i, i) for i in range(3))])
    values = lambda row: [row[m].get("improvement", {}).get("value") for m in ("random", "curl", "atc")]  # noqa: E731
    content = report()
    assert values(content["results"]["bc"]["all"]) == [None, pytest.approx(1), pytest.approx(2 / 3)]
    assert content["metadata"]["improvement_over"] == "random"
    assert Path("reports", "improvement.png").exists()
    text = Path("reports", "iqm.md").read_text()
    assert text.count("P(> random)") == 3  # in bc's tables of ID, near-OOD and all, not in zeroshot's
    assert "![improvement](improvement.png)" in text
    row = report(improvement_over="curl")["results"]["bc"]["all"]
    assert values(row) == [0, None, 0]
    row = report(methods=("curl", "atc"))["results"]["bc"]["all"]
    assert not any("improvement" in of for of in row.values())  # random is not shown
    assert not Path("reports", "improvement.png").exists()


def test_improvement_is_over_common_games():
    write_csv([row for row in COMPARED if row[:3] != ("bc", "atc", GAMES[0])])
    row = report(allow_missing=True)["results"]["bc"]["all"]["atc"]
    assert row["improvement"]["value"] == pytest.approx(2 / 3)


# === files ============================================================================================================
def test_command_and_files():
    """The command as a user types it, and what it writes."""
    runs = itertools.product(("curl", "mine"), GAMES, range(3))
    write_csv([("bc", method, game, i, raw(game, i / 4)) for method, game, i in runs])
    options = ["--csv", "x.csv", "--resamples", "50", "--output-dir", "elsewhere"]
    command = [sys.executable, str(ROOT / "eval_iqm.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    names = ["iqm.json", "iqm.md", "iqm.png", "profiles.png"]  # there is no random to improve over
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == names
    markdown = Path("elsewhere", "iqm.md").read_text()
    table, _, _ = markdown[markdown.index("## bc, near-OOD: 10 of 10 games, 3 seeds") :].partition("\n\n## ")
    assert table in done.stdout
    header, rule, curl, other = table.splitlines()[2:6]
    assert {len(line) for line in (header, rule, curl, other)} == {len(header)}
    columns = ["method", "learns from", "IQM", "median", "mean", "optimality gap"]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == columns
    assert curl.startswith("| curl ") and "| image " in curl and " 0.250 [0." in curl
    assert other.startswith("| mine ") and "| other " in other
    scores = markdown[markdown.index("## bc: mean raw scores (number of seeds)") :].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scores[2:]]
    assert cells[0] == ["game", "curl", "mine"] and len({len(line) for line in scores[2:]}) == 1
    means = {game: f"{np.mean([raw(game, i / 4) for i in range(3)]):.2f} (3)" for game in GAMES}
    assert cells[2:] == [[game, means[game], means[game]] for game in GAMES]
    assert "mean raw scores" not in done.stdout
    for name in names[2:]:
        with Image.open(Path("elsewhere", name)) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch):
    write_csv(COMPARED)
    report()
    before = {path.name: path.read_bytes() for path in Path("reports").iterdir()}
    assert set(before) == {"iqm.md", "iqm.json", "iqm.png", "profiles.png", "improvement.png"}

    def half(path: Path, data: bytes):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        report(seed=1)
    after = {name: Path("reports", name).read_bytes() for name in before}
    assert after == before


def test_a_place_that_cannot_be_written_is_found_before_the_bootstrap(monkeypatch):
    write_csv(COMPARED)
    monkeypatch.setattr(iqm, "bootstrap", lambda *_: pytest.fail("too late"))
    Path("reports").touch()
    with pytest.raises(FileExistsError, match="reports"):
        iqm.report(iqm.Args(csv=Path("x.csv")))


def test_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    write_csv(COMPARED[:12])
    iqm.report(iqm.Args(csv=Path("~/x.csv"), output_dir=Path("~/made"), resamples=2))
    assert Path("made", "iqm.md").exists() and not Path("~").exists()


@pytest.mark.parametrize("count", [1, 16])
def test_figure_of_intervals(count):
    methods = [*iqm.GROUP_OF, "mine", "a_method_with_a_rather_long_name"][-count:]
    row = {m: {"iqm": {"value": 0.3 - 0.1 * i, "low": 0.25 - 0.1 * i, "high": 0.5}} for i, m in enumerate(methods)}
    tables = {"bc": {"ID": row, "all": row}, "rainbow": {"far-OOD": row, "all": row}}
    facts = {s: {t: {"coverage": f"{s} {t}", "marked": [methods[0]], "smoke_test": 0} for t in of}
             for s, of in tables.items()}  # fmt: skip
    figure = iqm.draw(tables, facts, "iqm", "caption")
    figure.savefig("figure.png")
    panels = figure.get_axes()
    titles = ["ID\nbc ID", "all\nbc all", "far-OOD\nrainbow far-OOD", "all\nrainbow all"]
    assert [panel.get_title(loc="left") for panel in panels] == titles
    assert [label.get_text() for label in panels[0].get_yticklabels()] == methods
    for panel in panels:
        ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panel.patches]
        assert ends == [pytest.approx((0.25 - 0.1 * i, 0.5)) for i in range(count)]
        assert [dot.get_xdata()[0] for dot in panel.lines] == pytest.approx([0.3 - 0.1 * i for i in range(count)])
        assert len({bar.get_facecolor() for bar in panel.patches}) == count
        assert panel.texts[0].get_text().strip() == "0.30*"
    for label in panels[0].get_yticklabels():
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= panels[0].get_window_extent().x0
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ([*iqm.GROUPS, "other"] if count > 1 else ["other"])


@pytest.mark.parametrize("count", [1, 16])
def test_figure_of_profiles(count):
    """A line and a band for each method in each panel, all in the legend, which lies beside the panels."""
    methods = [*iqm.GROUP_OF, "a_method_with_a_rather_long_name", "mine"][-count:]
    value = np.linspace(1, 0, 101)
    profiles = [{"value": value / (i + 1), "low": value / (i + 2), "high": value} for i in range(count)]
    row = {method: {"profile": profile} for method, profile in zip(methods, profiles, strict=True)}
    tables = {"bc": {"ID": row, "all": row}, "zeroshot": {"all": dict(list(row.items())[:1])}}
    facts = {s: {t: {"coverage": f"{s} {t}", "marked": [], "smoke_test": 0} for t in of} for s, of in tables.items()}
    figure = iqm.draw(tables, facts, "profile", "caption")
    figure.savefig("figure.png")
    panels = figure.get_axes()
    assert [len(panel.lines) for panel in panels] == [len(panel.collections) for panel in panels] == [count, count, 1]
    for i, line in enumerate(panels[0].lines):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([iqm.TAU, value / (i + 1)], axis=1))
    looks = [(line.get_color(), line.get_linestyle()) for line in panels[0].lines]
    assert len(set(looks)) == count
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(methods)
    assert {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()} == set(looks)
    box = legend.get_window_extent()
    assert box.x0 >= max(panel.get_window_extent().x1 for panel in panels) and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", ["$x_1$", "a$b", "_mine", r"\\alpha_$"])
def test_names_are_drawn_as_they_are(name):
    """No mathematics is made of $ and _: what is drawn is what a text of these very characters is."""
    row = {"iqm": dict(value=0.3, low=0.2, high=0.4), "profile": dict.fromkeys(iqm.ENDS, np.ones(101))}
    tables, facts = {name: {"ID": {name: row}, "all": {name: row}}}, {"coverage": name, "marked": [], "smoke_test": 0}
    for kind in ("iqm", "profile"):
        figure = iqm.draw(tables, {name: {"ID": facts, "all": facts}}, kind, name)
        figure.savefig("figure.png")
        drawn = [text for text in figure.findobj(iqm.matplotlib.text.Text) if name in text.get_text()]
        assert len(drawn) >= (6 if kind == "iqm" else 5)  # caption, suite, two titles; methods beside bars or lines
        assert not any(text.get_parse_math() for text in drawn)


def test_a_paper_s_method_always_has_its_colour():
    """Whatever else is shown, so that figures of other runs can be held side by side."""
    some, more = iqm.colours({"atc", "dt"}), iqm.colours({"atc", "mine", "zeta", "yours"})
    assert {method: more[method] for method in iqm.GROUP_OF} == some
    assert len(set(more.values())) == len(iqm.GROUP_OF) + 3
