"""Zero-shot play: values of each policy, DT's memory, the authors' files, results, as a user runs it."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GAMES, SMALL, load, run, train, write_replay
from PIL import Image
from torch import nn

zeroshot = load("eval_zeroshot.py")
SHORT = ("--eval-episodes", 2, "--max-episode-steps", 20, "--precision", "fp32")
POLICIES = {"bc": ("bc",), "dt": ("dt",), "cql": ("cql",), "cql_mse": ("cql", "--loss", "mse")}


def play(*args, cwd: Path) -> None:
    """Plays in this process, in that folder, as the script does when it is given these arguments."""
    with contextlib.chdir(cwd):
        zeroshot.evaluate(zeroshot.tyro.cli(zeroshot.Args, args=["--device", "cpu", *map(str, args)]))


def result_path(folder: Path, method: str, game: str, seed: int = 0) -> Path:
    return folder / "results" / "zeroshot" / method / game / f"seed{seed}.json"


def result(*where) -> dict:
    return json.loads(result_path(*where).read_text())


@pytest.fixture
def few_games(monkeypatch):
    """As if the data set had only these, as for the small checkpoints."""
    monkeypatch.setattr(zeroshot, "DQN_REPLAY_GAMES", sorted(GAMES))


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory):
    """`checkpoint(method)` is a small one, after 3 steps on Pong and Freeway; each is made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(method: str) -> Path:
        objective, *flags = POLICIES.get(method, (method,))
        path = folder / "runs" / method / "checkpoint.pt"
        if not path.exists():
            few = ("--games", "pong", "freeway", "--total-steps", 3, "--batch-size", 8, "--run-name", method)
            train(f"pretrain_{objective}.py", *SMALL, *few, *flags, "--cache-dir", cache, cwd=folder)
        return path

    return find


def make_policy(path: Path, game: str = "pong", precision: str = "fp32") -> "zeroshot.Policy":
    precision = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    policy = zeroshot.Policy(zeroshot.load_checkpoint(path), precision).eval().requires_grad_(False)
    policy.game_id, policy.history = zeroshot.DQN_REPLAY_GAMES.index(game), []
    return policy


def test_as_a_user_runs_it(alone, tmp_path):
    """All games of the pre-training; what the results say of it; films beside the results."""
    path = alone("pretrain_bc.py")[0] / "runs" / "pretrain_bc__7" / "checkpoint.pt"
    done = run("eval_zeroshot.py", "--checkpoint", path, *SHORT, "--video", cwd=tmp_path)
    assert done.stdout.startswith("Device: cpu, precision: float32\n")
    assert done.stdout.count(" points\n") == 2
    for game, split in (("pong", "near_ood"), ("freeway", "id")):
        found = result(tmp_path, "bc", game)
        identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "checkpoint")}
        expected = {"suite": "zeroshot", "method": "bc", "game": game, "split": split, "seed": 0}
        assert identity == expected | {"checkpoint": str(path)}
        assert found["score"] == np.mean(found["episode_scores"]) and len(found["episode_scores"]) == 2
        expected = {"step": 3, "total_steps": 3, "data": "random_play", "games": ["pong", "freeway"]}
        assert {name: found["pretraining"][name] for name in expected} == expected
        assert found["data"] is None and found["smoke_test"] is True and len(found["backbone"]) == 8
        with Image.open(result_path(tmp_path, "bc", game).with_suffix(".gif")) as video:
            assert video.n_frames > 1


