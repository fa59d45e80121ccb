"""eval_probe.py: its measures against hand-made cases, its samples against pre-training's, and as a user runs it."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GAMES, SMALL, load, run, train
from PIL import Image
from torch import nn

probe = load("eval_probe.py")
DATA = ("--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 990)
QUICK = (*SMALL, "--epochs", 3, "--resamples", 20, "--rank-resamples", 3, "--precision", "fp32")


@pytest.fixture(scope="module")
def checkpoint(cache, tmp_path_factory):
    """`checkpoint(objective)` is a small one, after 2 steps; each is made once. Its tables have 4 games."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(objective: str) -> Path:
        path = folder / "runs" / objective / "checkpoint.pt"
        if not path.exists():
            few = ("--games", *GAMES, "--total-steps", 2, "--batch-size", 8, "--run-name", objective)
            train(f"pretrain_{objective}.py", *SMALL, *few, "--cache-dir", cache, cwd=folder)
        return path

    return find


@pytest.fixture
def few_games(monkeypatch):
    """As if the data set had only these, as for the small checkpoints."""
    monkeypatch.setattr(probe, "DQN_REPLAY_GAMES", sorted(GAMES))


@pytest.fixture
def args(replay, tmp_path):
    data = dict(data_dir=replay, runs=(1,), checkpoints=(1,), rows_per_checkpoint=990, cache_dir=tmp_path / "cache")
    return probe.Args(**data, width_multiplier=0.125, blocks=(1, 1, 1, 1), device="cpu")


def test_as_a_user_runs_it(replay, checkpoint, tmp_path):
    """A random backbone, of two methods a checkpoint each, and a file of the authors'."""
    weights = torch.load(checkpoint("bc"), weights_only=True)["backbone"]
    (tmp_path / "theirs").mkdir()
    torch.save({"backbone": {f"module.{name}": x for name, x in weights.items()}}, tmp_path / "theirs" / "latest.pth")
    models = ("--models", checkpoint("atc"), checkpoint("mae"), "theirs/latest.pth")
    data = ("--games", *GAMES, "--data-dir", replay, *DATA)
    done = run("eval_probe.py", *models, *QUICK, *data, cwd=tmp_path)
    assert done.stdout.startswith("Device: cpu, precision: float32\n")
    content = json.loads((tmp_path / "reports" / "probe.json").read_text())
    assert list(content["results"]) == ["random", "atc", "mae", "theirs"]
    for name, row in content["results"].items():
        assert list(row) == ["action", "reward", "rank_me", "dormant"]
        for measure in ("action", "rank_me", "dormant"):
            assert row[measure]["low"] <= row[measure]["value"] <= row[measure]["high"], (name, measure)
        assert 1 < row["rank_me"]["value"] < 256 and 0 < row["dormant"]["value"] < 1
    assert len({row["rank_me"]["value"] for row in content["results"].values()}) == 4
    assert "No --data-dir" not in done.stdout and "| random " in done.stdout and "| no features " in done.stdout
    with Image.open(tmp_path / "reports" / "probe.png") as image:
        assert image.size[0] > image.size[1] > 100
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {"probe.json", "probe.md", "probe.png"}


@pytest.mark.parametrize("features", ["backbone", "neck"])
def test_features_are_those_of_the_checkpoint(features, checkpoint, few_games, args):
    """The map's mean, or what the neck makes of it with its game's embedding; of stacks in [0, 1], not augmented."""
    args.features = features
    samples = probe.Samples(args, GAMES)
    network = probe.Features(args, checkpoint("idm")).eval()
    found = probe.extract(network, samples, torch.autocast("cpu", enabled=False))
    content = torch.load(checkpoint("idm"), weights_only=True)
    backbone, neck = probe.ResNet(0.125, (1, 1, 1, 1)), probe.Neck(256, 4)
    backbone.load_state_dict(content["backbone"])
    neck.load_state_dict(content["neck"])
    assert found.shape == (40, 512 if features == "neck" else 256)
    for game_id, rows, place in samples.shards:
        stacks = np.stack([rows["frame"][i : i + 4] for i in place])
        for i, stack in zip(place, stacks, strict=True):
            for first in np.flatnonzero(rows["is_first"][i + 1 : i + 4]):
                stack[: first + 1] = 0  # frames of an earlier episode
        with torch.no_grad():
            maps = backbone(torch.from_numpy(stacks) / 255)
            expected = neck(maps, torch.full((10,), game_id)) if features == "neck" else maps.mean((2, 3))
        own = found[10 * [shard[0] for shard in samples.shards].index(game_id) :][:10]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    if features == "backbone":  # under bf16, the map's mean is taken in fp32
        low = probe.extract(network, samples, torch.autocast("cpu", torch.bfloat16))
        assert not torch.equal(low, low.bfloat16().float())
        torch.testing.assert_close(low, found, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_the_neck_of_an_original_checkpoint(prefix, few_games, args, tmp_path):
    """It has the spatial-MLP neck under prefixed names, its table as a layer's weight."""
    args.features, ours = "neck", probe.Neck(256, 4)
    neck = {name.replace("spatial_embed", "spatial_embed.weight"): x for name, x in ours.state_dict().items()}
    parts = {"backbone": probe.ResNet(0.125, (1, 1, 1, 1)).state_dict(), "neck": neck}
    path = tmp_path / "epoch100.pth"
    torch.save({part: {prefix + name: x for name, x in state.items()} for part, state in parts.items()}, path)
    loaded = probe.Features(args, path).neck.state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in ours.state_dict().items())


