"""Fine-tuning by behaviour cloning as a user runs it, from every kind of checkpoint, and its results."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRETRAINING, SMALL, Bomb, load, run
from PIL import Image
from test_pretrain import assert_equal, scalars, start, wait_for

bc = load("finetune_bc.py")
SHORT = ("--epochs", 1, "--batch-size", 32, "--eval-episodes", 2, "--max-episode-steps", 20)
QUICK = ("--game", "pong", *SMALL, *SHORT, "--play-rows", 150)


@pytest.fixture(scope="module")
def pretrained(alone) -> Path:
    return alone("pretrain_atc.py")[0] / "runs" / "pretrain_atc__7" / "checkpoint.pt"


def result(folder: Path, method: str, seed: int = 0, game: str = "pong") -> dict:
    return json.loads((folder / "results" / "bc" / method / game / f"seed{seed}.json").read_text())


def test_from_a_checkpoint(pretrained, tmp_path):
    done = run("finetune_bc.py", *QUICK, "--checkpoint", pretrained, "--video", cwd=tmp_path)
    assert "No --data-dir: a smoke test on 150 rows of random play" in done.stdout
    found = result(tmp_path, "atc")
    identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "checkpoint")}
    expected = {"suite": "bc", "method": "atc", "game": "pong", "split": "near_ood", "seed": 0}
    assert identity == expected | {"checkpoint": str(pretrained)}
    assert len(found["episode_scores"]) == 2
    assert found["score"] == np.mean(found["episode_scores"])
    assert found["normalized_score"] == pytest.approx((found["score"] + 20.7) / (16.61 + 20.7), rel=1e-6)
    assert found["args"]["eval_episodes"] == 2
    assert found["versions"]["torch"] == torch.__version__

    run_dir = tmp_path / "runs" / "finetune_bc__atc__pong__0"
    logged = scalars(run_dir)
    assert {"losses/loss", "losses/accuracy", "charts/learning_rate", "eval/score"} <= logged.keys()
    saved = torch.load(run_dir / "policy.pt", weights_only=True)
    assert saved.keys() == {"neck", "head"}
    assert saved["head"]["weight"].shape == (1, 512, 18)
    with Image.open(run_dir / "episode.gif") as video:
        assert 1 < video.n_frames <= 20  # equal frames are stored once, shown longer
        assert video.size == (252, 252)


@pytest.mark.parametrize("script", PRETRAINING)
def test_from_every_objective(script, alone, tmp_path):
    name = script.removesuffix(".py")
    checkpoint = alone(script)[0] / "runs" / f"{name}__7" / "checkpoint.pt"
    run("finetune_bc.py", *QUICK, "--checkpoint", checkpoint, cwd=tmp_path)
    assert result(tmp_path, name.removeprefix("pretrain_"))["checkpoint"] == str(checkpoint)


def test_baselines_and_names(pretrained, tmp_path):
    """random and e2e without a checkpoint; an unfrozen or named one cannot be mistaken for the method itself."""
    run("finetune_bc.py", *QUICK, cwd=tmp_path)
    run("finetune_bc.py", *QUICK, "--no-freeze-backbone", cwd=tmp_path)
    run("finetune_bc.py", *QUICK, "--no-freeze-backbone", "--checkpoint", pretrained, cwd=tmp_path)
    run("finetune_bc.py", *QUICK, "--method", "mine", "--checkpoint", pretrained, "--seed", 3, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "results" / "bc").iterdir()) == ["atc_e2e", "e2e", "mine", "random"]
    assert result(tmp_path, "mine", seed=3)["seed"] == 3
    assert result(tmp_path, "random")["checkpoint"] is None
    end_to_end = torch.load(tmp_path / "runs" / "finetune_bc__e2e__pong__0" / "policy.pt", weights_only=True)
    torch.manual_seed(0)
    initial = bc.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    assert end_to_end["backbone"].keys() == initial.keys()
    assert not any(torch.equal(x, initial[name]) for name, x in end_to_end["backbone"].items())


def test_what_is_done_is_skipped_and_the_seed_decides(tmp_path):
    args = (*QUICK, "--max-episode-steps", 300, "--precision", "fp32")
    run("finetune_bc.py", *args, cwd=tmp_path)
    path = tmp_path / "results" / "bc" / "random" / "pong" / "seed0.json"
    policy = tmp_path / "runs" / "finetune_bc__random__pong__0" / "policy.pt"
    content, before, saved = path.read_text(), path.stat().st_mtime_ns, torch.load(policy, weights_only=True)
    done = run("finetune_bc.py", *args, cwd=tmp_path)
    assert "is there already" in done.stdout and path.stat().st_mtime_ns == before
    done = run("finetune_bc.py", *args, "--learning-rate", 0.5, cwd=tmp_path, code=1)
    assert "was made with {'learning_rate': 0.001}" in done.stderr
    done = run("finetune_bc.py", *args, "--data-dir", "data", cwd=tmp_path, code=1)  # that was random play
    assert "was made with {'play_rows': 150}" in done.stderr
    run("finetune_bc.py", *args, "--overwrite", cwd=tmp_path)
    assert path.stat().st_mtime_ns > before
    assert_equal(torch.load(policy, weights_only=True), saved)
    assert json.loads(path.read_text())["episode_scores"] == json.loads(content)["episode_scores"]
    run("finetune_bc.py", *args, "--seed", 1, cwd=tmp_path)
    other = torch.load(tmp_path / "runs" / "finetune_bc__random__pong__1" / "policy.pt", weights_only=True)
    assert not torch.equal(other["head"]["weight"], saved["head"]["weight"])


def test_a_result_that_came_meanwhile_is_kept(monkeypatch, capsys, tmp_path):
    """Another process ends the same run while this one prepares its data."""
    args = (*QUICK, "--max-episode-steps", 5)
    (tmp_path / "other").mkdir()
    run("finetune_bc.py", *args, cwd=tmp_path / "other")
    path = tmp_path / "results" / "bc" / "random" / "pong" / "seed0.json"
    prepare = bc.prepare

    def prepare_and_wait(*given):
        shutil.copytree(tmp_path / "other" / "results", tmp_path / "results")
        return prepare(*given)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bc, "prepare", prepare_and_wait)
    bc.finetune(bc.tyro.cli(bc.Args, args=[*map(str, args)]))
    assert "is there already" in capsys.readouterr().out
    other = tmp_path / "other" / path.relative_to(tmp_path)
    assert path.stat().st_mtime_ns == other.stat().st_mtime_ns  # not made again: that would give the same content


def test_killed_run_leaves_no_result_and_is_done_again(tmp_path):
    args = (*QUICK, "--max-episode-steps", 5, "--epochs", 60)
    process = start("finetune_bc.py", *args, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/events*")), process)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("results/**/*.json"))
    run("finetune_bc.py", *args, cwd=tmp_path)
    assert result(tmp_path, "random")["args"]["epochs"] == 60


def test_another_run_of_the_same_name_is_kept(tmp_path):
    """Other arguments, with results elsewhere: the first run's logs and policy stay."""
    run("finetune_bc.py", *QUICK, cwd=tmp_path)
    run_dir = tmp_path / "runs" / "finetune_bc__random__pong__0"
    before = (run_dir / "policy.pt").read_bytes()
    args = (*QUICK, "--learning-rate", 0.5, "--results", "elsewhere")
    done = run("finetune_bc.py", *args, cwd=tmp_path, code=1)
    assert "args.json was made with {'learning_rate': 0.001}" in done.stderr
    assert (run_dir / "policy.pt").read_bytes() == before
    run("finetune_bc.py", *args, "--method", "fast", cwd=tmp_path)
    assert (tmp_path / "elsewhere" / "bc" / "fast" / "pong" / "seed0.json").exists()
    assert (run_dir / "policy.pt").read_bytes() == before


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_the_authors_checkpoints(prefix, tmp_path):
    """Their .pth: prefixes of wrappers, the first convolution twice, `shortcut` for `downsample`, no name in it."""
    ours = bc.ResNet(0.125, (1, 2, 1, 1))
    theirs = {"stem.0.weight": ours.conv1.weight.detach()}
    theirs |= {name.replace("downsample", "shortcut"): x for name, x in ours.state_dict().items()}
    content = {"backbone": {prefix + name: x for name, x in theirs.items()}, "neck": {}, "head": {}, "optimizer": {}}
    torch.save(content, tmp_path / "siammae_100.pth")
    loaded = bc.ResNet(0.125, (1, 2, 1, 1))
    assert bc.load_backbone(loaded, tmp_path / "siammae_100.pth") == "siammae_100"
    assert_equal(dict(loaded.state_dict()), dict(ours.state_dict()))


