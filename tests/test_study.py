"""The study in small: as a user runs it, cut off and gone on, with an ablation; its numbers; and what it concludes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, load

SMALLEST = """--scale cpu --twice curl --stacks 640 --rows 400 --probe-rows 250 --transitions 200 --episode-steps 60
    --resamples 500""".split()
METHODS = ["random", "curl", "mae", "atc", "bc"]
SPLITS = ["ID", "ID", "near-OOD", "near-OOD", "far-OOD", "far-OOD"]  # of six games


def start(project: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, project / "benchmarks/study.py", *SMALLEST, *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=project, env=environment(), start_new_session=True, **pipes)


def finish(project: Path, *flags, code: int = 0) -> str:
    process = start(project, *flags)
    printed, _ = process.communicate(timeout=3000)
    assert process.returncode == code, printed
    return printed


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def differences(page: str, claim: str) -> list[float]:
    """The first value of a claim's row, of the scores and of the probes"""
    return [float(value) for value in re.findall(rf"^\| {claim} \| all splits: (-?[\d.]+) \[", page, re.MULTILINE)]


def iqm_of(folder: Path, method: str) -> float:
    """By hand: of two games and two seeds, the mean of the two scores in the middle"""
    scores = []
    for path in folder.glob(f"results/bc/{method}/*/seed*.json"):
        random, reference = load("eval_iqm.py").SCORES[path.parent.name]
        scores.append((json.loads(path.read_text())["score"] - random) / (reference - random))
    _, low, high, _ = sorted(scores)
    return (low + high) / 2


def accuracy_of(folder: Path, method: str) -> float:
    """By hand: the mean over a split's pre-trainings, then over the splits"""
    means = []
    for split in ("ID", "near-OOD"):
        reports = folder.glob(f"reports/probe_{split}_{method}__*/probe.json")
        results = [json.loads(path.read_text())["results"].items() for path in reports]
        found = [row["action"]["value"] for rows in results for name, row in rows if name.startswith(method)]
        means.append(np.mean(found))
    return np.mean(means)


def random_accuracy(folder: Path) -> float:
    paths = folder.glob("reports/probe_*_curl__*/probe.json")
    return np.mean([json.loads(path.read_text())["results"]["random"]["action"]["value"] for path in paths])


@pytest.mark.slow
def test_the_whole_study(tmp_path):
    """Killed amid pre-training, it goes on. The page's numbers are those of the files. An ablation joins later."""
    project, folder = tmp_path / "project", tmp_path / "project/study"
    (project / "benchmarks").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")):
        shutil.copy(path, project / path.relative_to(ROOT))

    process = start(project, "--methods", "curl", "bc")
    while not (folder / "runs/curl__0/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the study and the scripts that it runs
    process.wait()
    process.stdout.close()
    before = files(folder / "replay")
    assert {path.name for path in (folder / "logs").glob("*.log")} >= {"play_asterix.log", "play_space_invaders.log"}
    assert not list((folder / "logs").glob("finetune*"))

    printed = finish(project, "--methods", "curl", "bc")
    assert "data: 0 of 2 runs to do" in printed
    assert "finetune: 16 of 16 runs to do" in printed
    assert files(folder / "replay") == before
    for name, seed in (("curl__0", 0), ("curl__1", 1), ("bc__0", 0)):
        content = torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)
        assert (content["step"], content["args"]["seed"]) == (20, seed)
    used = {path: json.loads(path.read_text())["checkpoint"] for path in folder.glob("results/bc/*/*/seed*.json")}
    for path, checkpoint in used.items():
        seed = path.stem[-1] if "curl" in path.parts else "0"
        expected = f"runs/{path.parts[-3]}__{seed}/checkpoint.pt"
        assert checkpoint == (None if path.parts[-3] in ("random", "e2e") else expected)

    page = (folder / "study.md").read_text()
    for method in ("random", "e2e", "curl", "bc"):
        rows = re.findall(rf"^\| {method} +\| \w+ +\| +(-?[\d.]+) \[", page, re.MULTILINE)
        assert float(rows[-1]) == pytest.approx(iqm_of(folder, method), abs=6e-4)  # the last table is of all games
    gain = (iqm_of(folder, "curl") + iqm_of(folder, "bc")) / 2 - iqm_of(folder, "random")
    probed = (accuracy_of(folder, "curl") + accuracy_of(folder, "bc")) / 2 - random_accuracy(folder)
    assert differences(page, "Pre-training beats a random backbone") == pytest.approx([gain, probed], abs=6e-4)
    assert "scripted_play" in page
    assert "Ablation" not in page
    assert {path.name for path in folder.glob("*.png")} == {f"study-{what}.png" for what in ("iqm", "loss", "players")}

    shutil.copy(project / "pretrain_curl.py", project / "pretrain_curl_cosine.py")
    with open(ROOT / "ablations/cosine.patch") as patch:
        subprocess.run(["patch", "-s", "pretrain_curl_cosine.py"], stdin=patch, cwd=project, check=True)
    before = files(folder / "results")
    printed = finish(project, "--methods", "curl", "curl_cosine")
    assert "pretrain: 2 of 4 runs to do" in printed
    assert "finetune: 4 of 16 runs to do" in printed
    assert before.items() < files(folder / "results").items()
    page = (folder / "study.md").read_text()
    expected = [of(folder, "curl_cosine") - of(folder, "curl") for of in (iqm_of, accuracy_of)]
    assert differences(page, "Ablation: curl_cosine beats curl") == pytest.approx(expected, abs=6e-4)

    assert "was begun with {'epochs': 1}" in finish(project, "--epochs", "2", code=1)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load("benchmarks/study.py")