def test_other_necks_and_networks_are_refused(few_games, args, tmp_path):
    args.features, backbone = "neck", probe.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    for neck in ({}, {"cls_token": torch.zeros(512)}, load("pretrain_dt.py").Trajectory(256, 4, 8).state_dict()):
        torch.save({"backbone": backbone, "neck": neck}, tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit, match="has no spatial-MLP neck: use --features backbone"):
            probe.Features(args, tmp_path / "checkpoint.pt")
    torch.save({"backbone": backbone | {"bn1.weight": torch.zeros(8)}}, tmp_path / "batch_norm.pt")
    with pytest.raises(SystemExit, match=r"batch_norm\.pt has batch norms"):
        probe.Features(args, tmp_path / "batch_norm.pt")
    args.width_multiplier = 0.25
    with pytest.raises(SystemExit, match="has another network: set its --width-multiplier and --blocks"):
        probe.Features(args, tmp_path / "checkpoint.pt")


def test_batch_norm_may_take_the_norms_place(few_games, args, monkeypatch, tmp_path):
    """Networks are in evaluation mode: their running statistics stay, and a stack's features do not hang on others."""
    measured = []

    def extract(network, samples, precision):
        assert not any(module.training for module in network.modules())
        stacks, game_id = torch.rand(8, 4, 84, 84), torch.zeros(8, dtype=torch.long)
        with torch.no_grad():
            torch.testing.assert_close(network(stacks, game_id)[:1], network(stacks[:1], game_id[:1]))
        measured.append(network)
        return torch.rand(len(samples.test), 8)

    monkeypatch.setattr(probe, "Norm", nn.BatchNorm2d)
    monkeypatch.setattr(probe, "extract", extract)
    args.games, args.epochs, args.resamples, args.rank_resamples, args.output_dir = GAMES, 1, 2, 2, tmp_path
    probe.main(args)
    assert len(measured) == 1


@pytest.mark.parametrize(("most", "places"), [(20_000, [*range(10)]), (40, [*range(10)]), (16, [0, 3, 6, 9])])
def test_samples_and_their_split(most, places, args, monkeypatch):
    """Each shard's last 1%, or evenly spaced ones of it. The last tenth of these is for the test; samples that share a
    row with it are not trained on."""
    prepare, paths = probe.prepare, {}

    def prepare_with_more_rewards(*given):
        shards, source = prepare(*given)
        for game_id, path in shards:
            rows = np.fromfile(path, probe.ROW)
            rows["reward"] = np.arange(len(rows)) % 3 - 1
            rows.tofile(path)
            paths[game_id] = path
        return shards, source

    monkeypatch.setattr(probe, "prepare", prepare_with_more_rewards)
    args.samples = most
    samples = probe.Samples(args, GAMES)
    n = len(places)
    for i, (game_id, path) in enumerate(paths.items()):
        rows, own = np.fromfile(path, probe.ROW), slice(n * i, n * (i + 1))
        last = len(rows) - 10 + np.array(places)  # rows whose stacks are the samples: 10 are 1% of 987
        assert samples.action[own].tolist() == rows["action"][last].tolist()
        assert samples.kind[own].tolist() == (3 * samples.game[own].numpy() + rows["reward"][last] + 1).tolist()
        assert set(samples.game[own].tolist()) == {sorted(paths).index(game_id)}
        assert samples.test[own].tolist() == [place == 9 for place in places]
        assert samples.train[own].tolist() == [place < 6 for place in places]


def test_more_may_be_held_out(args):
    """A share of each shard, its last 395 of 987 rows; a tenth of them is for the test."""
    args.held_out = 0.4
    samples = probe.Samples(args, GAMES)
    for i, (_, path) in enumerate(probe.prepare(args, GAMES, 990)[0]):
        own = slice(395 * i, 395 * (i + 1))
        assert samples.action[own].tolist() == np.fromfile(path, probe.ROW)["action"][-395:].tolist()
        assert samples.test[own].tolist() == [False] * 356 + [True] * 39
        assert samples.train[own].tolist() == [True] * 353 + [False] * 42


