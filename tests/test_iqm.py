"""eval_iqm.py against rliable, exact enumeration and the golden scores, and as its user sees it."""

import csv
import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load
from PIL import Image
from rliable import library, metrics

SCRIPT = ROOT / "eval_iqm.py"
GOLDEN = Path(__file__).parent / "golden" / "scores.csv"
ORACLES = {
    "iqm": metrics.aggregate_iqm,
    "median": metrics.aggregate_median,
    "mean": metrics.aggregate_mean,
    "optimality_gap": metrics.aggregate_optimality_gap,
}

iqm = load("eval_iqm.py")
GAMES = sorted(set(iqm.SPLITS["all"]) - {"montezuma_revenge"})


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=60)


def report(folder: Path, *args: str) -> dict:
    """iqm.json of a run that succeeds."""
    done = run(folder, *args, "--resamples", "200")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "reports" / "iqm.json").read_text())


def fails(folder: Path, *args: str) -> str:
    """The message of a run that fails as it should: by one message and without output."""
    done = run(folder, *args)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (folder / "reports").exists()
    return done.stderr.strip()


def refuses(folder: Path, **args: object) -> str:
    """The message, of one line, with which the script ends: quicker than `fails`, for many cases."""
    with pytest.raises(SystemExit) as stopped:
        iqm.report(iqm.Args(**args, output_dir=folder / "reports"))
    assert not (folder / "reports").exists()
    assert isinstance(stopped.value.code, str)  # which Python prints, to exit with 1
    assert len(stopped.value.code.splitlines()) == 1
    return stopped.value.code


def write_csv(path: Path, rows: list[tuple]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("suite", "method", "game", "seed", "score"), *rows])


def write_result(root: Path, suite: str, method: str, game: str, seed: int, score: float, **others: object) -> Path:
    path = root / suite / method / game / f"seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(suite=suite, method=method, game=game, seed=seed, score=score) | others))
    return path


def raw(game: str, normalized: float) -> float:
    low, high = sorted(iqm.SCORES[game])
    return low + normalized * (high - low)


def matrix(seeds: int, games: int) -> tuple[np.ndarray, dict]:
    """Normalised scores [seeds, games] with heavy tails, as rliable has them and as the script does."""
    scores = np.random.default_rng([seeds, games]).standard_t(2, (seeds, games)) + 0.7
    return scores, {(GAMES[j], i): scores[i, j] for i in range(seeds) for j in range(games)}


