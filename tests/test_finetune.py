"""Fine-tuning by behaviour cloning: its data, what a result holds, what is skipped and what is refused."""

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRETRAINING, SMALL, Bomb, load, run, train, write_replay
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

bc = load("finetune_bc.py")
SHORT = ("--epochs", 1, "--batch-size", 64, "--eval-episodes", 2, "--max-episode-steps", 20)
QUICK = (*SMALL, *SHORT, "--precision", "fp32")
FEW = ("--runs", 1, "--checkpoints", 1, "--num-transitions", 100)


def finetune(*args, cwd: Path) -> None:
    """Fine-tunes in this process, in that folder, as the script does when it is given these arguments."""
    with contextlib.chdir(cwd):
        bc.finetune(bc.tyro.cli(bc.Args, args=["--device", "cpu", "--no-compile", *map(str, args)]))


def result_path(folder: Path, method: str, game: str = "pong", seed: int = 0) -> Path:
    return folder / "results" / "bc" / method / game / f"seed{seed}.json"


def result(*where) -> dict:
    return json.loads(result_path(*where).read_text())


@pytest.fixture(scope="module")
def pretrained(cache, tmp_path_factory):
    """`pretrained(script, seed)` is a small checkpoint after two steps on played data; each is made once."""
    folder = tmp_path_factory.mktemp("pretrained")

    def find(script: str = "pretrain_bc.py", seed: int = 0) -> Path:
        path = folder / "runs" / f"{script.removesuffix('.py')}__{seed}" / "checkpoint.pt"
        if not path.exists():
            few = ("--total-steps", 2, "--batch-size", 8, "--games", "pong", "--seed", seed, "--cache-dir", cache)
            train(script, *SMALL, *few, cwd=folder)
        return path

    return find


@pytest.fixture
def no_play(monkeypatch):
    """Evaluations of no time: all episodes score 3."""
    monkeypatch.setattr(bc, "play_episodes", lambda game, policy, args: (np.full(args.eval_episodes, 3.0), []))


@pytest.fixture
def on_replay(replay):
    return (*QUICK, *FEW, "--game", "pong", "--data-dir", replay)


def test_as_a_user_runs_it(pretrained, replay, tmp_path):
    args = (*QUICK, *FEW, "--game", "pong", "--data-dir", replay, "--checkpoint", pretrained(), "--video")
    done = run("finetune_bc.py", *args, cwd=tmp_path)
    assert done.stdout.startswith("Device: cpu, precision: float32\n")
    found = result(tmp_path, "bc")
    identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "checkpoint")}
    expected = {"suite": "bc", "method": "bc", "game": "pong", "split": "near_ood", "seed": 0}
    assert identity == expected | {"checkpoint": str(pretrained())}
    assert len(found["episode_scores"]) == 2 and found["score"] == np.mean(found["episode_scores"])
    assert found["args"]["eval_episodes"] == 2 and found["versions"]["torch"] == torch.__version__

    run_dir = tmp_path / "runs" / "finetune_bc__bc__pong__0"
    logged = EventAccumulator(str(run_dir)).Reload().Tags()["scalars"]
    assert {"losses/loss", "losses/accuracy", "charts/learning_rate", "charts/SPS", "eval/score"} <= set(logged)
    saved = torch.load(run_dir / "policy.pt", weights_only=True)
    assert saved.keys() == {"neck", "head"} and saved["head"]["weight"].shape == (1, 512, 18)
    with Image.open(run_dir / "episode.gif") as video:
        assert 1 < video.n_frames <= 20  # equal frames are stored once and shown longer


@pytest.mark.parametrize("script", PRETRAINING)
def test_from_every_objective(script, pretrained, on_replay, no_play, tmp_path):
    finetune(*on_replay, "--checkpoint", pretrained(script), cwd=tmp_path)
    found = result(tmp_path, script.removeprefix("pretrain_").removesuffix(".py"))
    assert found["checkpoint"] == str(pretrained(script))


