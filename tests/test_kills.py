"""Runs that are killed at any moment and started again end as if they had been left alone, bit by bit."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment
from test_pretrain import TORCHRUN, assert_equal, checkpoint, scalars

pytestmark = pytest.mark.slow

EXACT = ("--precision", "fp32", "--log-every", 1)
PLAY = ("--eval-episodes", 2, "--max-episode-steps", 60)
ATC = (*SMALL, *EXACT, "--play-rows", 80, "--games", "pong", "--batch-size", 4, "--eval-every", 3, "--save-every", 1)
ATC += ("--resume", "--total-steps", 6)
BC = ("--game", "pong", *SMALL, *EXACT, *PLAY, "--play-rows", 80, "--batch-size", 16, "--epochs", 3)
LEARN = (*EXACT, "--learning-starts", 20, "--updates-per-step", 0.25, "--batch-size", 8, "--total-steps", 60)
RECORD = ("--data-dir", "data", "--steps-per-checkpoint", 20, "--rows-per-checkpoint", 0, "--replay-capacity", 60)
RECORD += ("--max-episode-steps", 25, "--save-every", 1)
COMMANDS = {  # which, given again, go on or begin again
    "pretrain_atc.py": ATC,
    "finetune_bc.py": BC,
    "finetune_rainbow.py": ("--game", "pong", *SMALL, *PLAY, *LEARN),
    "record_replay.py": ("--game", "pong", *RECORD, *LEARN),
}
STARTED = []  # processes


# === helpers ==========================================================================================================
def begin(folder: Path, *command) -> subprocess.Popen:
    """Starts `python ...` there, as a session of its own; what it prints goes to a file beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "w") as log:
        command, options = [sys.executable, *map(str, command)], dict(stdout=log, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **options)
    STARTED.append(process)
    return process