# === statistics =======================================================================================================
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 1), (3, 2), (3, 5), (5, 26), (10, 7), (4, 50), (3, 64)])
def test_values_equal_rliable(shape):
    scores, cells = matrix(*shape)
    estimates = iqm.estimate(cells, resamples=1, seed=0)
    for name, oracle in ORACLES.items():
        assert np.isclose(estimates[name]["value"], oracle(scores), rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("shape", [(3, 26), (5, 10), (10, 4)])
def test_intervals_agree_with_rliable(shape):
    scores, cells = matrix(*shape)
    np.random.seed(0)  # noqa: NPY002, rliable draws from this
    together = lambda x: np.array([oracle(x) for oracle in ORACLES.values()])  # noqa: E731
    _, intervals = library.get_interval_estimates({"it": scores}, together, reps=5_000)
    estimates = iqm.estimate(cells, resamples=20_000, seed=0)
    for name, (low, high) in zip(ORACLES, intervals["it"].T, strict=True):
        # The 2.5th percentile of 5,000 draws of a normal distribution has a standard error of 1% of the interval.
        assert abs(estimates[name]["low"] - low) < 0.05 * (high - low), name
        assert abs(estimates[name]["high"] - high) < 0.05 * (high - low), name


def test_intervals_of_games_with_different_numbers_of_seeds():
    """Against all 1 * 4 * 27 equally probable resamples."""
    seeds = {"pong": [0.31], "qbert": [0.12, 1.25], "zaxxon": [-0.17, 0.42, 0.93]}
    estimates = iqm.estimate({(g, i): x for g, of in seeds.items() for i, x in enumerate(of)}, 50_000, seed=0)
    resamples = list(itertools.product(*(itertools.product(of, repeat=len(of)) for of in seeds.values())))
    assert len(resamples) == 108
    exact = {
        "iqm": [sum(sorted(itertools.chain(*x))[1:5]) / 4 for x in resamples],  # int(6 / 4) cut at either end
        "median": [sorted(sum(of) / len(of) for of in x)[1] for x in resamples],
        "mean": [sum(sum(of) / len(of) for of in x) / 3 for x in resamples],
        "optimality_gap": [1 - sum(min(score, 1) for score in itertools.chain(*x)) / 6 for x in resamples],
    }
    for name, values in exact.items():
        assert estimates[name]["low"] == pytest.approx(sorted(values)[2]), name  # 2/108 < 2.5% < 3/108
        assert estimates[name]["high"] == pytest.approx(sorted(values)[-3]), name


def test_resampling_is_within_games():
    """Seeds alike, games not: unstratified resampling would give a wide interval, ours has no width."""
    estimates = iqm.estimate({(game, i): float(j) for j, game in enumerate(GAMES[:8]) for i in range(3)}, 1_000, seed=0)
    assert estimates["mean"] == {"value": 3.5, "low": 3.5, "high": 3.5}
    assert estimates["iqm"] == {"value": 3.5, "low": 3.5, "high": 3.5}


def test_resampling_is_independent_in_every_game():
    """Games alike, seeds not: resampling whole seeds would give [0, 1], the games' own draws average out."""
    estimates = iqm.estimate({(game, i): float(i) for game in GAMES[:50] for i in range(2)}, 5_000, seed=0)
    deviation = np.sqrt(0.25 / 100)  # of the mean of 100 fair coins
    assert estimates["mean"]["low"] == pytest.approx(0.5 - 1.96 * deviation, abs=0.02)
    assert estimates["mean"]["high"] == pytest.approx(0.5 + 1.96 * deviation, abs=0.02)


def test_memory_is_bounded():
    _, cells = matrix(3, 64)
    tracemalloc.start()
    iqm.estimate(cells, resamples=20_000, seed=0)  # 31 MB of scores, had they all to be there at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_montezuma_is_left_out_of_the_mean_only(tmp_path):
    games = ["amidar", "freeway", "montezuma_revenge", "qbert"]
    x = np.array([[0.2, 0.4, 0.0, 0.9], [0.3, 0.5, 1e8, 0.8], [0.1, 0.7, 0.0, 1.2]])  # 100 points are 1e8
    scores = [[x[i, j] * 1e-6 if j == 2 else raw(game, x[i, j]) for j, game in enumerate(games)] for i in range(3)]
    rows = [("bc", "atc", game, i, scores[i][j]) for i in range(3) for j, game in enumerate(games)]
    write_csv(tmp_path / "x.csv", [*rows, ("bc", "atc", "pong", 0, 0)])
    content = report(tmp_path, "--csv", "x.csv")
    for name, oracle in ORACLES.items():
        expected = oracle(np.delete(x, 2, axis=1) if name == "mean" else x)
        assert content["results"]["bc"]["ID"]["atc"][name]["value"] == pytest.approx(expected, rel=1e-5), name
    splits = content["metadata"]["splits"]["bc"]
    noted = {split: any("montezuma_revenge" in note for note in of["notes"]) for split, of in splits.items()}
    assert noted == {"ID": True, "near-OOD": False, "all": True}


def test_a_mean_over_no_game_is_undefined(tmp_path):
    write_csv(tmp_path / "x.csv", [("bc", "atc", "montezuma_revenge", i, 0) for i in range(3)])
    row = report(tmp_path, "--csv", "x.csv")["results"]["bc"]["ID"]["atc"]
    assert row["mean"] == {"value": None, "low": None, "high": None}
    assert row["optimality_gap"] == {"value": 1, "low": 1, "high": 1}


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


@pytest.mark.parametrize("row", golden(), ids=lambda row: row["game"])
def test_normalize(row):
    random, reference = float(row["random_score"]), float(row["reference_score"])
    inverted = row["game"] in ("asteroids", "elevator_action", "private_eye")
    assert inverted == (reference < random)
    if row["game"] == "montezuma_revenge":
        assert iqm.normalize("montezuma_revenge", 0) == 0
        assert iqm.normalize("montezuma_revenge", 1) == pytest.approx(1e6)
    else:
        assert iqm.normalize(row["game"], random) == pytest.approx(float(inverted), abs=1e-5)
        assert iqm.normalize(row["game"], reference) == pytest.approx(float(not inverted), abs=1e-5)
        assert iqm.normalize(row["game"], 2 * reference - random) == pytest.approx(-1 if inverted else 2, abs=1e-5)


def test_the_whole_benchmark(tmp_path):
    values = {"ID": 0.25, "near-OOD": 0.5, "far-OOD": 0.75}
    rows = [("bc", "atc", g, 0, raw(g, x)) for split, x in values.items() for g in iqm.SPLITS[split]]
    write_csv(tmp_path / "x.csv", rows)
    content = report(tmp_path, "--csv", "x.csv")
    for split, value in values.items():
        row = content["results"]["bc"][split]["atc"]
        assert [row["iqm"]["value"], row["mean"]["value"]] == pytest.approx([value] * 2, abs=1e-5)
    coverage = [of["coverage"] for of in content["metadata"]["splits"]["bc"].values()]
    assert coverage == [f"{n} of {n} games, 1 seed" for n in (50, 10, 5, 65)]


# === input ============================================================================================================
HEADER = "suite,method,game,seed,score\n"
GOOD = HEADER + "bc,atc,pong,0,1\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", ["x.csv", "suite", "method", "game", "seed", "score"]),
        (HEADER, ["No results", "x.csv"]),
        ("suite,method,seed,points\nbc,atc,0,1\n", ["x.csv", "game, score"]),
        (GOOD + "bc,atc,breakout,0\n", ["x.csv, line 3", "no score"]),
        (GOOD + "bc, ,breakout,,1\n", ["x.csv, line 3", "no method, seed"]),
        (GOOD + "bc,atc,tetris,0,1\n", ["x.csv, line 3", "'tetris'"]),
        (GOOD + "bc,atc,breakout,0,nan\n", ["x.csv, line 3", "score nan"]),
        (GOOD + "bc,atc,breakout,0,-inf\n", ["x.csv, line 3", "score -inf"]),
        (GOOD + "bc,atc,breakout,0,1e400\n", ["x.csv, line 3", "score 1e400"]),
        (GOOD + "bc,atc,breakout,0,many\n", ["x.csv, line 3", "score many"]),
        (GOOD + "bc,atc,breakout,1.5,1\n", ["x.csv, line 3", "seed 1.5"]),
        (GOOD + "bc,atc,qbert,0,1\nbc,atc,Pong,0,7\n", ["x.csv, line 4", "x.csv, line 2", "bc atc pong 0"]),
        (GOOD + 'bc,atc,"pong,1,1\n', ["x.csv cannot be read as CSV"]),
        (b"\xff\xfe\x00", ["x.csv"]),
    ],
)
def test_bad_csv(tmp_path, content, named):
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refuses(tmp_path, csv=tmp_path / "x.csv")
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0}', "no score"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0, "score": NaN}', "score nan"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0, "score": -Infinity}', "score -inf"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0, "score": true}', "score True"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 0, "score": [1]}', "score [1]"),
        ('{"suite": "bc", "method": "atc", "game": "tetris", "seed": 0, "score": 1}', "'tetris'"),
        ('{"suite": "bc", "method": "atc", "game": "alien", "seed": 0, "score": 1}', "game alien"),
        ('{"suite": "bc", "method": "atc", "game": "pong", "seed": 1, "score": 1}', "seed 1"),
        ('{"suite": "bc", "method": "bc", "game": "pong", "seed": 0, "score": 1}', "method bc"),
        ('{"suite": "dt", "method": "atc", "game": "pong", "seed": 0, "score": 1}', "suite dt"),
    ],
)
def test_bad_result_file(tmp_path, content, named):
    write_result(tmp_path / "results", "bc", "curl", "pong", 0, 1.0)
    path = write_result(tmp_path / "results", "bc", "atc", "pong", 0, 1.0)
    path.write_text(content)
    message = refuses(tmp_path, results=tmp_path / "results")
    assert str(path) in message
    assert named in message