def test_baselines_and_names(pretrained, on_replay, no_play, tmp_path):
    """random and e2e without a checkpoint; one that is unfrozen or has a name is not taken for the method itself."""
    finetune(*on_replay, cwd=tmp_path)
    finetune(*on_replay, "--no-freeze-backbone", cwd=tmp_path)
    finetune(*on_replay, "--no-freeze-backbone", "--checkpoint", pretrained(), cwd=tmp_path)
    finetune(*on_replay, "--method", "mine", "--checkpoint", pretrained(), "--seed", 3, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "results" / "bc").iterdir()) == ["bc_e2e", "e2e", "mine", "random"]
    assert result(tmp_path, "mine", "pong", 3)["seed"] == 3
    random = result(tmp_path, "random")
    assert random["checkpoint"] is random["backbone"] is random["pretraining"] is None
    end_to_end = torch.load(tmp_path / "runs" / "finetune_bc__e2e__pong__0" / "policy.pt", weights_only=True)
    torch.manual_seed(0)
    initial = bc.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    assert end_to_end["backbone"].keys() == initial.keys()
    assert not any(torch.equal(x, initial[name]) for name, x in end_to_end["backbone"].items())


def test_a_result_knows_its_backbone_pretraining_and_data(pretrained, on_replay, replay, no_play, tmp_path):
    """A digest of the weights, whatever the file's path; how far its training was; where both data sets are from."""
    moved = tmp_path / "elsewhere" / "moved.pt"
    moved.parent.mkdir()
    shutil.copy(pretrained(), moved)
    for name, path in {"one": pretrained(), "same": moved, "other": pretrained(seed=1)}.items():
        finetune(*on_replay, "--checkpoint", path, "--method", name, cwd=tmp_path)
    one, same, other = (result(tmp_path, name) for name in ("one", "same", "other"))
    assert one["backbone"] == same["backbone"] != other["backbone"] and len(one["backbone"]) == 8
    pretraining = one["pretraining"]
    expected = {"step": 2, "total_steps": 2, "data": "random_play", "learning_rate": 1e-4, "games": ["pong"]}
    assert {name: pretraining[name] for name in expected} == expected
    assert other["pretraining"] == pretraining | {"seed": 1}
    assert one["data"] == "dqn_replay"

    shutil.copytree(replay / "Pong", tmp_path / "jat" / "Pong")
    (tmp_path / "jat" / "Pong" / "source.txt").write_text("jat\n")
    finetune(*on_replay, "--data-dir", tmp_path / "jat", "--method", "jat", cwd=tmp_path)
    assert result(tmp_path, "jat")["data"] == "jat"


def test_the_same_in_other_words_is_skipped(pretrained, replay, no_play, capsys, tmp_path):
    shutil.copytree(pretrained().parent, tmp_path / "runs" / "pretrain_bc__0")
    (tmp_path / "data").symlink_to(replay)
    relative = ("--checkpoint", "runs/pretrain_bc__0/checkpoint.pt", "--data-dir", "data")
    absolute = ("--checkpoint", tmp_path / "runs/pretrain_bc__0/checkpoint.pt", "--data-dir", replay)
    finetune(*QUICK, *FEW, *relative, "--game", "MsPacman", cwd=tmp_path)
    path = result_path(tmp_path, "bc", "ms_pacman")
    before = path.stat().st_mtime_ns
    for words in [
        (*absolute, "--game", "ms_pacman"),
        (*absolute, "--game", "mspacman", "--method", "bc"),
        (*relative, "--game", "ms_pacman", "--cache-dir", "other"),
    ]:
        capsys.readouterr()
        finetune(*QUICK, *FEW, *words, cwd=tmp_path)
        assert "seed0.json is there already" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


def test_other_values_are_refused(pretrained, on_replay, replay, no_play, tmp_path):
    """Other weights at the same path, other data, other settings: a line, and the result stays as it is."""
    path = tmp_path / "checkpoint.pt"
    shutil.copy(pretrained(), path)
    args = (*on_replay, "--checkpoint", path)
    finetune(*args, "--method", "mine", cwd=tmp_path)
    content = result_path(tmp_path, "mine").read_text()
    (tmp_path / "copy").mkdir()
    shutil.copytree(replay / "Pong", tmp_path / "copy" / "Pong")

    def refused(*changes) -> str:
        with pytest.raises(SystemExit, match=r"seed0\.json was made with .* or --overwrite\.$") as end:
            finetune(*args, "--method", "mine", *changes, cwd=tmp_path)
        assert result_path(tmp_path, "mine").read_text() == content
        return str(end.value)

    assert "'epochs': 1}" in refused("--epochs", 2)
    assert "'data_dir'" in refused("--data-dir", tmp_path / "copy")
    shutil.copy(pretrained(seed=1), path)
    assert f"'backbone': '{json.loads(content)['backbone']}'" in refused()
    assert "'game'" not in refused()
    finetune(*args, "--method", "mine", "--overwrite", cwd=tmp_path)
    assert result(tmp_path, "mine")["backbone"] != json.loads(content)["backbone"]


