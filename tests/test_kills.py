"""Faults: runs killed at any moment and started again, a process of two that dies, numbers that are none."""

import gzip
import json
import os
import re
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
from conftest import ROOT, SMALL, environment, load, run
from test_pretrain import assert_equal, checkpoint, scalars

DATA = ("--play-rows", 80, "--num-workers", 1)
EXACT = ("--precision", "fp32", "--log-every", 1)
PLAY = ("--eval-episodes", 2, "--max-episode-steps", 60)
ATC = (*SMALL, *DATA, *EXACT, "--games", "pong", "--batch-size", 4, "--eval-every", 3, "--save-every", 1, "--resume")
BC = ("--game", "pong", *SMALL, *DATA, *EXACT, *PLAY, "--batch-size", 16)
RAINBOW = ("--game", "pong", *SMALL, *EXACT, *PLAY, "--learning-starts", 20, "--updates-per-step", 0.25)
RAINBOW += ("--batch-size", 8, "--replay-capacity", 60, "--save-every", 1, "--total-steps", 60)
COMMANDS = {  # which, given again, go on or begin again
    "pretrain_atc.py": (*ATC, "--total-steps", 6),
    "finetune_bc.py": (*BC, "--epochs", 3),
    "finetune_rainbow.py": (*RAINBOW, "--save-replay", "data", "--save-replay-every", 20),
}
FRAMES = (60 + 3 + 1) * 84 * 84  # bytes of Rainbow's: its capacity, the history, and what comes until it is saved
CLOCK = {"charts/images_per_second", "charts/teraflops", "charts/updates_per_second"}
TEMPORARY = ".*.tmp"
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
        try:
            if Path(os.readlink(process / "cwd")) == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # over, or not ours
            continue
    return found


def wait_until(condition, process: subprocess.Popen, folder: Path, seconds: float = 60) -> None:
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
    end = time.monotonic() + 10
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
    """Kills as soon as so many files have been seen to be begun under a temporary name."""
    known = seen = frozenset(folder.rglob(TEMPORARY))
    while process.poll() is None and len(seen - known) < number:
        for part in ("cache", "runs", "results", "data"):
            seen |= {Path(top, name) for top, _, names in os.walk(folder / part) for name in names if name[0] == "."}
        time.sleep(0.0002)
    return kill(process, folder)


def files(folder: Path) -> dict[str, Path]:
    """Of all files by their final names, apart from TensorBoard's; a shard's name without the key of its origin."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("events.", ".lock"))]
    names = {path: str(path.relative_to(folder)) for path in paths if not path.match(TEMPORARY)}
    assert len(names) == len({re.sub(r"_[0-9a-f]{8}\.npy$", ".npy", name) for name in names.values()}), names
    return {re.sub(r"_[0-9a-f]{8}\.npy$", ".npy", name): path for path, name in names.items()}


def content(path: Path, folder: Path):
    """What a file holds, read to its end."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text().replace(str(folder), ""))
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    assert path.suffix == ".npy", path
    return path.read_bytes()


def check_whole(folder: Path, undisturbed: Path) -> int:
    """All files that a killed run left under their final names are complete; the others are made useless, and counted.

    Of what does not change as a run goes on, played data, shards, saved replays and results: equal to undisturbed ones.
    """
    expected = files(undisturbed)
    for name, path in files(folder).items():
        if path.name == "frames.bin":
            assert path.stat().st_size == FRAMES
            continue
        found = content(path, folder)
        if path.suffix in (".gz", ".npy") or name.startswith("results"):
            assert found == content(expected[name], undisturbed), name
        elif path.name == "checkpoint.pt":
            assert found["step"] >= 0
    left = [*folder.rglob(TEMPORARY)]
    for path in left:
        path.write_bytes(b"not to be read")
    return len(left)