def test_what_is_done_is_skipped(checkpoint, few_games, monkeypatch, capsys, tmp_path):
    """A sweep that was cut off goes on with the games that have no result; the same in other words; other values."""
    monkeypatch.setattr(zeroshot, "play_episodes", lambda *_: (np.zeros(2), []))
    path = tmp_path / "checkpoint.pt"
    shutil.copy(checkpoint("bc"), path)
    play(*SHORT, "--checkpoint", path, "--games", "Pong", cwd=tmp_path)
    pong = result_path(tmp_path, "bc", "pong")
    before = pong.read_text()
    capsys.readouterr()
    play(*SHORT, "--checkpoint", "checkpoint.pt", "--method", "bc", cwd=tmp_path)
    out = capsys.readouterr().out
    assert "pong/seed0.json is there already" in out and "freeway/seed0.json: " in out
    with pytest.raises(SystemExit, match=r"was made with \{'epsilon': 0\.001\}"):
        play(*SHORT, "--checkpoint", path, "--epsilon", 0.5, cwd=tmp_path)
    shutil.copy(checkpoint("dt"), path)
    with pytest.raises(SystemExit, match=r"was made with \{'backbone': "):
        play(*SHORT, "--checkpoint", path, "--method", "bc", cwd=tmp_path)
    assert pong.read_text() == before
    play(*SHORT, "--checkpoint", path, "--method", "bc", "--games", "pong", "--overwrite", cwd=tmp_path)
    play(*SHORT, "--checkpoint", path, "--method", "mine", "--games", "pong", "--seed", 3, cwd=tmp_path)
    assert result(tmp_path, "mine", "pong", 3)["backbone"] == result(tmp_path, "bc", "pong")["backbone"]
    assert json.loads(before)["backbone"] != result(tmp_path, "bc", "pong")["backbone"]


@pytest.mark.parametrize(("part", "name"), [("backbone", "conv1.weight"), ("neck", "norm.bias"), ("head", "bias")])
def test_other_weights_are_noticed(part, name, checkpoint, few_games, monkeypatch, tmp_path):
    """Of each part that plays; another head on the same backbone is another policy."""
    monkeypatch.setattr(zeroshot, "play_episodes", lambda *_: (np.zeros(2), []))
    play(*SHORT, "--checkpoint", checkpoint("bc"), "--games", "pong", "pong", cwd=tmp_path)
    content = torch.load(checkpoint("bc"), weights_only=True)
    content[part][name] += 1
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"was made with \{'backbone': "):
        play(*SHORT, "--checkpoint", "checkpoint.pt", cwd=tmp_path)


def test_a_result_does_not_count_once_it_is_made_again(checkpoint, few_games, monkeypatch, tmp_path):
    """--overwrite makes each game once; cut off, it leaves no result of the game that it was at."""
    played = []

    def play_episodes(game, *_):
        if played == ["pong", "freeway", "pong"]:
            raise KeyboardInterrupt
        played.append(game)
        return np.zeros(2), []

    monkeypatch.setattr(zeroshot, "play_episodes", play_episodes)
    play(*SHORT, "--checkpoint", checkpoint("bc"), "--games", "pong", "Freeway", "Pong", "--overwrite", cwd=tmp_path)
    assert played == ["pong", "freeway"]
    with pytest.raises(KeyboardInterrupt):
        play(*SHORT, "--checkpoint", checkpoint("bc"), "--overwrite", cwd=tmp_path)
    assert result_path(tmp_path, "bc", "pong").exists() and not result_path(tmp_path, "bc", "freeway").exists()


