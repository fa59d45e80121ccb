"""Fine-tuning by Rainbow as a user runs it: results, what is done already, two at once, seeds, and bad input."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, load, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

rainbow = load("finetune_rainbow.py")
SHORT = ("--learning-starts", 20, "--updates-per-step", 0.25, "--batch-size", 8, "--log-every", 10)
SHORT += ("--max-episode-steps", 40, "--precision", "fp32")
QUICK = ("--game", "pong", *SMALL, *SHORT, "--eval-episodes", 2, "--total-steps", 60)


class KilledError(Exception):
    pass


def finetune(*args, cwd: Path) -> None:
    """Runs the script in this process."""
    defaults = ["--device", "cpu", "--no-compile"]
    with contextlib.chdir(cwd):
        rainbow.finetune(rainbow.tyro.cli(rainbow.Args, args=[*defaults, *map(str, args)]))


def cut_off(module, row: int, call, do=None) -> None:
    """Calls what runs a script, until so many rows have been played; it then ends like a kill, or does something."""

    def add(self, *fields, add=module.Replay.add):
        add(self, *fields)
        if self.rows == row:
            if do is None:
                raise KilledError
            do()

    error, message = (KilledError, None) if do is None else (SystemExit, "To go on: the same command")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Replay, "add", add)
        with pytest.raises(error, match=message):
            call()


def folder_of(cwd: Path) -> Path:
    (path,) = cwd.glob("runs/*")
    return path


def result(cwd: Path) -> dict:
    (path,) = cwd.glob("results/rainbow/*/*/*.json")
    return json.loads(path.read_text())


def policy(cwd: Path) -> dict:
    return torch.load(folder_of(cwd) / "policy.pt", weights_only=True)


def scalars(cwd: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder_of(cwd)))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def assert_equal(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def draws(module, call, patch: pytest.MonkeyPatch) -> dict[str, list]:
    """All that a seed decides while `call` runs a script, by what it is for."""
    found = {name: [] for name in ("initialisation", "environments", "actions", "replay draws", "augmentation")}

    def initialise(self, *args, make=module.Rainbow.__init__):
        make(self, *args)
        found["initialisation"] += [x.double().sum().item() for x in self.state_dict().values()]

    def reset(self, *args, reset=module.AtariVectorEnv.reset, **options):
        found["environments"].append(str((args, options)))
        return reset(self, *args, **options)

    def add(self, frame, action, *fields, add=module.Replay.add):
        found["actions"].append(action)
        add(self, frame, action, *fields)

    def sample(self, *args, sample=module.Replay.sample):
        drawn = sample(self, *args)
        found["replay draws"] += drawn[0].tolist()
        return drawn

    def augment(stacks, augment=module.augment):
        with torch.random.fork_rng([]):
            found["augmentation"] += torch.rand(2).tolist()  # what it draws from here on follows the same seed
        return augment(stacks)

    patch.setattr(module.Rainbow, "__init__", initialise)
    patch.setattr(module.AtariVectorEnv, "reset", reset)
    patch.setattr(module.Replay, "add", add)
    patch.setattr(module.Replay, "sample", sample)
    patch.setattr(module, "augment", augment)
    call()
    return found


def assert_seeds_decide(module, call) -> None:
    """`call(seed, number)`: the same seed draws the same, another one draws anew whatever is drawn."""
    found = []
    for number, seed in enumerate((3, 3, 4)):
        with pytest.MonkeyPatch.context() as patch:
            found.append(draws(module, lambda seed=seed, number=number: call(seed, number), patch))
    one, again, other = found
    for name, drawn in one.items():
        assert len(drawn) > 2, name
        assert drawn == again[name], name
        assert drawn != other[name], name
    assert not set(one["environments"]) & set(other["environments"])  # of training and of evaluation
    assert not set(one["augmentation"]) & set(other["augmentation"])


# === results ==========================================================================================================
def test_from_a_checkpoint(tmp_path, capsys):
    """The backbone is the checkpoint's and stays so; what is printed, logged and left; the result."""
    torch.manual_seed(5)
    backbone = rainbow.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    content = {"objective": "atc", "step": 3, "backbone": backbone, "args": {"data": "random_play", "total_steps": 9}}
    content["args"]["data_dir"] = None
    torch.save(content, tmp_path / "checkpoint.pt")
    models = []

    def initialise(self, *args, make=rainbow.Rainbow.__init__):
        make(self, *args)
        models.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rainbow.Rainbow, "__init__", initialise)
        args = (*QUICK, "--checkpoint", "checkpoint.pt", "--exploration-steps", 20, "--video")
        finetune(*args, cwd=tmp_path)
    (model,) = models
    assert_equal(model.online.backbone.state_dict(), backbone)
    assert {state["step"].item() for state in model.optimizer.state.values()} == {10}
    printed = capsys.readouterr().out
    assert printed.startswith("Device: cpu, precision: float32\n")
    assert "Unfinished pre-training: 3 of 9 steps" in printed

    found = result(tmp_path)
    identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "data", "smoke_test")}
    expected = {"suite": "rainbow", "method": "atc", "game": "pong", "split": "near_ood", "seed": 0, "data": "online"}
    assert identity == expected | {"smoke_test": True}
    assert found["pretraining"] == {"step": 3} | content["args"] and len(found["backbone"]) == 8
    assert found["score"] == np.mean(found["episode_scores"]) and len(found["episode_scores"]) == 2
    left = {path.name for path in folder_of(tmp_path).iterdir() if not path.name.startswith("events")}
    assert left == {"args.json", "policy.pt", "episode.gif"}
    assert json.loads((folder_of(tmp_path) / "args.json").read_text()) == found["args"]
    with Image.open(folder_of(tmp_path) / "episode.gif") as video:
        assert 1 < video.n_frames <= 40
    assert policy(tmp_path).keys() == {"neck", "head"}

    logged = scalars(tmp_path)
    losses = {f"losses/{name}" for name in ("loss", "grad_norm", "q", "target_q")}
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "epsilon", "beta")}
    assert logged.keys() == losses | charts | {"eval/score"}
    assert list(logged["losses/loss"]) == [30, 40, 50, 60]
    assert logged["charts/episodic_length"] == {40: 40}  # the second game was not over
    epsilon = [1 - 0.99 * 9 / 20, 1 - 0.99 * 19 / 20, 0.01, 0.01]
    assert list(logged["charts/epsilon"].values()) == pytest.approx(epsilon)
    beta = [0.4 + 0.6 * update / 10 for update in (1, 4, 6, 9)]  # of the last of as many updates, and one, so far
    assert list(logged["charts/beta"].values()) == pytest.approx(beta)
    assert all(value > 0 for value in logged["charts/SPS"].values())
    assert logged["eval/score"] == {60: found["score"]}