def test_unfinished_pretraining_is_told(pretrained, on_replay, no_play, capsys, tmp_path):
    state = torch.load(pretrained(), weights_only=True)
    state["step"] = 1
    torch.save(state, tmp_path / "early.pt")
    finetune(*on_replay, "--checkpoint", pretrained(), "--method", "whole", cwd=tmp_path)
    assert "Unfinished" not in capsys.readouterr().out
    finetune(*on_replay, "--checkpoint", tmp_path / "early.pt", "--method", "early", cwd=tmp_path)
    assert "Unfinished pre-training: 1 of 2 steps" in capsys.readouterr().out
    assert result(tmp_path, "early")["pretraining"]["step"] == 1
    assert result(tmp_path, "early")["backbone"] == result(tmp_path, "whole")["backbone"]


def test_smoke_tests_are_marked(pretrained, cache, on_replay, no_play, tmp_path):
    """Played data, in either training, or another evaluation than the benchmark's."""
    protocol = ("--eval-episodes", 100, "--max-episode-steps", 27_000)
    state = torch.load(pretrained(), weights_only=True)
    state["args"]["data"] = "dqn_replay"
    torch.save(state, tmp_path / "real.pt")
    played = (*QUICK, "--game", "pong", "--play-rows", 1000, "--cache-dir", cache)
    for name, args in {
        "real": (*on_replay, *protocol, "--checkpoint", tmp_path / "real.pt"),
        "random": (*on_replay, *protocol),
        "played": (*played, *protocol, "--checkpoint", tmp_path / "real.pt"),
        "pretrained_on_play": (*on_replay, *protocol, "--checkpoint", pretrained()),
        "episodes": (*on_replay, *protocol, "--eval-episodes", 99),
        "steps": (*on_replay, *protocol, "--max-episode-steps", 26_999),
        "epsilon": (*on_replay, *protocol, "--epsilon", 0.01),
    }.items():
        finetune(*args, "--method", name, cwd=tmp_path)
        assert result(tmp_path, name)["smoke_test"] is (name not in ("real", "random")), name


def test_a_run_that_is_cut_off_leaves_no_result(on_replay, monkeypatch, tmp_path):
    """The same command then makes it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bc, "play_episodes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(*on_replay, cwd=tmp_path)
    assert not result_path(tmp_path, "random").exists()
    monkeypatch.setattr(bc, "play_episodes", lambda *_: (np.full(2, 3.0), []))
    finetune(*on_replay, cwd=tmp_path)
    assert result(tmp_path, "random")["score"] == 3


@pytest.mark.parametrize("flags", [(), ("--epochs", 2)])
def test_a_result_does_not_count_once_it_is_made_again(flags, on_replay, no_play, monkeypatch, tmp_path):
    """An --overwrite that was cut off leaves none; one with a mistake in it leaves the old one."""
    finetune(*on_replay, cwd=tmp_path)
    for mistake in (("--batch-size", 0), ("--num-transitions", 3), ("--data-dir", "nowhere")):
        with pytest.raises(SystemExit):
            finetune(*on_replay, "--overwrite", *mistake, cwd=tmp_path)
        assert result(tmp_path, "random")["score"] == 3

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bc, "augment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(*on_replay, *flags, "--overwrite", cwd=tmp_path)
    assert not result_path(tmp_path, "random").exists()
    finetune(*on_replay, *flags, cwd=tmp_path)  # without --overwrite
    assert result(tmp_path, "random")["args"]["epochs"] == (flags or (0, 1))[1]


@pytest.mark.parametrize("place", ["results", "results/bc/random/pong", "runs", "runs/finetune_bc__random__pong__0"])
def test_a_place_that_cannot_be_written_is_found_before_training(place, on_replay, monkeypatch, tmp_path):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    monkeypatch.setattr(bc, "augment", lambda *_: pytest.fail("too late"))
    with pytest.raises((FileExistsError, NotADirectoryError), match=place):
        finetune(*on_replay, cwd=tmp_path)


def test_the_users_folder(pretrained, no_play, monkeypatch, tmp_path):
    """~ in any flag, as bash leaves it in --checkpoint=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(pretrained(), tmp_path / "checkpoint.pt")
    places = ("--checkpoint=~/checkpoint.pt", "--cache-dir=~/made", "--results=~/results")
    finetune(*QUICK, "--game", "pong", "--play-rows", 100, *places, cwd=tmp_path)
    assert result(tmp_path, "bc")["args"]["cache_dir"] == str(tmp_path / "made")
    assert (tmp_path / "made").is_dir() and not (tmp_path / "~").exists()


