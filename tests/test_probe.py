"""eval_probe.py: its measures against hand-made cases, its samples against pre-training's, and as a user runs it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GAMES, SMALL, load, run
from PIL import Image

probe = load("eval_probe.py")
DATA = ("--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 990)


@pytest.fixture
def checkpoint(alone):
    def find(objective: str) -> Path:
        return alone(f"pretrain_{objective}.py")[0] / "runs" / f"pretrain_{objective}__7" / "checkpoint.pt"

    return find


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A --cache-dir of these tests' own: others count the shards in `cache`."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def args(cache, prepared):
    data = dict(data_dir=cache / "played_1000", runs=(1,), checkpoints=(1,), rows_per_checkpoint=990)
    return probe.Args(**data, cache_dir=prepared)


def test_as_a_user_runs_it(cache, prepared, checkpoint, tmp_path):
    """A random backbone, of two methods a checkpoint each, and a file of the authors'; twice the same."""
    weights = torch.load(checkpoint("bc"), weights_only=True)["backbone"]
    torch.save({"backbone": {f"module.{name}": x for name, x in weights.items()}}, tmp_path / "theirs.pth")
    models = ("--models", checkpoint("atc"), checkpoint("mae"), "theirs.pth")
    quick = (*SMALL, "--epochs", 3, "--resamples", 50, "--rank-resamples", 10, "--precision", "fp32")
    data = ("--games", *GAMES, "--data-dir", cache / "played_1000", "--cache-dir", prepared, *DATA)
    done = run("eval_probe.py", *models, *quick, *data, cwd=tmp_path)
    content = json.loads((tmp_path / "reports" / "probe.json").read_text())
    assert list(content["results"]) == ["random", "atc", "mae", "theirs"]
    for name, row in content["results"].items():
        assert list(row) == ["action", "reward", "rank_me", "dormant"]
        for measure, ends in row.items():
            if measure != "reward" or ends["value"] is not None:
                assert ends["low"] <= ends["value"] <= ends["high"], (name, measure)
        assert 1 < row["rank_me"]["value"] < 256 and 0 < row["dormant"]["value"] < 1
    values = [row["rank_me"]["value"] for row in content["results"].values()]
    assert len(set(values)) == 4
    assert "No --data-dir" not in done.stdout and "| random " in done.stdout and "| no features " in done.stdout
    with Image.open(tmp_path / "reports" / "probe.png") as image:
        assert image.size[0] > image.size[1] > 100
    files = {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()}
    assert files.keys() == {"probe.json", "probe.md", "probe.png"}
    run("eval_probe.py", *models, *quick, *data, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()} == files


def test_two_models_of_an_objective_go_by_their_folders(checkpoint, args, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(checkpoint("atc").read_bytes())
    models = ("--models", "first/checkpoint.pt", "second/checkpoint.pt", checkpoint("bc"))
    quick = (*SMALL, "--epochs", 1, "--resamples", 5, "--rank-resamples", 2)
    data = ("--games", *GAMES, "--data-dir", args.data_dir, "--cache-dir", args.cache_dir, *DATA)
    run("eval_probe.py", *models, *quick, *data, cwd=tmp_path)
    content = json.loads((tmp_path / "reports" / "probe.json").read_text())
    assert list(content["results"]) == ["random", "first", "second", "bc"]
    assert content["results"]["first"] == content["results"]["second"]


@pytest.mark.parametrize("features", ["backbone", "neck"])
def test_features_are_those_of_the_checkpoint(features, checkpoint, args):
    """The map's mean, or what the neck makes of it with its game's embedding; of stacks in [0, 1], not augmented."""
    args.features, args.width_multiplier, args.blocks = features, 0.125, (1, 1, 1, 1)
    samples = probe.Samples(args, GAMES)
    network, cpu = probe.Network(args, checkpoint("idm")), torch.device("cpu")
    found = probe.extract(network, samples, cpu, probe.autocast(cpu, "fp32"))
    content = torch.load(checkpoint("idm"), weights_only=True)
    backbone, neck = probe.ResNet(0.125, (1, 1, 1, 1)), probe.Neck(256, 60)
    backbone.load_state_dict(content["backbone"])
    neck.load_state_dict(content["neck"])
    batch = {name: torch.from_numpy(array) for name, array in samples.windows[0].items()}
    with torch.no_grad():
        maps = backbone(probe.stack_frames(batch["frames"], batch["starts"])[:, 0] / 255)
        expected = neck(maps, batch["game_id"]) if features == "neck" else maps.mean((2, 3))
    assert found.shape == (len(samples.game), 512 if features == "neck" else 256)
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    if features == "backbone":  # under bf16, the map's mean is taken in fp32
        found = probe.extract(network, samples, cpu, probe.autocast(cpu, "bf16"))
        assert not torch.equal(found, found.bfloat16().float())
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0.1, atol=0.02)


