"""Rainbow as a user runs it: its results and recordings, cut off in every way and continued, and bad input."""

import contextlib
import gzip
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
from conftest import ROOT, SMALL, environment, load, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

rainbow = load("finetune_rainbow.py")
SHORT = ("--learning-starts", 20, "--updates-per-step", 0.25, "--batch-size", 8, "--replay-capacity", 60)
SHORT += ("--log-every", 10, "--eval-episodes", 2, "--max-episode-steps", 40, "--precision", "fp32")
QUICK = ("--game", "pong", *SMALL, *SHORT, "--total-steps", 60)
NATURE = ("--game", "pong", "--encoder", "nature", *SHORT, "--total-steps", 120, "--save-every", 40)
SAVED = (*NATURE, "--max-episode-steps", 25, "--save-every", 200, "--save-replay", "data", "--save-replay-every", 60)


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process leaves the signals' handlers as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def finetune(*args, cwd: Path) -> None:
    """Runs the script in this process."""
    defaults = ["--device", "cpu", "--no-compile"]
    with contextlib.chdir(cwd):
        rainbow.finetune(rainbow.tyro.cli(rainbow.Args, args=[*defaults, *map(str, args)]))


def cut_off(row: int, *args, cwd: Path, do=None) -> None:
    """Runs the script until so many rows have been played, and then ends it like a kill or does something."""

    def add(self, *fields, add=rainbow.Replay.add):
        add(self, *fields)
        if self.rows == row:
            if do is None:
                raise KilledError
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rainbow.Replay, "add", add)
        with pytest.raises(
            KilledError if do is None else SystemExit, match=None if do is None else "To go on: the same"
        ):
            finetune(*args, cwd=cwd)


def folder_of(cwd: Path) -> Path:
    (path,) = cwd.glob("runs/*")
    return path


def result(cwd: Path) -> dict:
    (path,) = cwd.glob("results/rainbow/*/*/*.json")
    return json.loads(path.read_text())


def policy(cwd: Path) -> dict:
    return torch.load(folder_of(cwd) / "policy.pt", weights_only=True)


def checkpoint(cwd: Path) -> dict:
    return torch.load(folder_of(cwd) / "checkpoint.pt", weights_only=True)


def scalars(cwd: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder_of(cwd)))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def recordings(cwd: Path, number: int) -> dict[str, np.ndarray]:
    content = {}
    for path in cwd.glob(f"data/Pong/0/replay_logs/*_ckpt.{number}.gz"):
        with gzip.open(path) as stream:
            content[path.name] = np.load(stream)
    assert len(content) == 4
    return content