def test_a_game_in_two_spellings_is_a_duplicate(tmp_path):
    for game in ("MsPacman", "ms_pacman"):
        write_result(tmp_path / "results", "bc", "atc", game, 0, 1.0)
    message = refuses(tmp_path, results=tmp_path / "results")
    assert str(Path("MsPacman", "seed0.json")) in message
    assert str(Path("ms_pacman", "seed0.json")) in message


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--results", "nowhere"], ["nowhere"]),
        (["--results", "empty"], ["No results", "empty"]),
        (["--csv", "nowhere.csv"], ["nowhere.csv"]),
        (["--csv", "bad.csv"], ["bad.csv, line 3", "score nan"]),
        (["--resamples", "0"], ["--resamples must be at least 1"]),
        (["--suites", "bc", "rainbow"], ["--suites", "rainbow", "only of bc"]),
        (["--methods", "atc", "spr"], ["--methods", "spr", "only of atc"]),
    ],
)
def test_bad_options(tmp_path, args, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text(GOOD + "bc,atc,breakout,0,nan\n")
    write_result(tmp_path / "results", "bc", "atc", "pong", 0, 1.0)
    message = fails(tmp_path, *args)
    for part in named:
        assert part in message


def test_an_output_folder_that_is_a_file(tmp_path):
    write_result(tmp_path / "results", "bc", "atc", "pong", 0, 1.0)
    (tmp_path / "taken").write_text("mine")
    message = fails(tmp_path, "--resamples", "10", "--output-dir", "taken")
    assert len(message.splitlines()) == 1
    assert "taken" in message
    assert (tmp_path / "taken").read_text() == "mine"


def test_csv_and_results_give_the_same(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for suite, method, game, seed in itertools.product(
        ("bc", "rainbow"), ("curl", "atc"), ("ms_pacman", "pong", "klax"), range(3)
    ):
        rows.append((suite, method, game, seed, raw(game, rng.normal())))
        write_result(tmp_path / "results", *rows[-1], split="?", episode_scores=[1, 2], versions={})
    (tmp_path / "results" / "bc" / "atc" / "pong" / ".seed0.json.7.tmp").write_text("{")  # a run being written
    from_results = report(tmp_path)
    rows = [(suite, method, game.replace("ms_pacman", "MsPacman"), *rest) for suite, method, game, *rest in rows]
    write_csv(tmp_path / "x.csv", rows[::-1])
    text = "\ufeff" + (tmp_path / "x.csv").read_text().replace(",", ", ")  # as spreadsheets write it
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    assert report(tmp_path, "--csv", "x.csv") == from_results
    assert set(from_results["results"]["bc"]) == {"ID", "near-OOD", "far-OOD", "all"}
    assert from_results["metadata"]["splits"]["bc"]["all"]["games"] == ["klax", "ms_pacman", "pong"]
    assert from_results["metadata"]["splits"]["bc"]["all"]["seeds"] == [0, 1, 2]


# === what is shown ====================================================================================================
INCOMPLETE = [
    *(("bc", "curl", game, seed, 1) for game in ("pong", "alien", "qbert") for seed in range(3)),
    *(("bc", "atc", game, seed, 2) for game in ("pong", "alien") for seed in range(2)),
    *(("rainbow", "atc", "klax", seed, 2) for seed in range(2)),
]


def test_missing_games_and_seeds_are_refused(tmp_path):
    write_csv(tmp_path / "x.csv", INCOMPLETE)
    message = fails(tmp_path, "--csv", "x.csv")
    assert "bc: atc lacks seed 2 of alien, pong; seed 0, 1, 2 of qbert." in message
    assert "--allow-missing" in message
    assert "curl" not in message
    assert "rainbow" not in message


def test_methods_that_are_not_shown_do_not_count(tmp_path):
    write_csv(tmp_path / "x.csv", INCOMPLETE)
    content = report(tmp_path, "--csv", "x.csv", "--methods", "atc")
    assert content["metadata"]["splits"]["bc"]["all"]["coverage"] == "2 of 65 games, 2 seeds"
    assert content["metadata"]["splits"]["bc"]["all"]["marked"] == []


def test_allow_missing(tmp_path):
    write_csv(tmp_path / "x.csv", INCOMPLETE)
    done = run(tmp_path, "--csv", "x.csv", "--allow-missing", "--resamples", "50")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "reports" / "iqm.json").read_text())
    splits = content["metadata"]["splits"]["bc"]
    assert {split: of["coverage"] for split, of in splits.items()} == {
        "ID": "1 of 50 games, 3 seeds",
        "near-OOD": "2 of 10 games, 3 seeds",
        "all": "3 of 65 games, 3 seeds",
    }
    assert splits["near-OOD"]["marked"] == ["atc"]
    assert splits["near-OOD"]["notes"] == ["atc* lacks seed 2 of alien, pong."]
    assert list(content["results"]["bc"]["ID"]) == ["curl"]
    value = np.mean([iqm.normalize("pong", 2), iqm.normalize("alien", 2)])
    assert content["results"]["bc"]["near-OOD"]["atc"]["mean"]["value"] == pytest.approx(value)
    assert any(line.startswith("| atc* ") for line in done.stdout.splitlines())
    assert any(line.startswith("| curl  ") for line in done.stdout.splitlines())
    assert "atc* lacks seed 2 of alien, pong; seed 0, 1, 2 of qbert." in done.stdout
    assert "## rainbow, far-OOD: 1 of 5 games, 2 seeds" in done.stdout
    assert "rainbow, ID" not in done.stdout