def test_a_study_stops_in_time(study, tmp_path):
    """A running script is told to stop, those after it do not begin; both are run by the next call."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(1)))\n"
        "print('started', flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    args = study.Args("cpu", folder=tmp_path, jobs=1, minutes=(time.time() - study.START + 5) / 60)
    with pytest.raises(SystemExit, match=r"minutes are over, in stage pretrain\. The same command goes on\."):
        study.run_all(args, "pretrain", {"first": [script, 600], "second": [script, 0]})
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["first.part"]
    assert (tmp_path / "logs/first.part").read_text() == "started\nsaved\n"
    args.minutes = math.inf
    study.run_all(args, "pretrain", {"first": [script, 0], "second": [script, 0]})
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"first.log", "second.log"}


def test_a_script_that_fails_is_not_done(study, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such file')")
    args = study.Args("cpu", folder=tmp_path, jobs=1)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"script\.py failed:\nno such file"):
            study.run_all(args, "pretrain", {"first": [script]})


@pytest.mark.parametrize("method", ["cosine", "curlcosine", "curl_cosine"])
def test_methods_are_scripts(study, tmp_path, method):
    """The last one is named after an original, but is not there."""
    with pytest.raises(SystemExit, match=f"--methods {method}: no pretrain_{method}.py"):
        study.main(study.Args("cpu", folder=tmp_path, methods=("bc", method)))


def test_what_a_copy_is_named_after(study):
    copies = {"curl_cosine": "curl", "spr_idm_deep": "spr_idm", "spr_deep": "spr", "bc": "bc", "random": "", "bcx": ""}
    assert {copy: study.origin(copy) for copy in copies} == copies
    args = study.Args("gpu", twice=("curl",))
    assert [study.pretrainings(args, method) for method in ("curl", "curl_cosine", "bc")] == [2, 2, 1]


def scores(noise=0.01, **means) -> np.ndarray:
    """[methods, games, 3 seeds]: the mean of a method, or of each of its games, 0 if not given, and -+ noise"""
    x = np.tile([-noise, 0, noise], (len(METHODS), len(SPLITS), 1))
    for method, mean in means.items():
        x[METHODS.index(method)] += np.array(mean).reshape(-1, 1)
    return x


def judge(study, x, methods=METHODS, splits=SPLITS, pretrained=None, error=0.0, resamples=500) -> list[list[str]]:
    error = np.full(x.shape[:2], error)
    x = study.resample(x, pretrained or [1] * len(methods), error, resamples)
    return study.judge(methods, splits, x, lambda x: study.eval_iqm.interquartile_mean(x, np.ones(1)), x.shape[3] > 1)


def test_verdicts(study):
    def verdicts(*given, **options):
        return [row[-1].strip("*") for row in judge(study, *given, **options)]

    specific = [1, 1, 1, 1, 0, 0]
    all_support = scores(random=-1, curl=0.5, mae=0.5, atc=1, bc=specific)
    assert verdicts(all_support) == ["support it"] * 4
    contradicted = scores(random=2, curl=1, bc=specific[::-1])
    assert verdicts(contradicted) == ["contradict it"] * 4
    assert verdicts(scores(noise=0.5)) == ["cannot tell"] * 4
    assert verdicts(all_support[:, :, :1]) == ["cannot tell"] * 4  # a single seed
    no_far = verdicts(all_support[:, :4], splits=SPLITS[:4])
    assert no_far == ["support it", "cannot tell", "cannot tell", "support it"]
    assert verdicts(all_support, error=5.0) == ["cannot tell"] * 4


def test_intervals_are_those_of_eval_iqm(study):
    """The gain of a single method, when the random backbone's scores are all 0, is its IQM."""
    x = scores(curl=[0, 1, 2, 3, 4, 5], noise=0.3)
    x[0] = 0  # random
    rows = judge(study, x[[0, 1]], ["random", "curl"], resamples=20_000)
    cells = {(f"game {game}", seed): x[1, game, seed] for game in range(6) for seed in range(3)}
    expected = study.eval_iqm.estimate(cells, 20_000, 0)["iqm"]
    value, *ends = (float(number.strip("[],")) for number in rows[0][1].split()[-3:])
    assert value == pytest.approx(expected["value"], abs=1e-3)
    assert ends == pytest.approx([expected["low"], expected["high"]], abs=0.02)