def test_samples_and_their_split(args, monkeypatch, tmp_path):
    """Each of a shard's held-out windows once; of these the last tenth, in time, to test, and none that shares a row
    with it to train."""
    prepare = probe.prepare

    def prepare_with_more_rewards(*given):
        shards = []
        for game_id, path in prepare(*given):
            shard = np.load(path)
            shard["fields"]["reward"] = np.arange(len(shard)) % 3 - 1
            np.save(tmp_path / f"{game_id}.npy", shard)
            shards.append((game_id, tmp_path / f"{game_id}.npy"))
        return shards

    monkeypatch.setattr(probe, "prepare", prepare_with_more_rewards)
    samples = probe.Samples(args, GAMES)
    data = samples.windows
    assert len(samples.game) == len(samples.test) == len(set(data.order.tolist())) == data.size == 40
    counts = np.diff(data.ends, prepend=0)
    tested = set()
    for shard, count in enumerate(counts):
        assert count == 10  # 1% of 990
        tested.add(int(data.ends[shard]) - 1)  # a tenth of 10 windows is one, the last
    order = data.order[: len(samples.game)]
    assert [int(window) in tested for window in order] == samples.test.tolist()
    trained = {last - before for last in tested for before in range(4, 10)}  # not the 3 windows before the last
    assert [int(window) in trained for window in order] == samples.train.tolist()
    assert samples.test.sum() == 4 and samples.train.sum() == 24
    for i, window in enumerate(order.tolist()):  # what is to be told is of the window's last row
        shard = int(np.searchsorted(data.ends, window, side="right"))
        row = probe.open_shard(data.paths[shard])[window + data.offset[shard] + 3]
        assert samples.action[i] == row["fields"]["action"] and samples.sign[i] == row["fields"]["reward"] + 1
        assert samples.game[i] == sorted(GAMES).index(GAMES[shard])


@pytest.mark.parametrize(("most", "taken"), [(20_000, 200), (150, 150), (128, 128)])
def test_no_sample_is_lost_to_a_short_batch(most, taken, cache, tmp_path):
    """200 held-out windows are a batch of 128 and a short one."""
    found = probe.prepare(probe.Args(cache_dir=cache), GAMES, 0)
    shard = np.concatenate([probe.open_shard(path) for _, path in found] * 5)[:5003]
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "prepare", lambda *_: [(i, tmp_path / f"{i}.npy") for i in range(4)])
        samples = probe.Samples(probe.Args(samples=most), GAMES)
        windows = [samples.windows[i] for i in samples.batches]
    assert len(samples.game) == sum(len(batch["frames"]) for batch in windows) == taken
    assert np.concatenate([batch["action"][:, -1] for batch in windows]).tolist() == samples.action.tolist()


@pytest.mark.parametrize("rows", [100, 399, 400, 401, 499, 800, 9_990])
def test_no_training_sees_a_held_out_row(rows, monkeypatch, tmp_path):
    """Whatever the length of a pre-training's windows, from BC's 4 rows to DT's 11."""
    np.save(tmp_path / "shard.npy", np.zeros(rows, [("frame", "u1", 1), ("fields", probe.FIELDS)]))

    monkeypatch.setattr(probe, "open_shard", np.load)

    def windows(length, part):
        made = probe.Windows([(0, tmp_path / "shard.npy")], length, 1, 0, part)
        return int(made.offset[0]), int(made.offset[0]) + made.size - 1 + length - 1  # first and last row

    first, last = windows(4, "held_out")
    assert last == rows - 1
    for length in range(4, 12):
        assert windows(length, "train")[1] < first