def test_too_few_samples(args):
    args.rows_per_checkpoint = 100
    with pytest.raises(SystemExit, match=r"^4 held-out samples are too few: use more rows"):
        probe.Samples(args, GAMES)


@pytest.mark.parametrize("rows", [150, 399, 400, 401, 499, 800, 9_990])
def test_no_training_sees_a_held_out_row(rows, args, monkeypatch, tmp_path):
    """Whatever the length of a pre-training's windows, from BC's 4 rows to DT's 11."""
    atc, path = load("pretrain_atc.py"), tmp_path / "shard.bin"
    with open(path, "wb") as file:
        file.truncate(rows * probe.ROW.itemsize)
    monkeypatch.setattr(probe, "prepare", lambda *_: ([(0, path)], ""))
    monkeypatch.setattr(probe, "min", lambda *_: 1, raising=False)  # however few samples there are
    [(_, held_out, _)] = probe.Samples(args, ["alien"]).shards
    for length in range(4, 12):
        data = atc.Windows([(0, path)], length, 1, 0, "train")
        last = int(data.offset[0]) + data.size - 1 + length - 1
        assert last < rows - len(held_out)


def test_rank_me():
    """k orthonormal rows have rank k, equal rows 1; any others, that of their singular values."""
    orthonormal = torch.linalg.qr(torch.randn(20, 20))[0][:7].double()
    assert probe.rank_me(orthonormal).item() == pytest.approx(7, rel=1e-4)
    assert probe.rank_me(orthonormal[:1].expand(7, 20)).item() == pytest.approx(1, rel=1e-4)
    x = torch.randn(9, 5).double()
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum()
    assert probe.rank_me(x).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_dormant_rate():
    """0 where all units are equally active, (d - 1) / d where one alone is; signs do not matter."""
    assert probe.dormant_rate(torch.ones(6, 8) * torch.tensor([-1, 1] * 4)).item() == pytest.approx(0, abs=1e-6)
    assert probe.dormant_rate(torch.eye(8)[2].expand(6, 8) * 3).item() == pytest.approx(7 / 8)
    p = np.array([1 / 5, 4 / 5])
    expected = 1 - math.exp(-(p * np.log(p)).sum()) / 3
    assert probe.dormant_rate(torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, -2, 0]])).item() == pytest.approx(expected)


def test_balanced_accuracy():
    """By hand: game 0 has signs 1, 1, 1, 2, game 1 has 0, 1, 2, game 2 is left out with its one sign."""
    game, sign = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([1, 1, 1, 2, 0, 1, 2, 1])
    hits = np.array([True, True, False, True, False, True, False, True])
    kind = 3 * game + sign
    assert probe.balanced_accuracy(hits, kind) == pytest.approx((np.mean([2 / 3, 1]) + 1 / 3) / 2)
    assert probe.balanced_accuracy(hits[:4], kind[:4]) == pytest.approx(np.mean([2 / 3, 1]))
    assert probe.balanced_accuracy(sign == 1, kind) == pytest.approx((1 / 2 + 1 / 3) / 2)  # constant
    assert math.isnan(probe.balanced_accuracy(hits[7:], kind[7:]))


class Told:
    """Samples of two games, whose actions 0 to 5 and signs are drawn; half of them to test."""

    def __init__(self, n=800):
        rng = np.random.default_rng(0)
        self.game, self.action = (torch.from_numpy(rng.integers(0, most, n)) for most in (2, 6))
        self.kind = 3 * self.game + torch.from_numpy(rng.choice(3, n, p=[0.05, 0.9, 0.05]))
        self.test = torch.arange(n) % 2 == 0
        self.train = ~self.test


def test_probes_tell_what_features_hold_and_nothing_else():
    """Each game by its own layer: in game 1 the features stand for other actions. Signs rare, but told as well."""
    samples = Told()
    args = probe.Args(epochs=20, learning_rate=1e-2, batch_size=64, resamples=20, rank_resamples=2)
    sign = samples.kind % 3
    codes = torch.randn(2, 6, 32)[samples.game, samples.action] + 2 * torch.randn(2, 3, 32)[samples.game, sign]
    offset_and_scale = 100 + 1e-3 * torch.cat([codes, torch.zeros(800, 1)], 1)  # with a unit that never changes
    found = probe.measure(offset_and_scale, samples, args)
    assert found["action"]["value"] > 0.9 and found["reward"]["value"] > 0.9
    constant = probe.without_features(samples)
    noise = probe.measure(torch.randn(800, 32), samples, args)
    assert probe.measure(offset_and_scale, samples, args) == found  # the seed decides
    assert noise["action"]["low"] < constant["action"]["value"] + 0.05 < 0.35
    assert noise["reward"]["low"] < constant["reward"]["value"] == pytest.approx(1 / 3)


