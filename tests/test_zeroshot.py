"""Zero-shot play: pre-trained policies at their own games, as a user runs it, and what DT remembers of an episode."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, load, run
from PIL import Image
from test_learning import record

zeroshot = load("eval_zeroshot.py")
SHORT = ("--eval-episodes", 2, "--max-episode-steps", 20)


@pytest.fixture
def checkpoint(alone):
    def find(objective: str) -> Path:
        return alone(f"pretrain_{objective}.py")[0] / "runs" / f"pretrain_{objective}__7" / "checkpoint.pt"

    return find


def result(folder: Path, method: str, game: str, seed: int = 0) -> dict:
    return json.loads((folder / "results" / "zeroshot" / method / game / f"seed{seed}.json").read_text())


@pytest.mark.parametrize("objective", ["bc", "dt", "cql"])
def test_plays_all_the_games_of_its_pre_training(objective, checkpoint, tmp_path):
    path = checkpoint(objective)
    done = run("eval_zeroshot.py", "--checkpoint", path, *SHORT, "--video", cwd=tmp_path)
    assert done.stdout.count("points, normalised") == 2
    for game, split in (("pong", "near_ood"), ("freeway", "id")):
        found = result(tmp_path, objective, game)
        identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "checkpoint")}
        expected = {"suite": "zeroshot", "method": objective, "game": game, "split": split, "seed": 0}
        assert identity == expected | {"checkpoint": str(path)}
        assert found["score"] == np.mean(found["episode_scores"]) and len(found["episode_scores"]) == 2
        with Image.open(tmp_path / "runs" / f"eval_zeroshot__{objective}__{game}__0" / "episode.gif") as video:
            assert video.n_frames > 1


def test_what_is_done_is_skipped(checkpoint, tmp_path):
    """A sweep that was cut off goes on with the games that have no result yet; other arguments are refused."""
    args = ("--checkpoint", checkpoint("bc"), *SHORT)
    run("eval_zeroshot.py", *args, "--games", "Pong", cwd=tmp_path)
    path = tmp_path / "results" / "zeroshot" / "bc" / "pong" / "seed0.json"
    before = path.stat().st_mtime_ns
    done = run("eval_zeroshot.py", *args, cwd=tmp_path)
    assert "pong/seed0.json is there already" in done.stdout and "freeway/seed0.json: " in done.stdout
    assert path.stat().st_mtime_ns == before
    done = run("eval_zeroshot.py", *args, "--epsilon", 0.5, cwd=tmp_path, code=1)
    assert "was made with {'epsilon': 0.001}" in done.stderr and path.stat().st_mtime_ns == before
    run("eval_zeroshot.py", *args, "--games", "pong", "--overwrite", "--epsilon", 0.5, cwd=tmp_path)
    assert path.stat().st_mtime_ns > before
    run("eval_zeroshot.py", *args, "--games", "pong", "--method", "mine", "--seed", 3, cwd=tmp_path)
    assert result(tmp_path, "mine", "pong", 3)["seed"] == 3


@pytest.fixture(scope="module")
def always_up(tmp_path_factory) -> Path:
    """A --data-dir of Freeway, by one who always goes up."""
    folder = tmp_path_factory.mktemp("up")
    record(folder, "freeway", lambda frame: 1, 500)
    return folder


@pytest.mark.parametrize(
    ("objective", "method", "flags"),
    [("bc", "bc", ()), ("dt", "dt", ()), ("cql", "cql", ()), ("cql", "cql_mse", ("--loss", "mse"))],
)
def test_a_learned_policy_plays_as_its_teacher(objective, method, flags, always_up, tmp_path):
    """Pre-trained on one who always goes up, each crosses the road exactly as he does; random play never does."""
    data = ("--data-dir", always_up, "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 500)
    train = ("--games", "freeway", "--total-steps", 60, "--batch-size", 8, "--learning-rate", 3e-3, "--run-name", "up")
    run(f"pretrain_{objective}.py", *SMALL, *data, *train, *flags, "--precision", "fp32", cwd=tmp_path)
    play = ("--epsilon", 0, "--eval-episodes", 2, "--max-episode-steps", 300, "--precision", "fp32")
    run("eval_zeroshot.py", "--checkpoint", "runs/up/checkpoint.pt", *play, cwd=tmp_path)
    up, _ = zeroshot.play_episodes("freeway", lambda stacks, *_: np.ones(len(stacks), int), 2, 300, 0, 0)
    assert up.min() >= 2
    assert result(tmp_path, method, "freeway")["episode_scores"] == up.tolist()


def make_policy(path: Path) -> "zeroshot.Policy":
    cpu = torch.device("cpu")
    return zeroshot.Policy(path, cpu, zeroshot.autocast(cpu, "fp32"))


def test_dt_plays_from_its_last_8_steps(checkpoint):
    """Against windows put together here: stacks, actions taken, and the return that is left, of episodes that end."""
    policy = make_policy(checkpoint("dt"))
    assert policy.steps == 8
    policy.neck.largest_return[:], policy.return_scale = 5.0, 2.0  # larger than usual, so that it tells
    policy.start("freeway", 3)
    rng, ends = np.random.default_rng(0), (12, 5, 10)  # steps of the three episodes
    stacks = rng.integers(0, 256, (12, 3, 4, 84, 84), dtype=np.uint8)
    taken, rewards = rng.integers(0, 3, (12, 3)), rng.choice([-300.0, -1, 0, 1, 2], (12, 3))
    head, given, asked = policy.head, [], 0
    head.bias.data[:, 3:] += 1000  # actions that Freeway does not have
    policy.head = lambda x, game_id: given.append(x) or head(x, game_id)
    for step in range(12):
        which = np.array([i for i in range(3) if step < ends[i]])
        last = (taken[step - 1][which], rewards[step - 1][which]) if step else (0 * which, 0.0 * which)
        found = policy.act(stacks[step][which], which, *last)
        for i, action, x_found in zip(which, found, given[-1], strict=True):
            steps = range(max(0, step - 7), step + 1)
            game_id = torch.full((len(steps),), policy.row)
            returns = [5 - sum(np.sign(rewards[:j, i])) for j in steps]
            with torch.no_grad():
                maps = policy.backbone(torch.from_numpy(stacks[steps, i]) / 255)
                actions = torch.from_numpy(np.append(taken[steps[:-1], i], 0))  # the last is not known
                features = policy.neck.features(maps, game_id)
                x = policy.neck(features[None], actions[None], 2 * torch.tensor(returns)[None].float())[0, -1:]
                logits = head(x, game_id[:1])[0, :3]
            torch.testing.assert_close(x_found[None], x, rtol=1e-3, atol=1e-3)
            assert action == logits.argmax()
            asked += 1
    assert asked == sum(ends)


def test_cql_plays_the_action_of_the_largest_expected_return(checkpoint):
    """Not of the likeliest atom, nor of actions that the game does not have."""
    policy = make_policy(checkpoint("cql"))
    policy.start("pong", 1)
    stacks, which = np.random.default_rng(1).integers(0, 256, (5, 4, 84, 84), dtype=np.uint8), np.arange(5)
    with torch.no_grad():
        game_id = torch.full((5,), policy.row)
        features = policy.neck(policy.backbone(torch.from_numpy(stacks) / 255), game_id)
        p = policy.head(features, game_id).view(5, 18, 51).softmax(2).numpy()
    q = (p * np.linspace(-10, 10, 51)).sum(2)
    assert policy.act(stacks, which, 0 * which, 0.0 * which).tolist() == q[:, :6].argmax(1).tolist()


def test_bad_input(checkpoint, tmp_path):
    dt = torch.load(checkpoint("dt"), weights_only=True)
    dt["neck"]["largest_return"].fill_(-math.inf)
    torch.save(dt, tmp_path / "unseen.pt")
    nan = torch.load(checkpoint("bc"), weights_only=True)
    nan["backbone"]["conv1.weight"][0] = math.nan
    torch.save(nan, tmp_path / "nan.pt")
    (tmp_path / "damaged.pt").write_bytes(checkpoint("bc").read_bytes()[:5000])
    bc = ("--checkpoint", checkpoint("bc"))
    for args, code, message in [
        ([], 2, "--checkpoint"),
        (["--checkpoint", "missing.pt"], 1, "missing.pt cannot be used"),
        (["--checkpoint", "damaged.pt"], 1, "damaged.pt cannot be used"),
        (["--checkpoint", checkpoint("atc")], 1, "atc learns no policy"),
        (["--checkpoint", "unseen.pt"], 1, "unseen.pt has seen nothing of pong"),
        (["--checkpoint", "nan.pt", "--max-episode-steps", 5], 1, "nan.pt predicts what is not finite"),
        ([*bc, "--games", "pong", "alien"], 1, "was pre-trained on pong, freeway, not alien"),
        ([*bc, "--games", "chess"], 1, "Unknown game 'chess'"),
        ([*bc, "--epsilon", 1.5], 1, "--epsilon must be at most 1"),
        ([*bc, "--eval-episodes", 0], 1, "--eval-episodes must be at least 1"),
        ([*bc, "--device", "cuda"], 1, "cuda cannot be used"),
    ]:
        done = run("eval_zeroshot.py", *args, cwd=tmp_path, code=code)
        assert message in done.stderr + done.stdout
    assert not (tmp_path / "results").exists()