def test_single_seeds_are_pointed_out(tmp_path):
    seeds = {"pong": 1, "alien": 3, "qbert": 2}
    write_csv(tmp_path / "x.csv", [("bc", "atc", game, i, 1) for game, n in seeds.items() for i in range(n)])
    splits = report(tmp_path, "--csv", "x.csv")["metadata"]["splits"]["bc"]
    assert splits["all"]["coverage"] == "3 of 65 games, 1 to 3 seeds"
    assert any("single seed (1 of 3)" in note for note in splits["all"]["notes"])
    assert splits["ID"]["coverage"] == "1 of 50 games, 2 seeds"
    assert splits["ID"]["notes"] == []


def test_order_and_choice(tmp_path):
    methods = ["zeta", "cql", "alpha", "random", "bc", "spr_idm", "e2e", "curl", "atc"]
    rows = [(suite, m, "pong", i, i) for suite in ("zeroshot", "bc", "rainbow") for m in methods for i in range(2)]
    write_csv(tmp_path / "x.csv", [*rows, *(("bc", "only_bc", "pong", i, i) for i in range(2))])
    results = report(tmp_path, "--csv", "x.csv")["results"]
    assert list(results) == ["bc", "rainbow", "zeroshot"]
    ordered = ["random", "e2e", "curl", "atc", "bc", "spr_idm", "cql", "alpha", "zeta"]
    assert list(results["rainbow"]["all"]) == ordered
    chosen = ["--suites", "zeroshot", "bc", "--methods", "zeta", "only_bc", "atc"]
    results = report(tmp_path, "--csv", "x.csv", *chosen)["results"]
    assert {suite: list(splits["all"]) for suite, splits in results.items()} == {
        "zeroshot": ["zeta", "atc"],
        "bc": ["zeta", "only_bc", "atc"],
    }
    assert list(results) == ["zeroshot", "bc"]