def test_the_seed_decides(on_replay, no_play, tmp_path):
    """Two runs with the same seed are bitwise equal."""
    policies = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(*on_replay, "--method", name, "--seed", seed, cwd=tmp_path)
        path = tmp_path / "runs" / f"finetune_bc__{name}__pong__{seed}" / "policy.pt"
        policies.append(torch.load(path, weights_only=True))
    for part, state in policies[0].items():
        for name, x in state.items():
            assert torch.equal(x, policies[1][part][name])
    assert not torch.equal(policies[0]["head"]["weight"], policies[2]["head"]["weight"])


def make_replay(folder: Path, lengths: list[int], padding: int) -> tuple[list[bytes], list[int]]:
    """Writes a replay of episodes; returns the stacks, zero before an episode's start, and actions of its real rows."""
    rng = np.random.default_rng(0)
    columns, stacks, taken = {"observation": [], "action": [], "reward": [], "terminal": []}, [], []
    blank = np.zeros((84, 84), np.uint8)
    for length in lengths:
        frames = [blank] * 3 + [rng.integers(0, 256, (84, 84), dtype=np.uint8) for _ in range(length)]
        actions = rng.integers(0, 5, length).tolist()
        columns["observation"] += frames[3 - padding :]
        columns["action"] += [0] * padding + actions
        columns["reward"] += [0.0] * (padding + length)
        columns["terminal"] += [0] * (padding + length - 1) + [1]
        stacks += [np.stack(frames[i : i + 4]).tobytes() for i in range(length)]
        taken += actions
    write_replay(folder, "klax", {field: [*column, column[-1]] for field, column in columns.items()})
    return stacks, taken


@pytest.mark.parametrize(("padding", "offset"), [(3, 0), (3, 1), (0, 0)])
def test_an_epoch_visits_each_transition_once(padding, offset, no_play, monkeypatch, tmp_path):
    """Stacks and actions are the replay's, frames of earlier episodes zeroed; the last batch is short."""
    lengths = [5, 1, 30, 24]
    stacks, actions = make_replay(tmp_path / "data", lengths, padding)
    if padding == 0:  # nothing tells that the file begins with an episode: its first rows lack their history
        stacks, actions = stacks[3:], actions[3:]
    seen, targets, cross_entropy = [], [], bc.F.cross_entropy

    def augment(given):
        seen.extend(given)
        return given / 255

    def loss(logits, target):
        targets.append(target)
        return cross_entropy(logits, target)

    monkeypatch.setattr(bc, "augment", augment)
    monkeypatch.setattr(bc.F, "cross_entropy", loss)
    rows = sum(lengths) + padding * len(lengths)
    data = ("--data-dir", tmp_path / "data", "--runs", 1, "--checkpoints", 1, "--num-transitions", rows)
    few = ("--game", "klax", "--epochs", 2, "--batch-size", 16, "--action-offset", offset)
    finetune(*QUICK, *data, *few, cwd=tmp_path)
    n = len(stacks)
    assert [len(target) for target in targets] == 2 * [16, 16, 16, n - 48]
    found = [(stack.numpy().tobytes(), int(a)) for stack, a in zip(seen, torch.cat(targets), strict=True)]
    expected = sorted((stack, action + offset) for stack, action in zip(stacks, actions, strict=True))
    assert sorted(found[:n]) == sorted(found[n:]) == expected
    assert found[:n] != found[n:]  # in another order


def copy_replay(replay: Path, folder: Path, game: str, numbers: list[tuple[int, int]]) -> Path:
    """A data set with Freeway's replay as these runs and checkpoints of the game."""
    for number, checkpoint in numbers:
        for path in (replay / "Freeway" / "1" / "replay_logs").iterdir():
            name = path.name.replace("ckpt.1", f"ckpt.{checkpoint}")
            target = folder / game / str(number) / "replay_logs" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return folder


