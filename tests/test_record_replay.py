"""Recording as a user runs it: what is written, runs that are cut off in every way and continued, and bad input."""

import contextlib
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIELDS, ROOT, environment, load
from test_finetune_rainbow import KilledError, assert_seeds_decide, cut_off, folder_of, scalars

recorder = load("record_replay.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SHORT = ("--learning-starts", 20, "--updates-per-step", 0.25, "--batch-size", 8, "--exploration-steps", 500)
SHORT += ("--log-every", 10, "--max-episode-steps", 25, "--rows-per-checkpoint", 0, "--seed", 0)
SAVED = ("--game", "pong", "--data-dir", "data", *SHORT, "--replay-capacity", 60, "--save-every", 200)
SAVED += ("--total-steps", 120, "--steps-per-checkpoint", 60)


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process leaves the signals' handlers as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def record(*args, cwd: Path) -> None:
    """Runs the script in this process."""
    defaults = ["--device", "cpu", "--no-compile"]
    with contextlib.chdir(cwd):
        recorder.main(recorder.tyro.cli(recorder.Args, args=[*defaults, *map(str, args)]))


def cut(row: int, *args, cwd: Path, do=None) -> None:
    cut_off(recorder, row, lambda: record(*args, cwd=cwd), do)


def checkpoint(cwd: Path) -> dict:
    return torch.load(folder_of(cwd) / "checkpoint.pt", weights_only=True)


def recordings(cwd: Path) -> dict[str, np.ndarray]:
    content = {}
    for path in cwd.glob("data/*/*/replay_logs/*.gz"):
        with gzip.open(path) as stream:
            content[path.name] = np.load(stream)
    assert len(content) == 8
    return content


def assert_same_end(one: Path, other: Path) -> None:
    """Curves and recordings are equal, bit by bit; nothing else is left."""
    curves, others = scalars(one), scalars(other)
    assert curves.keys() == others.keys() and "losses/loss" in curves
    for name in curves.keys() - {"charts/SPS"}:
        assert curves[name] == others[name], name
    columns, expected = recordings(one), recordings(other)
    assert columns.keys() == expected.keys()
    for name, column in columns.items():
        np.testing.assert_array_equal(column, expected[name])
    left = {path.name for path in folder_of(one).iterdir() if not path.name.startswith("events")}
    assert left == {"args.json"}  # the checkpoint and the frames are gone


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run that was left alone"""
    folder = tmp_path_factory.mktemp("saved")
    record(*SAVED, cwd=folder)
    return folder


# === recordings =======================================================================================================
def test_recordings(saved):
    """Of games of 25 steps, 60 steps each: rows and 3 blank ones before every game. The other scripts read them."""
    for number, rows, games, ends in ((1, 69, [0, 28, 56], [27, 55]), (2, 66, [15, 43], [14, 42])):
        files = recordings(saved)
        content = {name: files[f"$store$_{name}_ckpt.{number}.gz"] for name in FIELDS}
        assert {len(column) for column in content.values()} == {rows}
        assert content["terminal"].nonzero()[0].tolist() == ends
        blank = [first + i for first in games for i in range(3)]
        assert (~content["observation"].any((1, 2))).nonzero()[0].tolist() == blank
        assert set(content["action"]) == {*range(6)}

    assert (saved / "data" / "Pong" / "source.txt").read_text() == "rainbow\n"
    bc = load("finetune_bc.py")
    args = bc.Args("pong", data_dir=saved / "data", runs=(0,), checkpoints=(1, 2), cache_dir=saved / "cache")
    shards, source = bc.prepare(args, ["pong"], 50)
    assert source == "rainbow"
    shards = [np.fromfile(path, bc.ROW) for _, path in shards]
    assert [len(shard) for shard in shards] == [3 + 44, 44]  # without padding; the first one begins with an episode


def test_fewer_rows(saved, tmp_path, capsys):
    """The first rows of the same play, and one that readers leave out. The run ends as soon as it has the last ones."""
    record(*SAVED, "--rows-per-checkpoint", 20, cwd=tmp_path)
    found = recordings(tmp_path)
    for name, column in recordings(saved).items():
        np.testing.assert_array_equal(found[name], column[:21])
    logged = scalars(tmp_path)
    assert list(logged["losses/loss"]) == [30, 40, 50, 60, 70, 80]
    assert logged["losses/loss"][80] == scalars(saved)["losses/loss"][80]
    printed = capsys.readouterr().out
    assert printed.startswith("Device: cpu, precision: float32\n")
    assert "replay_logs: checkpoint 2, 21 rows, 0 games, mean return -" in printed


def test_what_is_printed_of_the_games(tmp_path, capsys):
    """Whole games, and the mean of their returns."""
    args = recorder.Args("pong", tmp_path, steps_per_checkpoint=100, rows_per_checkpoint=0, replay_capacity=100)
    replay = recorder.Replay(args)
    lengths, rewards = (30, 20, 30, 20, 100), (7, 1, 4, 9, 9)
    for length, reward in zip(lengths, rewards, strict=True):
        for i in range(length):
            last = i == length - 1
            replay.add(np.zeros((84, 84)), 0, reward if last else 0, i == 0, last, last)
            if number := recorder.record(args, replay, tmp_path):
                assert (number, replay.rows) in ((1, 100), (2, 200))
    assert ["3 games, mean return 4.00" in line for line in capsys.readouterr().out.splitlines()] == [True, False]


def test_seeds(tmp_path):
    """Initialisation, environments, exploration, replay and augmentation follow the seed, and it alone."""

    def call(seed: int, number: int) -> None:
        record(*SAVED, "--seed", seed, "--data-dir", f"data{number}", cwd=tmp_path)

    assert_seeds_decide(recorder, call)


def test_what_is_complete_is_kept_until_overwrite(saved, tmp_path, capsys):
    record(*SAVED, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    record(*SAVED, cwd=tmp_path)
    assert "replay_logs is complete. To record it again: --overwrite" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"replay_logs has recordings of another run\. Choose another --seed"):
        record(*SAVED, "--total-steps", 180, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    cut(70, *SAVED, "--overwrite", cwd=tmp_path)  # from then on, the old recordings do not count
    assert len([*tmp_path.rglob("*.gz")]) == 4 and checkpoint(tmp_path)["replay"]["rows"] == 60
    record(*SAVED, cwd=tmp_path)
    assert_same_end(tmp_path, saved)


@pytest.mark.parametrize("source", [None, "rl_unplugged\n"])
def test_recordings_of_others_are_left_alone(source, tmp_path):
    file = tmp_path / "data" / "Pong" / "1" / "replay_logs" / "$store$_action_ckpt.1.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    if source:
        (tmp_path / "data" / "Pong" / "source.txt").write_text(source)
    with pytest.raises(SystemExit, match=r"Pong has recordings of another source\. Choose another --data-dir"):
        record(*SAVED, "--overwrite", cwd=tmp_path)
    assert not (tmp_path / "runs").exists() and not file.stat().st_size


# === cut off and continued ============================================================================================
def test_cut_off_and_continued_equals_left_alone(tmp_path):
    """Ended in any way between checkpoints, in a replay of 63 slots: by a kill, by a signal, and by one more kill.

    Sticky actions, and episodes that end by a lost life or by the game's time: all goes on in the middle.
    """
    args = ("--game", "berzerk", "--data-dir", "data", *SHORT, "--replay-capacity", 40, "--total-steps", 160)
    args += ("--save-every", 20, "--log-every", 1, "--max-episode-steps", 50, "--repeat-action-probability", 0.25)
    args += ("--learning-starts", 60, "--updates-per-step", 0.5, "--exploration-steps", 60, "--seed", 13)
    args += ("--steps-per-checkpoint", 80, "--rows-per-checkpoint", 30)
    for folder in (alone := tmp_path / "alone", killed := tmp_path / "cut"):
        folder.mkdir()
    record(*args, cwd=alone)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # its handler runs before the next line does

    for row, step, do in ((15, 0, None), (99, 80, None), (103, 103, stop), (109, 103, None)):
        cut(row, *args, cwd=killed, do=do)
        assert not [*killed.rglob("*.tmp")]
        replay = checkpoint(killed)["replay"]
        assert replay["rows"] == step
        if step == 80:
            rows = replay["transitions"].numpy().view(recorder.TRANSITION)
            assert (rows["life_over"] & ~rows["game_over"]).any() and rows["game_over"].any() and rows["reward"].any()
    record(*args, cwd=killed)
    assert_same_end(killed, alone)
    assert len(scalars(killed)["losses/loss"]) == 25 and scalars(killed)["charts/episodic_return"][50] > 0


@pytest.mark.parametrize("rows", [40, 70])
def test_recordings_of_a_run_that_was_cut_off(rows, saved, tmp_path):
    """Before its first replay checkpoint, and between two"""
    cut(rows, *SAVED, cwd=tmp_path)
    record(*SAVED, cwd=tmp_path)
    assert_same_end(tmp_path, saved)


def test_killed_after_the_last_recording(saved, tmp_path):
    """Before it deletes what is of no more use, and amid that: the same command does it."""
    for left in ({"checkpoint.pt", "frames.bin"}, {"frames.bin"}):

        def unlink(path: Path, missing_ok: bool = False, unlink=Path.unlink, left=left) -> None:
            if path.name in left and not missing_ok:
                raise KilledError
            unlink(path, missing_ok)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorder.Path, "unlink", unlink)
            with pytest.raises(KilledError):
                record(*SAVED, cwd=tmp_path)
        assert {path.name for path in folder_of(tmp_path).iterdir()} >= left
        record(*SAVED, cwd=tmp_path)
        assert_same_end(tmp_path, saved)
        for path in tmp_path.rglob("*.gz"):
            path.unlink()


def test_a_checkpoint_belongs_to_its_arguments(tmp_path, capsys):
    """Those that change nothing may change."""
    args = (*SAVED, "--save-every", 40)
    cut(45, *args, cwd=tmp_path)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt was made with \{'learning_rate': 0\.0001\}"):
        record(*args, "--learning-rate", 0.1, cwd=tmp_path)
    record(*args, "--log-every", 40, cwd=tmp_path)
    assert "from step 40 of 120" in capsys.readouterr().out


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """An absurd learning rate: the first update is finite and saved, the next one's loss is not."""
    with pytest.raises(SystemExit, match="Loss nan or gradient norm nan is not finite at step 28"):
        record(*SAVED, "--learning-rate", 1e30, "--save-every", 9, cwd=tmp_path)
    state = checkpoint(tmp_path)
    assert (state["replay"]["rows"], state["optimizer"][0]["step"]) == (27, 1)
    assert all(x.isfinite().all() for x in state["model"].values())


# === signals ==========================================================================================================
def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stops = recorder.catch_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stops


@pytest.mark.slow
def test_signals(tmp_path):
    """A kill; then each signal, sent twice as launchers do, which saves and ends the run."""
    args = (*SAVED, "--total-steps", 120_000, "--save-every", 50, "--learning-rate", 1e-4)
    command = [sys.executable, ROOT / "record_replay.py", *map(str, args), "--device", "cpu", "--no-compile"]

    def start() -> subprocess.Popen:
        with open(tmp_path / "log", "w") as log:
            return subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)

    def wait_for_rows(least: int, process: subprocess.Popen) -> None:
        """Until the run has begun or gone on, and has written a checkpoint of so many rows."""
        path = tmp_path / "runs" / "record_replay__pong__0" / "checkpoint.pt"
        while not path.exists() or checkpoint(tmp_path)["replay"]["rows"] < least:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)

    process, rows = start(), 50
    wait_for_rows(rows, process)
    process.kill()
    process.wait()
    for number in SIGNALS:
        process = start()
        wait_for_rows(rows + 50, process)
        for _ in range(2):
            process.send_signal(number)
        assert process.wait(60) == 1 and "To go on: the same command" in (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        rows = checkpoint(tmp_path)["replay"]["rows"]


# === bad input ========================================================================================================
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--game", "chess"], "Unknown game 'chess'"),
        (["--n-steps", "20"], "--n-steps < --learning-starts"),
        (["--learning-starts", "120"], "--learning-starts < --total-steps"),
        (["--replay-capacity", "10"], "--n-steps < --replay-capacity"),
        (["--steps-per-checkpoint", "50"], "--total-steps must be a multiple of --steps-per-checkpoint"),
        (["--replay-capacity", "59"], "--replay-capacity at least 60"),
        (["--rows-per-checkpoint", "40", "--replay-capacity", "39"], "--replay-capacity at least 40"),
        (["--save-every", "0"], "--save-every must be at least 1"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        record(*SAVED, *args, cwd=tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["runs", "data"])
def test_a_folder_that_cannot_be_made_ends_the_run_before_it_begins(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("a file in its place")
    monkeypatch.setattr(recorder, "Environment", None)
    with pytest.raises(NotADirectoryError, match=name):
        record(*SAVED, cwd=tmp_path)