def test_rare_rewards_weigh_as_much_as_none():
    """A feature that tells the sign but roughly: one would guess 0 nearly always if each sample weighed the same."""
    samples, args = Told(4000), probe.Args(epochs=30, learning_rate=1e-2, batch_size=200)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    _, hits = probe.probe(samples.kind[:, None] % 3 + noise, samples, args)
    found = probe.balanced_accuracy(hits, samples.kind[samples.test].numpy())
    best = (0.69 + 0.38 + 0.69) / 3  # the share of a normal distribution above -1/2 of its deviations, and amid +-1/2
    assert found == pytest.approx(best, abs=0.08)


def test_what_one_gets_without_features():
    """The commonest action in training, game by game; a constant sign."""
    samples = Told(8)
    samples.game = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    samples.action = torch.tensor([3, 5, 3, 5, 3, 3, 4, 3])  # at odd places, in training: 5, 5 and 3, 3
    samples.kind = 3 * samples.game + torch.tensor([1, 0, 2, 0, 1, 0, 1, 0])
    assert probe.without_features(samples) == {"action": {"value": 0.25}, "reward": {"value": 0.5}}
    samples.kind = 3 * samples.game + 1
    assert probe.without_features(samples)["reward"] == {}


def test_intervals():
    """Of a mean, 1.96 standard errors to either side; of what resamples lower, around the value; of NaN, none."""
    x = np.random.default_rng(0).random(400) < 0.3
    found = probe.estimate(np.mean, (x,), 2000, seed=0)
    error = math.sqrt(x.mean() * (1 - x.mean()) / len(x))
    assert found["value"] == pytest.approx(x.mean())
    assert found["low"] == pytest.approx(x.mean() - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(x.mean() + 1.96 * error, abs=0.2 * error)
    found = probe.estimate(lambda column: len(np.unique(column)), (np.arange(100),), 500, seed=0)
    assert found["low"] < found["value"] == 100 < found["high"] < 110
    assert probe.estimate(lambda column: math.nan, (x,), 10, seed=0) == {}


def test_a_table_without_rewards():
    row = {"action": {"value": 0.5, "low": 0.4, "high": 0.6}, "reward": {}, "rank_me": {"value": 2.0}, "dormant": {}}
    lines = probe.as_markdown({"random": row}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["random", "0.500 [0.400, 0.600]", "-", "2.000", "-"]


def test_a_figure_without_rewards():
    """Its panel says why it is empty; with a reward, it is drawn."""
    row = {measure: {"value": 0.5, "low": 0.4, "high": 0.6} for measure in probe.TITLES}
    for rewards in (True, False):
        results = {"random": row if rewards else row | {"reward": {}}}
        panels = probe.draw(results, {"reward": {"value": 0.5}} if rewards else {"reward": {}}).get_axes()
        texts = [[text.get_text() for text in panel.texts] for panel in panels]
        assert texts == [[], [] if rewards else ["no game with\ntwo reward signs"], [], []]
        assert bool(panels[1].patches) == rewards and all(panels[i].patches for i in (0, 2, 3))


def test_places(replay, monkeypatch, tmp_path):
    """~ is the user's folder, in each of --models, too; one that cannot be written is found before the work."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    with contextlib.chdir(tmp_path), pytest.raises(FileExistsError, match=f"{tmp_path}/file"):
        probe.main(probe.tyro.cli(probe.Args, args=[*map(str, SMALL), "--output-dir=~/file"]))
    with pytest.raises(SystemExit, match=r"^~/x/checkpoint\.pt is no checkpoint"):
        probe.main(probe.tyro.cli(probe.Args, args=[*map(str, SMALL), "--models", "~/x/checkpoint.pt"]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--games", "klax"], "^Unknown game 'klax'"),
        (["--samples", 0], "^--samples must be at least 1"),
        (["--models", "missing/checkpoint.pt"], "^missing/checkpoint.pt is no checkpoint"),
        (["--models", "a/checkpoint.pt", "b/a/checkpoint.pt"], "^--models go by the names of their folders"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    with contextlib.chdir(tmp_path), pytest.raises(SystemExit, match=message):
        probe.main(probe.tyro.cli(probe.Args, args=[*map(str, (*SMALL, *args))]))
    assert not [*tmp_path.iterdir()]