def test_bad_checkpoints(pretrained, tmp_path):
    """Missing, damaged, of another width, of another kind, with code in it: a line that names the file."""
    (tmp_path / "damaged.pt").write_bytes(pretrained.read_bytes()[:5000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save(torch.load(pretrained, weights_only=True) | {"extra": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "empty.pt").touch()
    torch.save({"backbone": {"conv1.weight": 1}}, tmp_path / "number.pt")
    for name in ("missing.pt", "empty.pt", "damaged.pt", "other.pt", "list.pt", "bomb.pt", "number.pt"):
        done = run("finetune_bc.py", *QUICK, "--checkpoint", name, cwd=tmp_path, code=1)
        assert f"{name} cannot be used" in done.stderr
    assert not (tmp_path / "exploded").exists()
    done = run("finetune_bc.py", *QUICK, "--checkpoint", pretrained, "--width-multiplier", 0.25, cwd=tmp_path, code=1)
    assert "--width-multiplier and --blocks" in done.stderr and str(pretrained) in done.stderr
    assert not list(tmp_path.glob("results/**/*.json"))


def test_few_shot_reads_the_same_number_of_rows_of_each_run(cache, tmp_path):
    """The benchmark's layout of 5 runs, checkpoint 50 (of one run 49), 250 rows in all: 50 from each."""
    played = cache / "played_1000" / "Freeway" / "1" / "replay_logs"
    for i in range(1, 6):
        for field in ("observation", "action", "reward", "terminal"):
            name = f"$store$_{field}_ckpt.{49 if i == 3 else 50}.gz"
            target = tmp_path / "data" / "Freeway" / str(i) / "replay_logs" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(played / f"$store$_{field}_ckpt.1.gz", target)
    args = ("--game", "Freeway", *SMALL, *SHORT, "--data-dir", tmp_path / "data", "--num-transitions", 250)
    done = run("finetune_bc.py", *args, cwd=tmp_path)
    assert "on 235 transitions" in done.stdout  # 47 real rows of 50, each a sample: the file begins with an episode
    assert "No --data-dir" not in done.stdout
    shard = next((tmp_path / "cache" / "prepared").glob("freeway_3_50_*.npy"))
    assert len(np.load(shard)) == 50


def test_actions_of_another_game_are_refused(cache, tmp_path):
    """Ms. Pac-Man's replay has actions that Freeway has not."""
    (tmp_path / "data").mkdir()
    shutil.copytree(cache / "played_1000" / "MsPacman", tmp_path / "data" / "Freeway")
    data = ("--data-dir", tmp_path / "data", "--runs", 1, "--checkpoints", 1, "--num-transitions", 200)
    done = run("finetune_bc.py", "--game", "freeway", *SMALL, *SHORT, *data, cwd=tmp_path, code=1)
    assert "freeway only 3 actions" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "--game"),
        (["--game", "chess"], 1, "Unknown game 'chess'"),
        (["--game", "pong", "--epochs", "0"], 1, "--epochs must be at least 1"),
        (["--game", "pong", "--eval-episodes", "0"], 1, "--eval-episodes must be at least 1"),
        (["--game", "pong", "--epsilon", "2"], 1, "--epsilon"),
        (["--game", "pong", "--seed", "-1"], 1, "--seed must be at least 0"),
        (["--game", "pong", "--method", "a/b"], 1, "--method"),
        (["--game", "pong", "--device", "cuda"], 1, "cuda cannot be used"),
        (["--game", "pong", "--runs", "1", "1", "--data-dir", "."], 1, "--runs"),
        (["--game", "pong", "--data-dir", "nowhere"], 1, "nowhere/Pong/1/replay_logs"),
    ],
)
def test_bad_arguments(args, code, message, tmp_path):
    done = run("finetune_bc.py", *args, cwd=tmp_path, code=code)
    assert message in done.stderr + done.stdout
    assert not list(tmp_path.glob("results/**/*.json"))
