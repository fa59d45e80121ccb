"""The study in small: all stages with the smallest settings, cut off by SIGKILL and gone on, and what it concludes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, load

SMALLEST = """--scale cpu --jobs 2 --games freeway pong surround --methods atc bc --seeds 1 --width-multiplier 0.125
    --play-steps 3500 --updates-per-step 0.01 --stacks 640 --batch-size 32 --transitions 200 --epochs 1 --episodes 2
    --episode-steps 20 --resamples 200""".split()
METHODS = ["random", "e2e", "curl", "mae", "atc", "bc"]
GAMES = ["freeway", "boxing", "pong", "assault", "surround", "klax"]  # two of each split


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "benchmarks/study.py", "--folder", folder, *SMALLEST, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def finish(folder: Path, *flags: str, code: int = 0) -> str:
    process = start(folder, *flags)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == code, printed
    return printed


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_whole_study_goes_on_after_a_kill(tmp_path):
    process = start(tmp_path)
    checkpoint = tmp_path / "runs/atc/checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the study and the scripts that it runs, amid pre-training
    process.wait()
    process.stdout.close()
    before = files(tmp_path / "logs")
    done = [path for path in before if path.suffix == ".log"]
    assert len(done) >= 6  # three agents and random play of three games
    assert not (tmp_path / "study.md").exists()

    printed = finish(tmp_path)
    assert "data: 0 of 6 runs to do" in printed
    assert "finetune: 13 of 13 runs to do" in printed
    assert all((tmp_path / "logs" / path.name).stat().st_mtime_ns == before[path] for path in done)
    for method, steps in {"atc": 10, "bc": 20}.items():
        assert torch.load(tmp_path / f"runs/{method}/checkpoint.pt", weights_only=True)["step"] == steps
    page = (tmp_path / "study.md").read_text()
    assert page.startswith("# The benchmark in small: a run on a CPU\n")
    assert {path.name for path in tmp_path.glob("study*.png")} == {"study.png", "study-probe.png"}
    for said in ("| surround", "| pretrain |", "| finetune |", "commits", "**cannot tell**", "RankMe"):
        assert said in page

    before = files(tmp_path)
    printed = finish(tmp_path)
    assert all(f"{stage}: 0 of " in printed for stage in ("data", "pretrain", "finetune"))
    assert "study.md is there already" in printed
    changed = {path.name for path, written in files(tmp_path).items() if before.get(path) != written}
    assert changed <= {"settings.json", "times.jsonl"}
    assert "was begun with {'epochs': 1}" in finish(tmp_path, "--epochs", "2", code=1)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load("benchmarks/study.py")


def scores(noise=0.01, **means) -> np.ndarray:
    """[methods, games, 3 seeds]: the mean of a method, or of each of its games, 0 if not given, and -+ noise"""
    x = np.tile([-noise, 0, noise], (len(METHODS), len(GAMES), 1))
    for method, mean in means.items():
        x[METHODS.index(method)] += np.array(mean).reshape(-1, 1)
    return x


def verdicts(study, x, games=GAMES) -> list[str]:
    return [row[-1].strip("*") for row in study.judge(METHODS, games, x, 500)]


def test_verdicts(study):
    specific = [1, 1, 1, 1, 0, 0]
    all_support = scores(random=-1, curl=0.5, mae=0.5, atc=1, bc=specific)
    assert verdicts(study, all_support) == ["support it"] * 4
    contradicted = scores(random=2, curl=1, bc=specific[::-1])
    assert verdicts(study, contradicted) == ["contradict it"] * 4
    assert verdicts(study, scores(noise=0.5)) == ["cannot tell"] * 4
    assert verdicts(study, all_support[:, :, :1]) == ["cannot tell"] * 4  # a single seed
    no_far = verdicts(study, all_support[:, :4], GAMES[:4])
    assert no_far == ["support it", "cannot tell", "cannot tell", "support it"]


def test_intervals_are_those_of_eval_iqm(study):
    """The gain of a single method, when random play's scores are all 0, is its IQM."""
    x = scores(curl=[0, 1, 2, 3, 4, 5], noise=0.3)
    x[0] = 0  # random
    rows = study.judge(["random", "curl"], GAMES, x[[0, 2]], 20_000)
    cells = {(game, seed): x[2, i, seed] for i, game in enumerate(GAMES) for seed in range(3)}
    expected = study.eval_iqm.estimate(cells, 20_000, 0)["iqm"]
    value, *ends = (float(number.strip("[],")) for number in rows[0][1].split()[-3:])
    assert value == pytest.approx(expected["value"], abs=1e-3)
    assert ends == pytest.approx([expected["low"], expected["high"]], abs=0.02)


def test_agents_no_better_than_random_play_are_named(study, tmp_path):
    played = {"freeway": ([20, 22, 21], [0, 0, 1]), "pong": ([-21, -20, -21], [-21, -21, -20])}
    for game, of in played.items():
        for (player, seed), episodes in zip((("nature", 1), ("random_play", 0)), of, strict=True):
            path = tmp_path / f"agents/rainbow/{player}/{game}/seed{seed}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"episode_scores": episodes}))
    better, table = study.data_agents(study.Args("cpu", folder=tmp_path, games=("freeway", "pong")))
    assert better == ["freeway"]
    assert "| freeway | 21.00 ± 0.58 | 0.33 ± 0.33 | yes |" in table
    assert "| pong | -20.67 ± 0.33 | -20.67 ± 0.33 | **no** |" in table