def check_equal(folder: Path, undisturbed: Path) -> None:
    """The same files, with the same contents, bit by bit, and the same curves, wherever the run was killed."""
    found, expected = files(folder), files(undisturbed)
    assert found.keys() == expected.keys()
    assert not [*folder.glob(f"runs/*/{TEMPORARY}")]
    for name in expected:
        assert_equal(content(found[name], folder), content(expected[name], undisturbed))
    (run_dir,), (other,) = folder.glob("runs/*"), undisturbed.glob("runs/*")
    curves, others = scalars(run_dir), scalars(other)
    assert "losses/loss" in others and curves.keys() == others.keys()
    for name in others.keys() - CLOCK:
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
            assert process.wait(120) == 0, printed(folder)
            assert not [*folder.rglob(TEMPORARY)]
            done[script] = folder, first, time.monotonic() - start
        return done[script]

    return run_once


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("script", COMMANDS)
def test_killed_at_ten_moments_and_started_again(script, half, undisturbed, tmp_path):
    """SIGKILL at any moment, or amid a write: files are whole or absent; the same command then ends as if undisturbed.

    The moments are of the time after the libraries' import. A run that ended before its moment is compared, and another
    one begun in an empty folder; before every third start the played data vanishes, unless there is a result.
    """
    other, first, end = undisturbed(script)
    rng = np.random.default_rng([zlib.crc32(script.encode()), half])
    ways = rng.permutation([*["moment"] * 7, *["write"] * 3]).tolist()
    folder, starts, temporary = tmp_path / "0", 0, 0
    while ways:
        starts += 1
        assert starts <= 25, "too many runs end before their moment"
        if starts % 3 == 0 and not (folder / "results").exists():
            shutil.rmtree(folder / "cache", ignore_errors=True)
        most = 2 if (folder / "cache").exists() else 4  # files to be begun that can be seen in time
        process = begin(folder, ROOT / script, *COMMANDS[script])
        if ways[-1] == "moment":
            killed = kill_after(rng.uniform(0.9 * first, 0.95 * end), process, folder)
        else:
            killed = kill_at_write(int(rng.integers(1, most + 1)), process, folder)
        temporary += check_whole(folder, other)
        if killed:
            ways.pop()
        else:
            check_equal(folder, other)
            shutil.rmtree(folder)
            folder = tmp_path / str(starts)
    process = begin(folder, ROOT / script, *COMMANDS[script])
    assert process.wait(120) == 0, printed(folder)
    check_whole(folder, other)
    check_equal(folder, other)
    print(f"{script}: {starts} starts, {temporary} temporary files were left by those that were killed")


def test_killed_between_the_result_and_the_end(undisturbed, tmp_path):
    """SIGKILL after Rainbow's result is written, before it tidies up: the same command does, without playing."""
    other, *_ = undisturbed("finetune_rainbow.py")
    folder = tmp_path / "run"
    process = begin(folder, ROOT / "finetune_rainbow.py", *COMMANDS["finetune_rainbow.py"])
    wait_until(lambda: [*folder.glob("runs/*/policy.pt")], process, folder)  # it evaluates
    assert kill(process, folder), "it was too fast"
    shutil.copytree(other / "results", folder / "results", dirs_exist_ok=True)
    assert [*folder.glob("runs/*/checkpoint.pt")] and [*folder.glob("runs/*/frames.bin")]
    process = begin(folder, ROOT / "finetune_rainbow.py", *COMMANDS["finetune_rainbow.py"])
    assert process.wait(120) == 0 and "is there already" in printed(folder)
    assert not [*folder.glob("runs/*/checkpoint.pt")] and not [*folder.glob("runs/*/frames.bin")]


@pytest.mark.parametrize(("what", "seconds"), [("playing", 0), ("playing", 1), ("preparing", 0)])
def test_killed_alone(what, seconds, tmp_path):
    """SIGKILL to a script alone, not to what it may have started, while it plays or prepares: nothing stays behind."""
    folder = tmp_path / "run"
    process = begin(folder, ROOT / "pretrain_atc.py", *ATC, "--play-rows", 3000, "--total-steps", 1)
    wait_until(lambda: what in printed(folder), process, folder)
    time.sleep(seconds)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL and not [*folder.glob("runs/*/checkpoint.pt")]
    time.sleep(0.5)
    assert not alive(folder)


