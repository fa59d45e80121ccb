"""The whole way through the benchmark, as README and docs tell it, on tiny data: from downloads to the tables."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, load, run, write_replay

FILE = Path(__file__).parent / "data" / "rlu" / "Breakout" / "run_1-00001-of-00050"  # of RL Unplugged
SHORT = ("--batch-size", 16, "--precision", "fp32", "--device", "cpu", "--no-compile")
SCORE = ("--eval-episodes", 2, "--max-episode-steps", 20)
GAMES = {"breakout": "rl_unplugged", "alien": "rl_unplugged", "klax": "rainbow"}  # ID, near-OOD and far-OOD


def record(data_dir: Path, game: str, rows: int) -> None:
    """What a recording leaves: run 1, checkpoint 2, and its source."""
    rng = np.random.default_rng(0)
    columns = {"observation": rng.integers(0, 256, (rows, 84, 84), dtype=np.uint8), "action": rng.integers(0, 18, rows)}
    write_replay(data_dir, game, columns | {"reward": [0.0] * rows, "terminal": [0] * rows}, number=2)
    (data_dir / game.capitalize() / "source.txt").write_text("rainbow\n")


@pytest.mark.slow
def test_from_downloads_to_tables(tmp_path):
    """Downloaded and recorded games in one folder, fine-tuning's defaults, two methods with a pre-training for each
    seed, a baseline and zero-shot play, and no flag that allows anything."""
    for game in ("Breakout", "Alien"):
        for number in range(1, 6):
            for checkpoint in (1, 2, 49):
                target = tmp_path / "mirror" / game / f"run_{number}-{checkpoint:05}-of-00050"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(FILE, target)
    download = ("--url", "mirror", "--games", "Breakout", "alien", "--rows-per-checkpoint", 100, "--data-dir", "data")
    pretraining = ("--runs", 1, 2, "--checkpoints", 1, 2)
    run("download_data.py", *download, *pretraining, cwd=tmp_path)
    run("download_data.py", *download, "--for", "finetuning", cwd=tmp_path)
    record(tmp_path / "data", "klax", 501)

    few = (*SMALL, *SHORT, "--data-dir", "data", "--games", "breakout", "--rows-per-checkpoint", 100, *pretraining)
    checkpoints = {}
    for method, seed in ((method, seed) for method in ("atc", "bc") for seed in range(2)):
        run(f"pretrain_{method}.py", *few, "--total-steps", 2, "--seed", seed, cwd=tmp_path)
        checkpoints[method, seed] = f"runs/pretrain_{method}__{seed}/checkpoint.pt"

    finetune = load("finetune_bc.py")
    clone = (*SMALL, *SHORT, *SCORE, "--data-dir", "data", "--epochs", 1, "--num-transitions", 500)
    for game, seed, method in ((game, seed, m) for game in GAMES for seed in range(2) for m in ("random", "atc", "bc")):
        start = ("--checkpoint", checkpoints[method, seed]) if method != "random" else ()
        args = map(str, (*clone, "--game", game, "--seed", seed, *start))
        with contextlib.chdir(tmp_path):
            finetune.finetune(finetune.tyro.cli(finetune.Args, args=[*args]))
    for seed in range(2):
        player = ("--checkpoint", checkpoints["bc", seed], "--seed", seed, "--precision", "fp32", *SCORE)
        run("eval_zeroshot.py", *player, cwd=tmp_path)
    run("eval_iqm.py", cwd=tmp_path)

    results = [json.loads(path.read_text()) for path in (tmp_path / "results" / "bc").glob("*/*/*.json")]
    assert len(results) == 3 * 3 * 2 and all(result["data"] == GAMES[result["game"]] for result in results)
    backbones = {(result["method"], result["seed"], result["backbone"]) for result in results}
    assert len(backbones) == 6 and len({backbone for _, _, backbone in backbones}) == 5  # random has none
    tables = json.loads((tmp_path / "reports" / "iqm.json").read_text())["results"]
    assert {suite: list(splits) for suite, splits in tables.items()} == {
        "bc": ["ID", "near-OOD", "far-OOD", "all"],
        "zeroshot": ["ID", "all"],
    }
    assert list(tables["bc"]["far-OOD"]) == ["random", "atc", "bc"]
    text = (tmp_path / "reports" / "iqm.md").read_text()
    assert "## bc, all, smoke test: 3 of 65 games, 2 seeds" in text and "Mixed" not in text