def test_rank_me():
    """k orthonormal rows have rank k, equal rows 1; repeated rows are as if they stood there that often."""
    orthonormal = torch.linalg.qr(torch.randn(20, 20))[0][:7]
    once = torch.ones(1, 7)
    assert probe.rank_me(orthonormal, once).item() == pytest.approx(7, rel=1e-5)
    assert probe.rank_me(orthonormal[:1].expand(7, 20), once).item() == pytest.approx(1, rel=1e-5)
    x, times = torch.randn(9, 5), torch.tensor([[1] * 9, [0, 3, 1, 0, 0, 2, 1, 1, 1]])
    for row, found in zip(times, probe.rank_me(x, times), strict=True):
        sigma = np.linalg.svd(x.repeat_interleave(row, 0).double(), compute_uv=False)
        p = sigma / sigma.sum()
        assert found.item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_dormant_rate():
    """0 where all units are equally active, (d - 1) / d where one alone is; signs do not matter."""
    once = torch.ones(1, 6)
    assert probe.dormant_rate(torch.ones(6, 8) * torch.tensor([-1, 1] * 4), once).item() == pytest.approx(0, abs=1e-6)
    assert probe.dormant_rate(torch.eye(8)[2].expand(6, 8) * 3, once).item() == pytest.approx(7 / 8)
    x = torch.tensor([[1.0, 0, 0], [0, 2, 0], [5, 5, 5]])
    p = np.array([1 / 5, 4 / 5])  # of the first row once and the second twice
    expected = 1 - math.exp(-(p * np.log(p)).sum()) / 3
    assert probe.dormant_rate(x, torch.tensor([[1, 2, 0]])).item() == pytest.approx(expected)


def test_balanced_accuracy():
    """By hand: game 0 has signs 1, 1, 1, 2, game 1 has 0, 1, 2, game 2 is left out with its one sign."""
    game, sign = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([1, 1, 1, 2, 0, 1, 2, 1])
    hits = np.array([True, True, False, True, False, True, False, True])
    once, only = np.ones((1, 8)), np.array([[1, 0, 3, 0, 0, 2, 1, 0]])
    assert probe.balanced_accuracy(hits, game, sign, once)[0] == pytest.approx((np.mean([2 / 3, 1]) + 1 / 3) / 2)
    assert probe.balanced_accuracy(hits, game, sign, only)[0] == pytest.approx((1 / 4 + np.mean([1, 0])) / 2)
    assert probe.balanced_accuracy(sign == 1, game, sign, once)[0] == pytest.approx((1 / 2 + 1 / 3) / 2)  # constant
    absent = np.array([[1, 1, 1, 1, 0, 0, 0, 5]])  # of game 1 there is nothing
    assert probe.balanced_accuracy(hits, game, sign, absent)[0] == pytest.approx(np.mean([2 / 3, 1]))
    assert np.isnan(probe.balanced_accuracy(hits[7:], game[7:], sign[7:], np.ones((2, 1)))).all()


class Told:
    """Samples of two games, whose actions 0 to 5 and signs are drawn; half of them to test."""

    def __init__(self, n=800):
        rng = np.random.default_rng(0)
        self.game, self.action = (torch.from_numpy(rng.integers(0, most, n)) for most in (2, 6))
        self.sign = torch.from_numpy(rng.choice(3, n, p=[0.05, 0.9, 0.05]))
        self.test = torch.arange(n) % 2 == 0
        self.train = ~self.test


def test_probes_tell_what_features_hold_and_nothing_else():
    """Each game by its own layer: in game 1 the features stand for other actions. Signs rare, but told as well."""
    samples, args = Told(), probe.Args(epochs=60, learning_rate=3e-3, batch_size=64, resamples=200)
    args.rank_resamples = 2
    codes = torch.randn(2, 6, 32)[samples.game, samples.action] + 2 * torch.randn(2, 3, 32)[samples.game, samples.sign]
    offset_and_scale = 100 + 1e-3 * torch.cat([codes, torch.zeros(800, 1)], 1)  # with a unit that never changes
    found = probe.measure(offset_and_scale, samples, args)
    assert found["action"]["value"] > 0.9 and found["reward"]["value"] > 0.9
    constant = probe.baselines(samples)
    noise = probe.measure(torch.randn(800, 32), samples, args)
    assert noise["action"]["low"] < constant["action"] + 0.05 < 0.35
    assert noise["reward"]["low"] < constant["reward"] == pytest.approx(1 / 3)