def test_the_seed_decides(tmp_path):
    rng = np.random.default_rng(0)
    runs = itertools.product(("curl", "atc"), GAMES[:9], range(5))
    write_csv(tmp_path / "x.csv", [("bc", method, game, i, raw(game, rng.normal())) for method, game, i in runs])
    first = report(tmp_path, "--csv", "x.csv")
    files = {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()}
    assert report(tmp_path, "--csv", "x.csv", "--seed", "0") == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()} == files
    alone = report(tmp_path, "--csv", "x.csv", "--methods", "atc")
    assert alone["results"]["bc"]["all"]["atc"] == first["results"]["bc"]["all"]["atc"]
    other = report(tmp_path, "--csv", "x.csv", "--seed", "1")["results"]["bc"]["all"]["atc"]["iqm"]
    same = first["results"]["bc"]["all"]["atc"]["iqm"]
    assert other["value"] == same["value"]
    assert other["low"] != same["low"]


# === files ============================================================================================================
def test_files(tmp_path):
    runs = itertools.product(("curl", "a|b"), GAMES, range(3))
    write_csv(tmp_path / "x.csv", [("bc", method, game, i, raw(game, i / 4)) for method, game, i in runs])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "iqm.md").write_text("old")
    done = run(tmp_path, "--csv", "x.csv", "--resamples", "50", "--output-dir", "elsewhere")
    assert done.returncode == 0, done.stderr
    names = ["iqm.json", "iqm.md", "iqm.png", "profiles.png"]  # there is no random to improve over
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == names
    markdown = (tmp_path / "elsewhere" / "iqm.md").read_text()
    table, _, _ = markdown[markdown.index("## bc, near-OOD: 10 of 10 games, 3 seeds") :].partition("\n\n## ")
    assert table in done.stdout
    header, rule, curl, other = table.splitlines()[2:6]
    assert {len(line) for line in (header, rule, curl, other)} == {len(header)}
    assert header.split("|")[1:-1] == [cell.center(len(cell)) for cell in header.split("|")[1:-1]]
    columns = ["method", "learns from", "IQM", "median", "mean", "optimality gap"]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == columns
    assert "| image " in curl and "| other " in other
    assert curl.startswith("| curl ")
    assert "| 0.250 [0." in curl
    assert other.startswith(r"| a\|b ")
    for name in names[2:]:
        with Image.open(tmp_path / "elsewhere" / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), iqm.atomic_write(path) as file:
        file.writelines([b"half of the ne", None])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with iqm.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("count", [1, 16])