def test_baseline_learned_from_scratch(tmp_path):
    """All of the network is learned, and saved."""
    finetune(*QUICK, "--no-freeze-backbone", cwd=tmp_path)
    assert (result(tmp_path)["method"], result(tmp_path)["checkpoint"]) == ("e2e", None)
    learned = policy(tmp_path)
    torch.manual_seed(0)
    initial = rainbow.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    assert learned["backbone"].keys() == initial.keys()
    assert not any(torch.equal(x, initial[name]) for name, x in learned["backbone"].items())


def test_policy_is_the_target_network(tmp_path):
    """Which with a momentum of 1 stays what it was at first, whatever the online network learns."""
    finetune(*QUICK, "--target-momentum", 1, cwd=tmp_path)
    torch.manual_seed(0)
    args = rainbow.Args("pong", width_multiplier=0.125, blocks=(1, 1, 1, 1))
    first = rainbow.Network(args, rainbow.make_backbone(args)[0], 6)
    assert_equal(policy(tmp_path), {"neck": first.neck.state_dict(), "head": first.head.state_dict()})


def test_seeds(tmp_path):
    """Initialisation, environments, exploration, replay, augmentation and evaluation follow the seed, and it alone."""

    def call(seed: int, number: int) -> None:
        finetune(*QUICK, "--seed", seed, "--results", tmp_path / str(number), cwd=tmp_path)

    assert_seeds_decide(rainbow, call)
    results = [json.loads(next((tmp_path / f"{i}").rglob("*.json")).read_text()) for i in (0, 1)]
    assert results[0]["episode_scores"] == results[1]["episode_scores"]