def test_places(checkpoint, few_games, monkeypatch, tmp_path):
    """~ is the user's folder; one that cannot be written is found before the play."""
    monkeypatch.setattr(zeroshot, "play_episodes", lambda *_: (np.zeros(2), []))
    monkeypatch.setenv("HOME", str(tmp_path))
    play(*SHORT, "--checkpoint", checkpoint("bc"), "--results=~/results", cwd=tmp_path)
    assert result_path(tmp_path, "bc", "pong").exists() and not (tmp_path / "~").exists()
    monkeypatch.setattr(zeroshot, "play_episodes", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/zeroshot/bc/pong"):
        play(*SHORT, "--checkpoint", checkpoint("bc"), "--results", "file", cwd=tmp_path)


@pytest.mark.parametrize(("method", "smoke_test"), [("real", False), ("played", True)])
def test_smoke_tests_are_marked(method, smoke_test, checkpoint, few_games, monkeypatch, tmp_path):
    monkeypatch.setattr(zeroshot, "play_episodes", lambda *_: (np.zeros(100), []))
    content = torch.load(checkpoint("bc"), weights_only=True)
    content["args"]["data"] = "random_play" if smoke_test else "dqn_replay"
    torch.save(content, tmp_path / "checkpoint.pt")
    play("--checkpoint", "checkpoint.pt", "--method", method, cwd=tmp_path)
    assert result(tmp_path, method, "pong")["smoke_test"] is smoke_test


def record_going_up(folder: Path, rows: int) -> None:
    """A replay of Freeway by one who always goes up, of one episode that does not end."""
    env = zeroshot.AtariVectorEnv("freeway", 1, noop_max=0, use_fire_reset=False, reward_clipping=False)
    stack, _ = env.reset(seed=0)
    frames, rewards = [np.zeros((84, 84), np.uint8)] * 3, [0.0] * 3
    for _ in range(rows):
        frames.append(stack[0, -1].copy())
        stack, reward, *_ = env.step(np.array([1]))
        rewards.append(float(reward[0]))
    columns = {"observation": frames, "action": [0] * 3 + [1] * rows, "reward": rewards, "terminal": [0] * (rows + 3)}
    write_replay(folder, "freeway", columns)


@pytest.mark.slow
@pytest.mark.parametrize("method", POLICIES)
def test_a_learned_policy_plays_as_its_teacher(method, few_games, tmp_path):
    """Pre-trained on one who always goes up, each crosses the road exactly as he does; random play never does."""
    record_going_up(tmp_path, 500)
    objective, *flags = POLICIES[method]
    data = ("--data-dir", tmp_path, "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 500)
    few = ("--games", "freeway", "--total-steps", 60, "--batch-size", 8, "--learning-rate", 3e-3, "--run-name", "up")
    train(f"pretrain_{objective}.py", *SMALL, *data, *few, *flags, "--precision", "fp32", cwd=tmp_path)
    protocol = ("--epsilon", 0, "--eval-episodes", 2, "--max-episode-steps", 300, "--precision", "fp32")
    play("--checkpoint", "runs/up/checkpoint.pt", *protocol, cwd=tmp_path)
    args = zeroshot.Args(tmp_path, epsilon=0, eval_episodes=2, max_episode_steps=300)
    up, _ = zeroshot.play_episodes("freeway", lambda stacks, *_: np.eye(18)[np.ones(len(stacks), int)], args)
    assert up.min() >= 2
    assert result(tmp_path, method, "freeway")["episode_scores"] == up.tolist()


def test_dt_plays_from_its_last_8_steps(checkpoint, few_games):
    """Against windows put together here: stacks, actions taken, and the return that is left, of episodes that end."""
    policy = make_policy(checkpoint("dt"), "freeway")
    policy.neck.largest_return[:], policy.args["return_scale"] = 5.0, 2.0  # larger than usual, so that it tells
    rng, ends = np.random.default_rng(0), (12, 5, 10)  # steps of the three episodes
    stacks = rng.integers(0, 256, (12, 3, 4, 84, 84), dtype=np.uint8)
    taken, rewards = rng.integers(0, 3, (12, 3)), rng.choice([-300.0, -1, 0, 1, 2], (12, 3))
    for step in range(12):
        which = np.array([i for i in range(3) if step < ends[i]])
        last = (taken[step - 1][which], rewards[step - 1][which]) if step else (0 * which, 0.0 * which)
        found = policy(stacks[step][which], which, *last)
        for i, values in zip(which, found, strict=True):
            steps = range(max(0, step - 7), step + 1)
            game_id = torch.full((len(steps),), policy.game_id)
            returns = [5 - sum(np.sign(rewards[:j, i])) for j in steps]
            maps = policy.backbone(torch.from_numpy(stacks[steps, i]) / 255)
            actions = torch.from_numpy(np.append(taken[steps[:-1], i], 1))  # the last one is not known, nor looked at
            features = policy.neck.features(maps, game_id)
            x = policy.neck(features[None], actions[None], 2 * torch.tensor(returns)[None].float())[0, -1:]
            expected = policy.head(x, game_id[:1])[0]
            np.testing.assert_allclose(values, expected.numpy(), rtol=1e-3, atol=1e-3)
    assert policy.neck.position.shape[0] == 3 * 8


def test_each_game_begins_with_its_own_largest_return(checkpoint, few_games, monkeypatch, tmp_path):
    content = torch.load(checkpoint("dt"), weights_only=True)
    content["neck"]["largest_return"][:] = torch.arange(4) * 10.0
    torch.save(content, tmp_path / "checkpoint.pt")
    seen = {}

    def play_episodes(game, policy, args):
        for _ in range(2):
            policy(np.zeros((2, 4, 84, 84), np.uint8), np.arange(2), np.zeros(2, int), np.zeros(2))
        seen[game] = [returns.tolist() for _, _, returns in policy.history]
        return np.zeros(2), []

    monkeypatch.setattr(zeroshot, "play_episodes", play_episodes)
    play(*SHORT, "--checkpoint", "checkpoint.pt", cwd=tmp_path)
    games = zeroshot.DQN_REPLAY_GAMES
    assert seen == {game: 2 * [2 * [10.0 * games.index(game)]] for game in ("pong", "freeway")}


@pytest.mark.parametrize("method", ["bc", "cql", "cql_mse"])
def test_values_are_logits_or_expected_returns(method, checkpoint, few_games):
    """Of the game's own row; for C51, not the likeliest atom's."""
    content, policy = torch.load(checkpoint(method), weights_only=True), make_policy(checkpoint(method))
    stacks, which = np.random.default_rng(1).integers(0, 256, (5, 4, 84, 84), dtype=np.uint8), np.arange(5)
    row = zeroshot.DQN_REPLAY_GAMES.index("pong")
    features = policy.neck(policy.backbone(torch.from_numpy(stacks) / 255), torch.full((5,), row))
    expected = (features @ content["head"]["weight"][row] + content["head"]["bias"][row]).numpy()
    if method == "cql":
        p = torch.from_numpy(expected).view(5, 18, 51).softmax(2).numpy()
        expected = (p * np.linspace(-10, 10, 51)).sum(2)
    np.testing.assert_allclose(policy(stacks, which, 0 * which, 0.0 * which), expected, rtol=1e-3, atol=1e-3)


def test_values_are_computed_in_float32(checkpoint, few_games):
    """Of a bfloat16 backbone's maps, as in pre-training: actions often differ by less than bfloat16 resolves."""
    policy = make_policy(checkpoint("cql"), precision="bf16")
    stacks, which = np.random.default_rng(1).integers(0, 256, (5, 4, 84, 84), dtype=np.uint8), np.arange(5)
    found = policy(stacks, which, 0 * which, 0.0 * which)
    with policy.precision:
        maps = policy.backbone(torch.from_numpy(stacks) / 255)
    assert maps.dtype == torch.bfloat16
    game_id = torch.full((5,), policy.game_id)
    p = policy.head(policy.neck(maps.float(), game_id), game_id).view(5, 18, 51).softmax(2)
    np.testing.assert_allclose(found, (p * torch.linspace(-10, 10, 51)).sum(2), rtol=1e-4, atol=1e-4)


def test_batch_norm_may_take_the_norms_place(checkpoint, few_games, monkeypatch, tmp_path):
    """In evaluation mode a stack has the same values alone and among 8."""
    monkeypatch.setattr(zeroshot, "Norm", nn.BatchNorm2d)
    content = torch.load(checkpoint("bc"), weights_only=True)
    content["backbone"] = zeroshot.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    torch.save(content, tmp_path / "checkpoint.pt")

    def play_episodes(game, policy, args):
        stacks = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)
        among, alone = (policy(x, np.arange(len(x)), *np.zeros((2, len(x)))) for x in (stacks, stacks[:1]))
        np.testing.assert_allclose(among[:1], alone, rtol=1e-3, atol=1e-3)
        return np.zeros(2), []

    monkeypatch.setattr(zeroshot, "play_episodes", play_episodes)
    play(*SHORT, "--checkpoint", "checkpoint.pt", cwd=tmp_path)


BLOCK = {"attn_norm": "0.norm", "attn_qkv": "0.fn.to_qkv", "attn_out": "0.fn.to_out.0"}
BLOCK |= {"mlp_norm": "1.norm", "mlp_in": "1.fn.net.0", "mlp_out": "1.fn.net.3"}


def authors_name(name: str) -> str:
    """Of a parameter of a neck or head in the authors' files."""
    if name in ("spatial_embed", "weight", "bias", "action_embed"):
        return {"weight": "weights", "bias": "biases", "action_embed": "act_embedder"}.get(name, name) + ".weight"
    if name.startswith("blocks."):
        _, i, layer, kind = name.split(".")
        return f"transformer_encoder.layers.{i}.{BLOCK[layer]}.{kind}"
    return name.replace("rtg_embed.", "rtg_embedder.")


@pytest.mark.parametrize(("method", "prefix"), [("bc", ""), ("cql", "_orig_mod."), ("dt", "_orig_mod.module.")])
def test_the_authors_policies(method, prefix, monkeypatch, tmp_path):
    """Parameters by other names, flat tables, a fixed code, and DT's largest returns as NumPy scalars."""
    module = load(f"pretrain_{POLICIES[method][0]}.py")
    parts = dict(module.Objective(module.Args(blocks=(1, 1, 1, 1))).named_children())
    monkeypatch.setattr(zeroshot, "ResNet", lambda *_: parts["backbone"])  # theirs are full ones, which are slow
    content = {"backbone": {prefix + name: x for name, x in parts["backbone"].state_dict().items()}}
    for part in ("neck", "head"):
        state = {prefix + authors_name(name): x for name, x in parts[part].named_parameters()}
        content[part] = {name: x.detach().flatten(1) if x.dim() == 3 else x.detach() for name, x in state.items()}
    if method == "dt":
        content["neck"][prefix + "pos_embed"] = torch.zeros(24, 512)
        content["max_rtg"] = {np.int64(module.DQN_REPLAY_GAMES.index("freeway")): np.float32(21.0)}
    path = tmp_path / f"their_{method}" / "latest.pth"
    path.parent.mkdir()
    torch.save(content, path)

    def play_episodes(game, policy, args):
        for part in ("backbone", "neck", "head"):
            for name, x in parts[part].named_parameters():
                assert torch.equal(x, dict(getattr(policy, part).named_parameters())[name]), name
        step = np.zeros((2, 4, 84, 84), np.uint8), np.arange(2), np.zeros(2, int), np.zeros(2)
        assert policy(*step).shape == (2, 18)
        if method == "dt":
            assert policy.return_to_go.tolist() == [21, 21]
        return np.zeros(2), []

    monkeypatch.setattr(zeroshot, "play_episodes", play_episodes)
    play(*SHORT, "--checkpoint", path, "--games", "freeway", cwd=tmp_path)
    found = result(tmp_path, f"their_{method}", "freeway")
    assert found["data"] is None and found["pretraining"] is None
    if method == "dt":
        with pytest.raises(SystemExit, match="has seen nothing of boxing"):
            play(*SHORT, "--checkpoint", path, "--games", "boxing", cwd=tmp_path)


@pytest.mark.parametrize("objective", ["atc", "mae", "spr", "idm"])
def test_what_has_learned_no_policy(objective, checkpoint, few_games, tmp_path):
    with pytest.raises(SystemExit, match=r"checkpoint\.pt holds no policy\. BC, DT and CQL learn one\.$"):
        play(*SHORT, "--checkpoint", checkpoint(objective), cwd=tmp_path)


def test_bad_input(checkpoint, few_games, tmp_path):
    content = torch.load(checkpoint("dt"), weights_only=True)
    content["neck"]["largest_return"].fill_(-math.inf)
    torch.save(content, tmp_path / "unseen.pt")
    torch.save({"backbone": content["backbone"]}, tmp_path / "backbone.pt")
    torch.save(content | {"backbone": {"bn1.weight": torch.zeros(8)}}, tmp_path / "batch_norm.pt")
    bc = ("--checkpoint", checkpoint("bc"))
    for args, message in [
        (["--checkpoint", "missing.pt"], "^missing.pt is no checkpoint"),
        (["--checkpoint", "backbone.pt"], "^backbone.pt holds no policy"),
        (["--checkpoint", "unseen.pt"], "^unseen.pt has seen nothing of pong"),
        (["--checkpoint", "batch_norm.pt"], "^batch_norm.pt has batch norms"),
        ([*bc, "--method", "a/b"], "^--method a/b is no name for a folder"),
        ([*bc, "--games", "pong", "alien"], r"^Unknown game 'alien'\. Choose from: pong freeway"),
        ([*bc, "--eval-episodes", 0], "^--eval-episodes and --max-episode-steps must be at least 1"),
    ]:
        with pytest.raises(SystemExit, match=message):
            play(*SHORT, *args, cwd=tmp_path)
    assert not (tmp_path / "results").exists()