def test_figure(tmp_path, count):
    methods = [*iqm.GROUP_OF, "a_method_with_a_rather_long_name", r"$\no_formula$"][-count:]
    row = {m: {"iqm": {"value": 0.3 - 0.1 * i, "low": 0.31 - 0.1 * i, "high": 0.5}} for i, m in enumerate(methods)}
    results = {"bc": {"ID": row, "all": row}, "rainbow": {"far-OOD": row, "all": dict(list(row.items())[::-1])}}
    facts = {s: {t: {"coverage": f"{s} {t}", "marked": [methods[0]]} for t in of} for s, of in results.items()}
    figure = iqm.draw_rows(results, facts, "iqm", 0, "caption")
    figure.savefig(tmp_path / "figure.png")  # the values lie outside of their intervals: that may happen
    panels = [panel for panel in figure.get_axes() if panel.axison]
    titles = ["ID\nbc ID", "all\nbc all", "far-OOD\nrainbow far-OOD", "all\nrainbow all"]
    assert [panel.get_title(loc="left") for panel in panels] == titles
    assert [label.get_text() for label in panels[0].get_yticklabels()] == methods
    assert [bar.get_width() for bar in panels[0].patches] == [row[method]["iqm"]["value"] for method in methods]
    places = [[bar.get_y() + bar.get_height() / 2 for bar in panel.patches] for panel in panels]
    assert places == [pytest.approx(range(count))] * 4
    colours = [[bar.get_facecolor() for bar in panel.patches] for panel in panels]
    assert colours[0] == colours[1] == colours[2][::-1] == colours[3][::-1]
    assert len(set(colours[0])) == count
    assert panels[0].texts[0].get_text().strip() == "0.30*"
    for label in panels[0].get_yticklabels():
        box = label.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= panels[0].get_window_extent().x0
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ([*iqm.GROUPS, "other"] if count > 1 else ["other"])


def test_a_paper_s_method_always_has_its_colour():
    """Whatever else is shown, so that figures of other runs can be held side by side."""
    some = iqm.colours({"bc": {"all": {"atc": {}, "dt": {}}}})
    more = iqm.colours({"bc": {"all": {"atc": {}, "mine": {}, "zeta": {}}}, "zeroshot": {"all": {"yours": {}}}})
    assert {method: more[method] for method in iqm.GROUP_OF} == some
    assert len(set(more.values())) == len(iqm.GROUP_OF) + 3


@pytest.mark.parametrize("count", [1, 16])
def test_figure_of_profiles(tmp_path, count):
    """A line and a band for each method in each panel, all in the legend, which lies beside the panels."""
    methods = [*iqm.GROUP_OF, r"$\no_formula$", "a_method_with_a_rather_long_name"][-count:]
    value = np.linspace(1, 0, 101)
    profiles = [{"value": value / (i + 1), "low": value / (i + 2), "high": value} for i in range(count)]
    row = {method: {"profile": profile} for method, profile in zip(methods, profiles, strict=True)}
    results = {"bc": {"ID": row, "all": row}, "zeroshot": {"all": dict(list(row.items())[:1])}}
    facts = {s: {t: {"coverage": f"{s} {t}", "marked": []} for t in of} for s, of in results.items()}
    figure = iqm.draw_profiles(results, facts)
    figure.savefig(tmp_path / "figure.png")
    panels = [panel for panel in figure.get_axes() if panel.axison]
    assert [len(panel.lines) for panel in panels] == [len(panel.collections) for panel in panels] == [count, count, 1]
    for i, line in enumerate(panels[0].lines):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([iqm.TAU, value / (i + 1)], axis=1))
    for i, band in enumerate(panels[0].collections):
        y = band.get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == (0, 1) and np.isclose(y, 1 / (i + 2)).any()
    looks = [(line.get_color(), line.get_linestyle()) for line in panels[0].lines]
    assert len(set(looks)) == count
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == methods
    assert [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()] == looks
    box = legend.get_window_extent()
    assert box.x0 >= max(panel.get_window_extent().x1 for panel in panels) and box.x1 <= figure.bbox.x1