# === what is done, interrupted, or done twice at once =================================================================
def test_what_is_done_is_kept_until_overwrite(tmp_path, capsys):
    """The same command does nothing; other arguments are refused; --overwrite makes the same again."""
    finetune(*QUICK, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    first, parts = result(tmp_path), policy(tmp_path)
    finetune(*QUICK, cwd=tmp_path)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"seed0\.json was made with \{'batch_size': 8\}"):
        finetune(*QUICK, "--batch-size", 4, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    cut_off(rainbow, 55, lambda: finetune(*QUICK, "--overwrite", cwd=tmp_path))
    assert not [*tmp_path.glob("results/**/*.json")]  # an old result no longer counts
    finetune(*QUICK, cwd=tmp_path)  # begins again
    assert result(tmp_path) == first | {"args": result(tmp_path)["args"]}
    assert_equal(policy(tmp_path), parts)
    finetune(*QUICK, "--overwrite", "--log-every", 15, cwd=tmp_path)
    assert list(scalars(tmp_path)["losses/loss"]) == [30, 45, 60]  # what earlier runs have logged is hidden


def test_two_at_once(tmp_path):
    """Two processes with the same command, in the same folders: one whole result, as if one had run alone."""
    command = [sys.executable, ROOT / "finetune_rainbow.py", *map(str, QUICK), "--device", "cpu", "--no-compile"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = [subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "Traceback" not in "".join(printed)
    assert not [*tmp_path.rglob("*.tmp")]
    (tmp_path / "alone").mkdir()
    finetune(*QUICK, cwd=tmp_path / "alone")
    assert result(tmp_path)["episode_scores"] == result(tmp_path / "alone")["episode_scores"]
    assert_equal(policy(tmp_path), policy(tmp_path / "alone"))


def test_nan_ends_the_run(tmp_path):
    """An absurd learning rate: the first update is finite, the next one's loss is not."""
    with pytest.raises(SystemExit, match="Loss nan or gradient norm nan is not finite at step 28"):
        finetune(*QUICK, "--learning-rate", 1e30, cwd=tmp_path)
    assert not [*tmp_path.glob("results/**/*.json")]


# === bad input ========================================================================================================
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--game", "chess"], "Unknown game 'chess'"),
        (["--checkpoint", "a.pt"], r"a\.pt"),
        (["--learning-starts", "10"], "--n-steps < --learning-starts"),
        (["--learning-starts", "60"], "--learning-starts < --total-steps"),
        (["--log-every", "0"], "--log-every must be at least 1"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune(*QUICK, *args, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["runs", "results"])
def test_a_folder_that_cannot_be_made_ends_the_run_before_it_begins(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("a file in its place")
    monkeypatch.setattr(rainbow, "Environment", None)
    with pytest.raises(NotADirectoryError, match=name):
        finetune(*QUICK, cwd=tmp_path)


def test_torchrun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(rainbow, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit, match="start it without torchrun"):
        finetune(*QUICK, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_as_a_script(tmp_path):
    """From the shell, as a user does it; a ~ within an argument is the home folder."""
    args = (*QUICK, "--total-steps", 25, "--device", "cpu", "--results=~/found")
    done = run("finetune_rainbow.py", *args, cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert f"{tmp_path}/home/found/rainbow/random/pong/seed0.json: " in done.stdout
    assert not (tmp_path / "~").exists()