@pytest.mark.parametrize(
    ("game", "runs", "checkpoints", "flags"),
    [
        ("Freeway", [1, 2, 3, 4, 5], [50], ()),
        ("Klax", [1], [2], ()),
        ("Klax", [5, 1], [3, 50], ("--runs", 5, 1, 5, "--checkpoints", 3, 50, 3)),
    ],
)
def test_what_is_read(game, runs, checkpoints, flags, replay, no_play, capsys, tmp_path):
    """By default, DQN Replay's 5 runs of checkpoint 50, or what recordings have; the same number of rows of each."""
    numbers = [(number, checkpoint) for number in runs for checkpoint in checkpoints]
    few_shot = ("--data-dir", copy_replay(replay, tmp_path / "data", game, numbers), "--num-transitions", 260)
    finetune(*QUICK, "--game", game, *few_shot, *flags, cwd=tmp_path)
    n = len(numbers)
    assert f"on {n * (260 // n - 3)} transitions" in capsys.readouterr().out  # the first rows here have no history
    args = result(tmp_path, "random", game.lower())["args"]
    assert args["runs"] == runs and args["checkpoints"] == checkpoints


def test_actions_that_the_game_does_not_have(no_play, tmp_path):
    """After --action-offset. It ends before training."""
    make_replay(tmp_path / "data", [5, 30], 3)
    (tmp_path / "data" / "Klax").rename(tmp_path / "data" / "Freeway")  # which has 3, and these are up to 4
    few = ("--data-dir", tmp_path / "data", "--runs", 1, "--checkpoints", 1, "--num-transitions", 41)
    with pytest.raises(SystemExit, match=r"^freeway has actions 0 to 2, but action 4 was recorded: another game's\?$"):
        finetune(*QUICK, *few, "--game", "freeway", cwd=tmp_path)
    assert not list(tmp_path.glob("results/**/*.json")) and not (tmp_path / "runs").exists()
    (tmp_path / "data" / "Freeway").rename(tmp_path / "data" / "BasicMath")  # 6 actions
    finetune(*QUICK, *few, "--game", "basic_math", "--action-offset", 1, cwd=tmp_path)
    with pytest.raises(SystemExit, match=r"^basic_math has actions 0 to 5, but action 6 was recorded"):
        finetune(*QUICK, *few, "--game", "basic_math", "--action-offset", 2, "--method", "off", cwd=tmp_path)


class LongGame:
    """An environment whose episode lasts 2,000 steps, and takes no time."""

    single_action_space = bc.AtariVectorEnv("pong", 1).single_action_space

    def __init__(self, *_, **options):
        self.step_number = 0

    def reset(self, seed):
        return np.zeros((1, 4, 84, 84), np.uint8), {}

    def send(self, actions):
        self.step_number += 1

    def recv(self):
        stacks = np.full((1, 4, 84, 84), self.step_number % 256, np.uint8)
        done = np.full(1, self.step_number == 2000)
        return stacks, np.ones(1), done, np.zeros_like(done), {}


def test_a_film_ends_after_two_minutes(monkeypatch):
    monkeypatch.setattr(bc, "AtariVectorEnv", LongGame)
    args = bc.Args("pong", eval_episodes=1, video=True)
    scores, frames = bc.play_episodes("pong", lambda stacks, *_: np.zeros((len(stacks), 18)), args)
    assert scores.tolist() == [2000]
    assert [frame.getpixel((0, 0)) for frame in frames] == [i % 256 for i in range(1800)]


def test_the_result_comes_before_the_film(on_replay, no_play, monkeypatch, tmp_path):
    def save(self, path, **options):
        assert result(tmp_path, "random")["score"] == 3
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(bc, "play_episodes", lambda *_: (np.full(1, 3.0), [Image.new("L", (84, 84))]))
    with pytest.raises(OSError, match="disk full"):
        finetune(*on_replay, "--video", cwd=tmp_path)
    assert result(tmp_path, "random")["score"] == 3


@pytest.fixture
def policies(monkeypatch):
    """The policies that are made, each with a copy of its backbone's state before training."""
    made = []

    class Policy(bc.Policy):
        def __init__(self, backbone):
            super().__init__(backbone)
            made.append((self, copy.deepcopy(backbone.state_dict())))

    monkeypatch.setattr(bc, "Policy", Policy)
    return made


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_may_take_the_norms_place(frozen, on_replay, policies, monkeypatch, tmp_path):
    """A frozen backbone keeps its running statistics; in evaluation, a stack has the same values alone and among 8."""

    def play(game, policy, args):
        stacks = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)
        np.testing.assert_allclose(policy(stacks)[3:4], policy(stacks[3:4]), rtol=1e-3, atol=1e-3)
        return np.zeros(args.eval_episodes), []

    monkeypatch.setattr(bc, "Norm", nn.BatchNorm2d)
    monkeypatch.setattr(bc, "play_episodes", play)
    finetune(*on_replay, "--freeze-backbone" if frozen else "--no-freeze-backbone", cwd=tmp_path)
    [(policy, before)] = policies
    after = policy.backbone.state_dict()
    assert any("running_mean" in name for name in before)
    for name, x in before.items():
        if frozen or "running_mean" in name:
            assert torch.equal(x, after[name]) == frozen, name