# === profiles and improvement =========================================================================================
def tied(seeds: int, games: int, seed: int) -> tuple[np.ndarray, dict]:
    """Scores [seeds, games] in steps of 0.1, so that some are equal to each other and to a tau."""
    scores = np.random.default_rng(seed).integers(-2, 15, (seeds, games)) / 10
    return scores, {(GAMES[j], i): scores[i, j] for i in range(seeds) for j in range(games)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (5, 26), (3, 64)])
def test_profiles_equal_rliable(shape):
    """The share of runs above tau, strictly, at every tau; the bands to within what 2,000 resamples tell."""
    scores, cells = tied(*shape, seed=3)
    found = iqm.profile(cells)
    np.random.seed(0)  # noqa: NPY002, rliable draws from this
    expected, bands = library.create_performance_profile({"it": scores}, iqm.TAU, reps=2_000)
    np.testing.assert_allclose(found["value"], expected["it"], rtol=1e-12)
    for end, band in zip(("low", "high"), bands["it"], strict=True):
        apart = np.abs(np.array(found[end]) - band) * scores.size  # in runs
        assert apart.max() <= 1 + 1e-9 and apart.mean() < 0.5
    assert (np.diff(found["value"]) <= 0).all()


def test_bands_of_profiles_of_games_with_different_numbers_of_seeds():
    """Against all 1 * 4 * 27 equally probable resamples."""
    seeds = {"pong": [0.3], "qbert": [0.12, 1.25], "zaxxon": [-0.17, 0.42, 0.93]}
    found = iqm.profile({(g, i): x for g, of in seeds.items() for i, x in enumerate(of)})
    resamples = list(itertools.product(*(itertools.product(of, repeat=len(of)) for of in seeds.values())))
    for i, tau in enumerate(iqm.TAU):
        shares = sorted(sum(score > tau for score in itertools.chain(*x)) / 6 for x in resamples)
        assert found["low"][i] == pytest.approx(shares[2]), tau  # 2/108 < 2.5% < 3/108
        assert found["high"][i] == pytest.approx(shares[-3]), tau
    assert found["value"][15] == pytest.approx(3 / 6)  # at 0.3 that score itself is not above


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (5, 26), (3, 64)])
def test_probability_of_improvement_equals_rliable(shape):
    (x, cells_x), (y, cells_y) = tied(*shape, seed=1), tied(*shape, seed=2)
    found = iqm.improvement(cells_x, cells_y, 20_000, seed=0)
    assert found["value"] == pytest.approx(metrics.probability_of_improvement(x, y), rel=1e-6)
    reverse = iqm.improvement(cells_y, cells_x, 10, seed=0)
    assert reverse["value"] == pytest.approx(1 - found["value"], rel=1e-6)
    if shape in ((1, 1), (3, 64)):  # one has no interval, of the other it takes rliable minutes
        return
    np.random.seed(0)  # noqa: NPY002
    together = lambda x, y: np.array([metrics.probability_of_improvement(x, y)])  # noqa: E731
    _, intervals = library.get_interval_estimates({"x,y": (x, y)}, together, reps=1_000)
    low, high = intervals["x,y"][:, 0]
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.12 * (high - low) + 1e-6)


def test_improvement_of_games_with_different_numbers_of_seeds():
    """By hand, and against all equally probable resamples; a game that only one of the two has does not count."""
    x = {"pong": [0.3, 0.7], "qbert": [0.1], "klax": [5.0]}
    y = {"pong": [0.3, 0.5, 0.7], "qbert": [0.1, 0.0], "alien": [9.0]}
    cells = [{(g, i): score for g, of in scores.items() for i, score in enumerate(of)} for scores in (x, y)]
    found = iqm.improvement(*cells, 50_000, seed=0)
    beats = lambda a, b: np.mean([(p > q) + (p == q) / 2 for p in a for q in b])  # noqa: E731
    assert found["value"] == pytest.approx(((0.5 + 0 + 0 + 1 + 1 + 0.5) / 6 + (0.5 + 1) / 2) / 2)
    draws = [list(itertools.product(of, repeat=len(of))) for of in (x["pong"], y["pong"], y["qbert"])]
    exact = [(beats(a, b) + beats([0.1], c)) / 2 for a, b, c in itertools.product(*draws)]  # 4 * 27 * 4
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(exact, [2.5, 97.5], method="inverted_cdf"))