@pytest.mark.parametrize("script", ["pretrain_atc.py", "finetune_bc.py"])
def test_two_runs_of_one_name(script, tmp_path):
    """The same command twice at the same moment, by mistake: one ends with a line, the other as if it were alone."""
    folder, other = tmp_path / "run", tmp_path / "other"
    command = [ROOT / script, *(value for value in COMMANDS[script] if value != "--resume")]
    assert begin(other, *command).wait(120) == 0, printed(other)
    one = begin(folder, *command)
    folder.with_suffix(".log").rename(tmp_path / "one.log")
    two = begin(folder, *command)
    codes, text = [one.wait(120), two.wait(120)], (tmp_path / "one.log").read_text() + printed(folder)
    if "is there already" not in text:  # a fine-tuning may have ended before the other looks for its result
        assert sorted(codes) == [0, 1] and re.search("is in use by another process|exists. Go on with", text), text
    check_equal(folder, other)


# === one of two processes dies ========================================================================================
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
TWO += (ROOT / "pretrain_atc.py", *ATC, "--games", "pong", "freeway", "--total-steps", 6)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    process = begin(folder, *TWO)
    assert process.wait(180) == 0, printed(folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_dies(rank, two, tmp_path):
    """One process of torchrun's is killed: all end with an error within a minute; --resume ends as if undisturbed."""
    folder = tmp_path / "run"
    process = begin(folder, *TWO)
    run_dir = folder / "runs" / "pretrain_atc__0"
    wait_until((run_dir / "checkpoint.pt").exists, process, folder)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (one,) = [pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(int(one), signal.SIGKILL)
    end = time.monotonic() + 60
    assert process.wait(60) not in (0, -signal.SIGKILL)
    while left := alive(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    assert 0 < checkpoint(run_dir)["step"] < 6
    assert "SIGKILL" in printed(folder) or "Signal 9" in printed(folder)
    check_whole(folder, two)

    process = begin(folder, *TWO)
    assert process.wait(120) == 0, printed(folder)
    check_equal(folder, two)


FAILING = """
import sys
sys.path.insert(0, {tests!r})
from conftest import load
module = load({script!r})
def fail(step, total):
    if step == 2:
        raise RuntimeError("as of a device")
    return 1.0
module.lr_multiplier = fail
small = dict(width_multiplier=0.125, blocks=(1, 1, 1, 1), play_rows=80, batch_size=4, num_workers=1)
if {script!r} == "finetune_bc.py":
    module.finetune(module.Args(game="pong", **small))
else:
    module.train(module.Args(games=("pong",), **small))
"""


@pytest.mark.parametrize("script", ["pretrain_atc.py", "finetune_bc.py"])
def test_an_error_that_was_not_foreseen(script, tmp_path):
    """An error of the device or of a process far away, amid training: all ends at once, the loader's workers, too."""
    folder = tmp_path / "run"
    process = begin(folder, "-c", FAILING.format(tests=str(ROOT / "tests"), script=script))
    end = time.monotonic() + 60
    while "RuntimeError: as of a device" not in printed(folder):
        assert time.monotonic() < end, printed(folder)
        time.sleep(0.05)
    assert process.wait(15) == 1
    assert not alive(folder)


# === numbers that are none ============================================================================================
ODD = [np.nan, np.inf, -np.inf, 0.5, -200.0, -0.0]  # rewards
SIGNS = [0, 1, -1, 1, -1, 0]


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A --data-dir whose rewards are the odd ones, over and over; its second half is of a second episode."""
    folder = tmp_path_factory.mktemp("odd")
    module = load("pretrain_atc.py")
    module.play_game(folder, 200, "pong")
    paths = module.replay_layouts(folder, "pong", 1, 1)[0]
    total = len(content(paths[3], folder)) - 128  # an .npy of bytes, and its header
    terminal = np.zeros(total, np.uint8)
    terminal[total // 2] = 1
    reward = np.resize(np.float32(ODD), total)
    reward[:3] = 0  # padding
    for path, column in zip(paths[2:], (reward, terminal), strict=True):
        with gzip.open(path, "wb") as stream:
            np.save(stream, column)
    return folder


def prepared(module, odd: Path, cache: Path) -> list[tuple[int, Path]]:
    return [(0, module.prepare_shard(cache, odd, 190, "pong", 1, 1))]


@pytest.mark.parametrize("script", ["pretrain_cql.py", "pretrain_dt.py", "eval_probe.py"])  # which use rewards
def test_odd_rewards_of_a_replay(script, odd, tmp_path):
    """NaN and infinite rewards in a replay file: they count as 0, 1 and -1, and every return-to-go is finite."""
    module = load(script)
    ((_, path),) = prepared(module, odd, tmp_path)
    fields = np.load(path)["fields"][3:]  # without the blank rows in front
    first = 3  # the file begins with padding, which is left out
    signs = np.resize(SIGNS, 1000)
    total = len(content(module.replay_layouts(odd, "pong", 1, 1)[0][3], odd)) - 128
    assert fields["reward"].tolist() == signs[first:190].tolist()
    assert np.isfinite(fields["return_to_go"]).all()
    ends = [total // 2 if i <= total // 2 else total - 2 for i in range(first, 190)]
    assert fields["return_to_go"].tolist() == [signs[i : end + 1].sum() for i, end in enumerate(ends, first)]


@pytest.mark.parametrize(
    ("script", "options"),
    [("pretrain_cql.py", {"loss": "distributional"}), ("pretrain_cql.py", {"loss": "mse"}), ("pretrain_dt.py", {})],
)
def test_odd_rewards_in_an_objective(script, options, odd, tmp_path):
    """NaN and infinite rewards in the data of an objective that learns from them: its loss and gradient are finite."""
    module = load(script)
    torch.manual_seed(0)
    objective = module.Objective(module.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1), **options))
    data = module.Windows(prepared(module, odd, tmp_path), objective.length, 32, 0, "train")
    batch = data[0]
    assert len(np.unique(batch["reward"])) == 3 and batch["terminal"].any()
    loss, metrics = objective(module.on_device(batch, torch.device("cpu")))
    loss.backward()
    assert all(value.isfinite() for value in (loss, *metrics.values()))
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    if script == "pretrain_dt.py":
        assert objective.neck.largest_return[0].isfinite()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """The folder of a pre-training of one step, a weight of whose backbone is NaN."""
    folder = tmp_path_factory.mktemp("poisoned")
    run("pretrain_atc.py", *ATC, "--total-steps", 1, "--run-name", "poisoned", cwd=folder)
    path = folder / "runs" / "poisoned" / "checkpoint.pt"
    saved = checkpoint(path.parent)
    saved["backbone"]["layer1.0.conv1.weight"].view(-1)[3] = float("nan")
    saved["args"]["total_steps"] = 6
    torch.save(saved, path)
    return folder


def last_line(done: subprocess.CompletedProcess) -> str:
    return re.split(r"[\r\n]+", done.stderr.strip())[-1]


def test_nan_weight_in_a_checkpoint_to_go_on_from(poisoned, tmp_path):
    """A NaN among a checkpoint's weights, to --resume: stops at the next step; no other checkpoint is written."""
    shutil.copytree(poisoned, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "poisoned" / "checkpoint.pt"
    before = path.read_bytes()
    done = run("pretrain_atc.py", *ATC, "--total-steps", 6, "--run-name", "poisoned", cwd=tmp_path, code=1)
    assert "Stopped at step 2: loss nan" in last_line(done)
    assert path.read_bytes() == before


@pytest.mark.parametrize("script", ["finetune_bc.py", "finetune_rainbow.py"])
def test_nan_weight_in_a_checkpoint_to_fine_tune(script, poisoned, tmp_path):
    """A NaN among a checkpoint's weights, to be fine-tuned: stops with a line, and there is no result."""
    options = {"finetune_bc.py": (*BC, "--epochs", 1), "finetune_rainbow.py": RAINBOW}[script]
    path = poisoned / "runs" / "poisoned" / "checkpoint.pt"
    done = run(script, *options, "--checkpoint", path, cwd=tmp_path, code=1)
    assert re.search(r"not finite before step 1:|Stopped at step 24: loss nan", last_line(done)), last_line(done)
    assert not [*tmp_path.glob("results/**/*.json")] and not [*tmp_path.glob("runs/*/policy.pt")]


def test_absurd_learning_rate_of_behaviour_cloning(tmp_path):
    """A learning rate that makes the loss NaN: behaviour cloning stops with a line, and there is no result."""
    done = run("finetune_bc.py", *BC, "--epochs", 2, "--learning-rate", 1e18, cwd=tmp_path, code=1)
    assert "Loss or gradient norm is not finite before step" in last_line(done)
    assert "lower --learning-rate?" in last_line(done)
    assert not [*tmp_path.glob("results/**/*.json")] and not [*tmp_path.glob("runs/*/policy.pt")]