def theirs(backbone: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """A backbone's state as the authors' files have it."""
    state = {"stem.0.weight": backbone.conv1.weight.detach()}
    state |= {name.replace("downsample", "shortcut"): x for name, x in backbone.state_dict().items()}
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_the_authors_checkpoints(prefix, on_replay, no_play, tmp_path):
    """Prefixes of wrappers, the first convolution twice, `shortcut` for `downsample`; DT's has NumPy scalars."""
    ours = bc.ResNet(0.125, (1, 1, 1, 1))
    path = tmp_path / "siammae" / "latest.pth"
    path.parent.mkdir()
    max_rtg = {np.int64(3): np.float64(1.0), np.int64(4): np.float32(2.5)}
    torch.save(dict(backbone=theirs(ours, prefix), neck={prefix + "a": torch.ones(1)}, max_rtg=max_rtg), path)
    content = bc.load_checkpoint(path)
    assert content["max_rtg"] == {3: 1.0, 4: 2.5} and content["neck"].keys() == {"a"}
    loaded = bc.ResNet(0.125, (1, 1, 1, 1))
    loaded.load_state_dict(content["backbone"])
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in ours.state_dict().items())
    if not prefix:
        with contextlib.chdir(path.parent):
            finetune(*on_replay, "--checkpoint", "latest.pth", "--results", tmp_path / "results", cwd=path.parent)
        assert result(tmp_path, "siammae")["pretraining"] is None  # the folder's name


def test_bad_checkpoints(pretrained, tmp_path):
    """Missing, damaged, of another kind, with code in it, of another width: one line that names the file."""
    (tmp_path / "damaged.pt").write_bytes(pretrained().read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"backbone": {}, "max_rtg": {3: Bomb()}}, tmp_path / "bomb.pt")
    torch.save({"backbone": {}, "max_rtg": {3: np.random.default_rng}}, tmp_path / "function.pt")
    for name in ("missing.pt", "empty.pt", "damaged.pt", "other.pt", "list.pt", "bomb.pt", "function.pt"):
        with pytest.raises(SystemExit, match=rf"{name} is no checkpoint of .*") as end:
            finetune(*QUICK, "--game", "pong", "--checkpoint", tmp_path / name, cwd=tmp_path)
        assert "\n" not in str(end.value)
    batch_norm = {"bn1.weight": torch.zeros(8)} | torch.load(pretrained(), weights_only=True)["backbone"]
    torch.save({"backbone": batch_norm}, tmp_path / "batch_norm.pt")
    with pytest.raises(SystemExit, match=r"batch_norm\.pt has batch norms, .* ablations/batch-norm\.patch"):
        finetune(*QUICK, "--game", "pong", "--checkpoint", tmp_path / "batch_norm.pt", cwd=tmp_path)
    assert not (tmp_path / "exploded").exists() and not os.path.exists("exploded")
    with pytest.raises(SystemExit, match="another network: set --width-multiplier and --blocks"):
        finetune(*QUICK, "--game", "pong", "--checkpoint", pretrained(), "--width-multiplier", 0.25, cwd=tmp_path)
    assert not list(tmp_path.glob("results/**/*.json"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--game", "chess"], "^Unknown game 'chess'"),
        (["--epochs", 0], "^--epochs must be at least 1"),
        (["--eval-episodes", 0], "^--eval-episodes must be at least 1"),
        (["--method", "a/b"], "^--method a/b is no name for a folder: choose one without a slash"),
        (["--method", ".."], "^--method .. is no name"),
        (["--method", "."], "^--method . is no name"),
        (["--data-dir", "nowhere"], "nowhere/Pong lacks files of run 1, checkpoint 1"),
        (["--num-transitions", 0], "one row to read"),
    ],
)
def test_bad_arguments(args, message, on_replay, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune(*on_replay, *args, cwd=tmp_path)
    assert not list(tmp_path.glob("results/**/*.json"))