def test_two_pretrainings_are_drawn_for_all_games_alike(study):
    """Seeds 0 and 2 are of pre-training 0, seed 1 of the other: half of the draws are 10, which plain ones are not."""
    x = np.tile([0.0, 10.0, 1.0], (2, 4, 1))  # of two methods, the second one pre-trained once
    value, *again = study.resample(x, [2, 1], np.zeros((2, 4)), 4_000)
    twice, once = np.swapaxes(again, 0, 1)  # [resamples, games, seeds] each
    assert (value == x).all()
    assert ((twice == 10) == (twice == 10)[:, :1]).all()
    assert not ((once == 10) == (once == 10)[:, :1]).all()
    for drawn, shares in ((twice, [1 / 4, 1 / 4, 1 / 2]), (once, [1 / 3, 1 / 3, 1 / 3])):
        assert [np.mean(drawn == score) for score in (0, 1, 10)] == pytest.approx(shares, abs=0.02)
    # One seed of cloning is of pre-training 0, whatever else was pre-trained.
    assert (study.resample(x[:, :, :1], [2, 1], np.zeros((2, 4)), 10) == 0).all()


def test_a_second_pretraining_that_differs_makes_the_interval_wide(study):
    """Each clones the same in all games, so that drawing games apart would average the difference away."""
    x = scores(noise=0)
    x[METHODS.index("curl"), :, 1] = 1
    widths = []
    for backbones in (1, 2):
        row = judge(study, x[:2], ["random", "curl"], pretrained=[1, backbones], resamples=4_000)[0]
        low, high = (float(number.strip("[],")) for number in row[1].split()[-2:])
        widths.append(high - low)
    assert widths[1] == 1 > widths[0]


def test_errors_add_up(study):
    """Values without spread, and errors of 0.3 and 0.4: the difference has an error of 0.5."""
    x = np.zeros((2, 1, 2))
    x[1] = 1
    x = study.resample(x, [1, 1], np.array([[0.3], [0.4]]), 40_000)
    ((_, cell, _), *_) = study.judge(["random", "bc"], ["ID"], x, lambda x: x.mean(1), True)
    value, low, high = (float(number.strip("[],")) for number in cell.split()[-3:])
    assert value == 1
    assert [low, high] == pytest.approx([1 - 1.96 * 0.5, 1 + 1.96 * 0.5], abs=0.03)