def assert_equal(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_end(one: Path, other: Path) -> None:
    """Results, policies, curves and recordings are equal, bit by bit."""
    results = [result(folder) for folder in (one, other)]
    for content in results:
        del content["args"]["save_replay"]  # an absolute path
    assert results[0] == results[1]
    assert_equal(policy(one), policy(other))
    curves, others = scalars(one), scalars(other)
    assert curves.keys() == others.keys()
    for name in curves.keys() - {"charts/SPS"}:
        assert curves[name] == others[name], name
    for number in (1, 2) if (one / "data").exists() else ():
        for name, column in recordings(one, number).items():
            np.testing.assert_array_equal(column, recordings(other, number)[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run that was left alone and recorded two replay checkpoints"""
    folder = tmp_path_factory.mktemp("saved")
    finetune(*SAVED, cwd=folder)
    return folder


# === results ==========================================================================================================
def test_from_a_checkpoint(tmp_path, capsys):
    """The backbone is the checkpoint's and stays so; what is logged; what is left; the result."""
    torch.manual_seed(5)
    backbone = rainbow.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    content = {"objective": "atc", "step": 3, "backbone": backbone, "args": {"data": "random_play", "total_steps": 9}}
    content["args"]["data_dir"] = None
    torch.save(content, tmp_path / "checkpoint.pt")
    args = (*QUICK, "--checkpoint", "checkpoint.pt", "--exploration-steps", 20, "--video", "--save-every", 50)
    cut_off(55, *args, cwd=tmp_path)
    state = checkpoint(tmp_path)
    for name, values in backbone.items():
        assert state["model"][f"online.backbone.{name}"].equal(values)
    assert {len(x) for x in state["optimizer"].values()} == {3} and state["optimizer"][0]["step"] == 7
    finetune(*args, cwd=tmp_path)
    printed = capsys.readouterr().out
    assert "runs/finetune_rainbow__atc__pong__0: from step 0 of 60" in printed and "from step 50 of 60" in printed
    assert "Unfinished pre-training: 3 of 9 steps" in printed

    found = result(tmp_path)
    identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "data", "smoke_test")}
    expected = {"suite": "rainbow", "method": "atc", "game": "pong", "split": "near_ood", "seed": 0, "data": "online"}
    assert identity == expected | {"smoke_test": True}
    assert found["pretraining"] == {"step": 3, "total_steps": 9, "data": "random_play"} and len(found["backbone"]) == 8
    assert found["score"] == np.mean(found["episode_scores"]) and len(found["episode_scores"]) == 2
    assert found["normalized_score"] == pytest.approx((found["score"] + 20.7) / (16.61 + 20.7), rel=1e-6)
    left = {path.name for path in folder_of(tmp_path).iterdir() if not path.name.startswith("events")}
    assert left == {"args.json", "policy.pt", "episode.gif"}  # the checkpoint and the frames are gone
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
    args = rainbow.Args("pong", width_multiplier=0.125, blocks=(1, 1, 1, 1), device="cpu", compile=False)
    first = rainbow.Rainbow(args, rainbow.make_backbone(args)[0], 6, torch.device("cpu")).target
    assert_equal(policy(tmp_path), {"neck": first.neck.state_dict(), "head": first.head.state_dict()})


def test_what_is_done_is_kept_until_overwrite(saved, tmp_path, capsys):
    """The same command does nothing; other arguments are refused; --overwrite makes the same again."""
    finetune(*SAVED, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "elsewhere").mkdir()
    left = folder_of(tmp_path) / "checkpoint.pt", tmp_path / "elsewhere" / f"{folder_of(tmp_path).name}.bin"
    for seconds in (60, -60):  # another run's with other --results; this run's, which was killed just after its result
        for path in left:
            path.write_bytes(b"of no use")
            os.utime(path, (time.time() + seconds, time.time() + seconds))
        finetune(*SAVED, "--replay-dir", "elsewhere", cwd=tmp_path)
        assert "is there already" in capsys.readouterr().out
        assert [path.exists() for path in left] == [seconds > 0] * 2
    with pytest.raises(SystemExit, match=r"seed0\.json was made with \{'batch_size': 8\}"):
        finetune(*SAVED, "--batch-size", 4, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    cut_off(70, *SAVED, "--overwrite", cwd=tmp_path)  # from then on, the old result does not count
    assert not [*tmp_path.glob("results/**/*.json")] and checkpoint(tmp_path)["replay"]["rows"] == 60
    finetune(*SAVED, cwd=tmp_path)
    assert_same_end(tmp_path, saved)


# === cut off and continued ============================================================================================
@pytest.mark.parametrize("method", ["random", "nature"])
def test_cut_off_and_continued_equals_left_alone(method, tmp_path):
    """Ended in any way between checkpoints, in a replay of 63 slots: by a kill, by a signal, and by one more kill.

    Sticky actions, and episodes that end by a lost life or by the game's time: all goes on in the middle.
    """
    options = {"random": SMALL, "nature": ("--encoder", "nature", "--replay-dir", "disk")}
    args = ("--game", "berzerk", *SHORT, *options[method], "--replay-capacity", 40, "--total-steps", 160)
    args += ("--save-every", 20, "--log-every", 1, "--max-episode-steps", 50, "--repeat-action-probability", 0.25)
    args += ("--learning-starts", 60, "--updates-per-step", 0.5, "--exploration-steps", 60, "--seed", 13)
    for folder in (alone := tmp_path / "alone", cut := tmp_path / "cut"):
        folder.mkdir()
    finetune(*args, cwd=alone)

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)  # its handler runs before the next line does
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the same again would end the run at once
        assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL

    for row, step, do in ((15, None, None), (99, 80, None), (127, 127, stop), (159, 140, None)):
        cut_off(row, *args, cwd=cut, do=do)
        assert not [*cut.rglob("*.tmp")] and not (cut / "results").exists()
        if step:
            replay = checkpoint(cut)["replay"]
            assert replay["rows"] == step
        if step == 80:
            fields = replay["fields"].numpy().view(rainbow.TRANSITION)
            assert (fields["ends"] & ~fields["terminal"]).any() and fields["terminal"].any() and fields["reward"].any()
    finetune(*args, cwd=cut)
    assert_same_end(cut, alone)
    assert len(scalars(cut)["losses/loss"]) == 50 and scalars(cut)["charts/episodic_return"][50] > 0
    for name in ("*.bin", "checkpoint.pt"):
        assert not [*tmp_path.rglob(name)]


def start(*args, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "finetune_rainbow.py", *map(str, args)]
    with open(cwd / "log", "w") as log:
        return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.01)