def test_memory_of_improvement_is_bounded():
    cells = [matrix(3, 64)[1] for _ in range(2)]
    tracemalloc.start()
    iqm.improvement(*cells, 20_000, seed=0)  # 31 MB of draws, had they all to be there at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


COMPARED = [("bc", m, g, i, raw(g, x + i / 9)) for m, x in (("random", 0), ("atc", 0.1), ("curl", 1)) for g in GAMES[:4]
            for i in range(3)]  # fmt: skip


def test_improvement_over_random_or_another(tmp_path):
    write_csv(tmp_path / "x.csv", [*COMPARED, *(("zeroshot", "bc", "pong", i, i) for i in range(3))])
    content = report(tmp_path, "--csv", "x.csv")
    row = content["results"]["bc"]["all"]
    found = [row[m].get("improvement", {}).get("value") for m in ("random", "curl", "atc")]
    assert found == [None, 1, pytest.approx(2 / 3)]
    assert content["metadata"]["improvement_over"] == "random"
    assert (tmp_path / "reports" / "improvement.png").exists()
    text = (tmp_path / "reports" / "iqm.md").read_text()
    assert text.count("P(> random)") == 3  # in bc's tables of ID, near-OOD and all, not in zeroshot's
    assert "![improvement](improvement.png)" in text
    row = report(tmp_path, "--csv", "x.csv", "--improvement-over", "curl")["results"]["bc"]["all"]
    assert [row[m].get("improvement", {}).get("value") for m in ("random", "curl", "atc")] == [0, None, 0]
    row = report(tmp_path, "--csv", "x.csv", "--methods", "curl", "atc")["results"]["bc"]["all"]
    assert not any("improvement" in of for of in row.values())  # random is not shown
    assert not (tmp_path / "reports" / "improvement.png").exists()


def test_improvement_over_nobody_is_an_error(tmp_path):
    write_csv(tmp_path / "x.csv", [*COMPARED, ("bc", "lone", "klax", 0, 1)])
    csv = {"csv": tmp_path / "x.csv", "allow_missing": True, "resamples": 10}
    assert "--improvement-over" in (message := refuses(tmp_path, **csv, improvement_over="spr")) and "spr" in message
    assert "lone has no game in common" in refuses(tmp_path, **csv, improvement_over="lone")


def test_improvement_is_noted_to_be_on_common_games(tmp_path):
    rows = [row for row in COMPARED if row[:3] != ("bc", "atc", GAMES[0])]
    write_csv(tmp_path / "x.csv", rows)
    content = report(tmp_path, "--csv", "x.csv", "--allow-missing")
    facts = content["metadata"]["splits"]["bc"]["all"]
    assert "P(> random) is over the games that a method has in common with random." in facts["notes"]
    assert content["results"]["bc"]["all"]["atc"]["improvement"]["value"] == pytest.approx(2 / 3)


def test_methods_are_grouped_by_what_they_learn_from(tmp_path):
    """The paper's 14 rows in its order, group by group; what is not the paper's comes last."""
    paper = "random e2e curl mae atc siammae r3m bc spr idm spr_idm dt cql_mse cql".split()
    write_csv(tmp_path / "x.csv", [("bc", m, "pong", i, i) for m in ["zeta", *paper[::-1]] for i in range(2)])
    content = report(tmp_path, "--csv", "x.csv")
    assert list(content["results"]["bc"]["all"]) == [*paper, "zeta"]
    assert list(itertools.chain(*content["metadata"]["groups"].values())) == paper
    table = (tmp_path / "reports" / "iqm.md").read_text().partition("## bc, all")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")][2:]
    groups = dict(rows)
    assert [groups[m] for m in ("e2e", "mae", "r3m", "spr_idm", "dt", "cql", "zeta")] == [
        *("baseline", "image", "video", "demonstration", "trajectory", "trajectory", "other"),
    ]