def test_rare_rewards_weigh_as_much_as_none():
    """A feature that tells the sign but roughly: one would guess 0 nearly always if each sample weighed the same."""
    samples, args = Told(4000), probe.Args(epochs=30, learning_rate=1e-2, batch_size=200, resamples=2, rank_resamples=2)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    found = probe.measure(samples.sign[:, None] + noise, samples, args)["reward"]["value"]
    best = (0.69 + 0.38 + 0.69) / 3  # the share of a normal distribution above -1/2 of its deviations, and amid +-1/2
    assert found == pytest.approx(best, abs=0.08)


def test_interval_of_rare_rewards_holds_its_value():
    """50 games with one reward in 40 test samples each, as is usual: a third of the resamples lack it."""
    samples = Told(4000)
    samples.game, samples.sign = torch.arange(4000) // 80, 1 + (torch.arange(4000) % 80 // 2 == 0).long()
    args = probe.Args(epochs=1, rank_resamples=2, resamples=200)
    found = probe.measure(torch.randn(4000, 4), samples, args)["reward"]
    assert found["low"] < found["value"] < found["high"]


def test_baselines_are_of_the_training_samples():
    """The commonest action in training, game by game."""
    samples = Told(8)
    samples.game = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    samples.action = torch.tensor([3, 5, 3, 5, 3, 3, 4, 3])  # at odd places, in training: 5, 5 and 3, 3
    samples.sign = torch.tensor([1, 0, 2, 0, 1, 0, 1, 0])
    assert probe.baselines(samples) == {"action": 0.25, "reward": 0.5}


def test_intervals_of_means():
    """Of a mean of n samples, 1.96 standard errors to either side; narrower with more samples; centred when asked."""
    rng = np.random.default_rng(0)
    for n in (100, 1000):
        x = rng.random(n) < 0.3
        found = probe.estimate(lambda times, x=x: times @ x / len(x), n, 4000, seed=0)
        error = math.sqrt(x.mean() * (1 - x.mean()) / n)
        assert found["value"] == pytest.approx(x.mean())
        assert found["low"] == pytest.approx(x.mean() - 1.96 * error, abs=0.2 * error)
        assert found["high"] == pytest.approx(x.mean() + 1.96 * error, abs=0.2 * error)
    kinds = lambda times: (times > 0).sum(1).astype(float)  # noqa: E731, how many samples there are: a resample has fewer
    found = probe.estimate(kinds, 100, 1000, seed=0)
    assert found["value"] == 100 and found["high"] < 75
    found = probe.estimate(kinds, 100, 1000, seed=0, centre=True)
    assert found["low"] < 100 < found["high"] < 110
    nothing = probe.estimate(lambda times: np.full(len(times), math.nan), 3, 10, seed=0)
    assert nothing == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "missing.pt"], "missing.pt cannot be used"),
        (["--models", "ATC", "ATC"], "two of one name"),
        (["--models", "nan.pth"], "nan has features that are not finite"),
        (["--models", "MAE", "--features", "neck"], "checkpoint.pt has no spatial-MLP neck: --features backbone"),
        (["--models", "ATC", "--width-multiplier", 0.25], "--width-multiplier and --blocks"),
        (["--games", "klax", "pong"], "--games klax: far-OOD games"),
        (["--games", "chess"], "Unknown game 'chess'"),
        (["--data-dir", "nowhere"], "nowhere/Pong"),
        (["--rows-per-checkpoint", 300], "too few to train and test on"),
        (["--samples", 0], "--samples must be at least 1"),
        (["--device", "cuda"], "cuda cannot be used"),
    ],
)
def test_bad_input(flags, message, args, checkpoint, tmp_path):
    flags = [checkpoint(flag.lower()) if flag in ("ATC", "MAE") else flag for flag in flags]
    if "nan.pth" in flags:
        weights = torch.load(checkpoint("atc"), weights_only=True)["backbone"]
        weights["conv1.weight"][0] = math.nan
        torch.save({"backbone": weights}, tmp_path / "nan.pth")
    data = ("--games", "pong", "--data-dir", args.data_dir, "--cache-dir", args.cache_dir, *DATA)
    done = run("eval_probe.py", *SMALL, *data, *flags, cwd=tmp_path, code=1)
    assert message in done.stderr
    assert not (tmp_path / "reports").exists()