@pytest.mark.slow
def test_signals(tmp_path):
    """A kill; then one signal, which saves; then the same signal twice, which ends the run at once."""
    args = (*NATURE, "--total-steps", 100_000, "--save-every", 50)
    saved = tmp_path / "runs" / "finetune_rainbow__nature__pong__0" / "checkpoint.pt"
    process = start(*args, cwd=tmp_path)
    wait_for(saved, process)
    process.kill()
    process.wait()
    process = start(*args, cwd=tmp_path)
    rows = checkpoint(tmp_path)["replay"]["rows"]
    while checkpoint(tmp_path)["replay"]["rows"] <= rows:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1 and "To go on: the same command" in (tmp_path / "log").read_text()
    rows = checkpoint(tmp_path)["replay"]["rows"]
    process = start(*args, cwd=tmp_path)
    while checkpoint(tmp_path)["replay"]["rows"] <= rows:
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # so that the first signal has not ended it before the second comes
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    assert process.wait(60) in (1, -signal.SIGINT)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_checkpoint_belongs_to_its_arguments_and_frames(tmp_path, capsys):
    """Those that change nothing may change. Without its frames, a checkpoint is of no use."""
    args = (*NATURE, "--replay-dir", "disk")
    cut_off(45, *args, cwd=tmp_path)
    (frames,) = tmp_path.glob("disk/*")
    assert frames.name == "finetune_rainbow__nature__pong__0.bin"
    with pytest.raises(SystemExit, match=r"checkpoint\.pt was made with \{'learning_rate': 0\.0001\}"):
        finetune(*args, "--learning-rate", 0.1, cwd=tmp_path)
    frames.rename(tmp_path / "frames")
    with pytest.raises(SystemExit, match=r"0\.bin is missing.*--overwrite"):
        finetune(*args, cwd=tmp_path)
    (tmp_path / "frames").rename(frames)
    finetune(*args, "--log-every", 40, cwd=tmp_path)
    assert "from step 40 of 120" in capsys.readouterr().out
    assert not frames.exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """An absurd learning rate: the first update is finite and saved, the next one's loss is not."""
    with pytest.raises(SystemExit, match="Loss nan or gradient norm nan is not finite at step 28"):
        finetune(*QUICK, "--learning-rate", 1e30, "--save-every", 9, cwd=tmp_path)
    state = checkpoint(tmp_path)
    assert (state["replay"]["rows"], state["optimizer"][0]["step"]) == (27, 1)
    assert all(x.isfinite().all() for x in state["model"].values())
    assert not (tmp_path / "results").exists()