def printed(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()[-5000:]


def alive(folder: Path) -> dict[int, str]:
    """The processes that run in a folder: {pid: command}"""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # over, or not ours
            if Path(os.readlink(process / "cwd")) == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def wait_until(condition, process: subprocess.Popen, folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended too early: {printed(folder)}"
        assert time.monotonic() < end, f"nothing happened: {printed(folder)}"
        time.sleep(0.005)


def kill(process: subprocess.Popen, folder: Path) -> bool:
    """SIGKILL to all processes of the session, and waits for their end; False if it had ended well just before."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    assert code in (0, -signal.SIGKILL), printed(folder)
    end = time.monotonic() + 120
    while left := alive(folder):
        assert time.monotonic() < end, left
        time.sleep(0.005)
    return code == -signal.SIGKILL


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that failed leaves no run that goes on."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def kill_after(seconds: float, process: subprocess.Popen, folder: Path) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return kill(process, folder)


def kill_at_write(number: int, process: subprocess.Popen, folder: Path) -> bool:
    """Kills as soon as so many files have been seen under a temporary name."""
    seen = set()
    while process.poll() is None and len(seen) < number:
        for path in folder.rglob("*.tmp"):
            with suppress(OSError):
                seen.add((path, path.stat().st_ino))
        time.sleep(0.0002)
    return kill(process, folder)


def files(folder: Path) -> dict[str, Path]:
    """All files by their names, but for TensorBoard's and temporary ones."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("events.")]
    return {str(path.relative_to(folder)): path for path in paths if path.suffix != ".tmp"}


def content(path: Path, folder: Path):
    """What a file holds, read to its end; of a result, all but what says how it was made."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text().replace(str(folder), ""))
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def check_whole(folder: Path, undisturbed: Path) -> None:
    """All files that a killed run left under their final names are complete, and equal to those of an undisturbed run.

    Only checkpoints, and the frames that belong to them, are of an earlier step. Unfinished files are made useless.
    """
    expected = files(undisturbed)
    for name, path in files(folder).items():
        found = content(path, folder)
        if name.startswith(("cache/", "data/", "results/")):
            assert_equal(found, content(expected[name], undisturbed))
    for path in folder.rglob("*.tmp"):
        path.write_bytes(b"not to be read")


def check_equal(folder: Path, undisturbed: Path) -> None:
    """The same files, with the same contents, bit by bit, and the same curves, wherever the run was killed."""
    found, expected = files(folder), files(undisturbed)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_equal(content(found[name], folder), content(expected[name], undisturbed))
    (run_dir,), (other,) = folder.glob("runs/*"), undisturbed.glob("runs/*")
    curves, others = scalars(run_dir), scalars(other)
    assert "losses/loss" in others and curves.keys() == others.keys()
    for name in others:
        if not name.startswith("charts/") or name in ("charts/learning_rate", "charts/episodic_return"):
            assert curves[name] == others[name], name


# === SIGKILL at any moment ============================================================================================
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(script)`: the folder of a run left alone, and the seconds until its first file and until its end."""
    done = {}

    def run_once(script: str) -> tuple[Path, float, float]:
        if script not in done:
            folder, start = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
            process = begin(folder, ROOT / script, *COMMANDS[script])
            wait_until(lambda: any(folder.iterdir()), process, folder)
            first = time.monotonic() - start
            assert process.wait(600) == 0, printed(folder)
            assert not [*folder.rglob("*.tmp")]
            done[script] = folder, first, time.monotonic() - start
        return done[script]

    return run_once


@pytest.mark.parametrize(
    ("script", "half"),
    [
        ("pretrain_atc.py", 0),
        ("pretrain_atc.py", 1),
        ("finetune_bc.py", 0),
        ("finetune_rainbow.py", 0),
        ("record_replay.py", 0),
        ("record_replay.py", 1),
    ],
)
def test_killed_at_ten_moments_and_started_again(script, half, undisturbed, tmp_path):
    """SIGKILL at any moment, or amid a write: files are whole or absent; the same command then ends as if undisturbed.

    The moments are of the time after the libraries' import. A run that ended before its moment is compared, and another
    one begun in an empty folder; before every third start the cache vanishes, unless there is a result.
    """
    other, first, end = undisturbed(script)
    rng = np.random.default_rng([zlib.crc32(script.encode()), half])
    ways = rng.permutation([*["moment"] * 7, *["write"] * 3]).tolist()
    folder, starts = tmp_path / "0", 0
    while ways and starts < 25:  # on a busy machine, too many may end before their moment
        starts += 1
        if starts % 3 == 0 and not (folder / "results").exists():
            shutil.rmtree(folder / "cache", ignore_errors=True)
        process = begin(folder, ROOT / script, *COMMANDS[script])
        if ways[-1] == "moment":
            killed = kill_after(rng.uniform(0.9 * first, 0.95 * end), process, folder)
        else:
            killed = kill_at_write(int(rng.integers(1, 4)), process, folder)
        check_whole(folder, other)
        if killed:
            ways.pop()
        else:
            check_equal(folder, other)
            shutil.rmtree(folder)
            folder = tmp_path / str(starts)
    process = begin(folder, ROOT / script, *COMMANDS[script])
    assert process.wait(600) == 0, printed(folder)
    check_whole(folder, other)
    check_equal(folder, other)


def test_killed_alone(tmp_path):
    """SIGKILL to a script alone, while it plays: it has started nothing that would stay behind."""
    folder = tmp_path / "run"
    process = begin(folder, ROOT / "pretrain_atc.py", *ATC, "--play-rows", 3000)
    wait_until(lambda: (folder / "cache").exists(), process, folder)
    process.kill()
    assert process.wait(120) == -signal.SIGKILL
    time.sleep(0.5)
    assert not alive(folder)


# === one of two processes dies ========================================================================================
TWO = (*TORCHRUN[1:], ROOT / "pretrain_atc.py", *ATC, "--games", "pong", "freeway")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    process = begin(folder, *TWO)
    assert process.wait(600) == 0, printed(folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_dies(rank, two, tmp_path):
    """One process of torchrun's is killed: all end with an error; --resume then ends as if undisturbed."""
    folder = tmp_path / "run"
    process = begin(folder, *TWO)
    run_dir = folder / "runs" / "pretrain_atc__0"
    wait_until((run_dir / "checkpoint.pt").exists, process, folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (one,) = [pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(one), signal.SIGKILL)
    assert process.wait(300) not in (0, -signal.SIGKILL)
    end = time.monotonic() + 300
    while left := alive(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    assert 0 < checkpoint(run_dir)["step"] < 6
    assert "SIGKILL" in printed(folder) or "Signal 9" in printed(folder)
    check_whole(folder, two)

    process = begin(folder, *TWO)
    assert process.wait(600) == 0, printed(folder)
    check_equal(folder, two)