# === recordings =======================================================================================================
def test_recordings(saved):
    """Of games of 25 steps, 60 steps each: rows and 3 blank ones before every game. The other scripts read them."""
    for number, rows, games, ends in ((1, 69, [0, 28, 56], [27, 55]), (2, 66, [15, 43], [14, 42])):
        content = {name.split("$_")[1].split("_")[0]: column for name, column in recordings(saved, number).items()}
        assert {len(column) for column in content.values()} == {rows}
        assert content["terminal"].nonzero()[0].tolist() == ends
        blank = [first + i for first in games for i in range(3)]
        assert (~content["observation"].any((1, 2))).nonzero()[0].tolist() == blank
        assert set(content["action"]) == {*range(6)}

    bc = load("finetune_bc.py")
    args = bc.Args("pong", data_dir=saved / "data", runs=(0,), checkpoints=(1, 2), cache_dir=saved / "cache")
    shards, source = bc.prepare(args, ["pong"], 50)
    assert source == "rainbow"
    shards = [np.fromfile(path, bc.ROW) for _, path in shards]
    assert [len(shard) for shard in shards] == [3 + 44, 44]  # without padding; the first one begins with an episode


def test_rows_of_recordings_and_their_source(saved, tmp_path):
    """Fewer rows, and one that readers leave out, of the same play. Others' entries in source.json stay."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "source.json").write_text('{"klax": "jat"}')
    finetune(*SAVED, "--save-replay-rows", 20, cwd=tmp_path)
    for number in (1, 2):
        for name, column in recordings(saved, number).items():
            np.testing.assert_array_equal(recordings(tmp_path, number)[name], column[:21])
    assert json.loads((tmp_path / "data" / "source.json").read_text()) == {"klax": "jat", "pong": "rainbow"}
    assert_equal(policy(tmp_path), policy(saved))


@pytest.mark.parametrize("rows", [40, 70])
def test_recordings_of_a_run_that_was_cut_off(rows, saved, tmp_path):
    """Before its first checkpoint, and between two"""
    cut_off(rows, *SAVED, cwd=tmp_path)
    finetune(*SAVED, cwd=tmp_path)
    assert_same_end(tmp_path, saved)


@pytest.mark.parametrize("source", [None, {"pong": "rl_unplugged"}])
def test_recordings_of_others_are_left_alone(source, tmp_path):
    file = tmp_path / "data" / "Pong" / "1" / "replay_logs" / "$store$_action_ckpt.1.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    if source:
        (tmp_path / "data" / "source.json").write_text(json.dumps(source))
    with pytest.raises(SystemExit, match=r"Pong has recordings of another source\. Choose another --save-replay"):
        finetune(*SAVED, cwd=tmp_path)
    assert not (tmp_path / "runs").exists() and not file.stat().st_size


# === bad input ========================================================================================================
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--game", "chess"], "Unknown game 'chess'"),
        (["--encoder", "nature", "--checkpoint", "a.pt"], "--encoder nature is trained from scratch"),
        (["--checkpoint", "a.pt"], r"a\.pt"),
        (["--learning-starts", "10"], "--n-steps < --learning-starts"),
        (["--save-replay", "data"], "--total-steps must be a multiple of --save-replay-every"),
        (
            ["--save-replay", "data", "--save-replay-every", "60", "--replay-capacity", "59"],
            "--replay-capacity at least 60",
        ),
        (["--log-every", "0"], "--log-every must be at least 1"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune(*QUICK, *args, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_torchrun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(rainbow, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit, match="start it without torchrun"):
        finetune(*QUICK, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_as_a_script(tmp_path):
    """From the shell, as a user does it"""
    done = run("finetune_rainbow.py", *QUICK, "--total-steps", 25, "--device", "cpu", cwd=tmp_path)
    assert "results/rainbow/random/pong/seed0.json: " in done.stdout
