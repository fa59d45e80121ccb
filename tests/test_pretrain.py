"""Pre-training as a user runs it: alone, interrupted, on several processes, with wrong arguments and bad numbers."""

import fcntl
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import GAMES, PRETRAINING, QUICK, ROOT, Bomb, environment, float64, load, run, train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

ACCURACY, PIXELS = ["accuracy"], ["masked_error"]
METRICS = {"curl": ACCURACY, "atc": ACCURACY, "r3m": ACCURACY, "spr": ACCURACY, "mae": PIXELS, "siammae": PIXELS}
METRICS |= {"bc": ACCURACY, "idm": ACCURACY, "dt": ACCURACY, "spr_idm": ["spr_loss", "idm_loss", "accuracy"]}
METRICS["cql"] = ["td_loss", "conservative_loss", "accuracy"]
CLOCK = {"charts/SPS"}  # what differs between two equal runs
DQN_REPLAY_GAMES = load("pretrain_atc.py").DQN_REPLAY_GAMES
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: {name: {step: value}}"""
    events = EventAccumulator(str(run_dir)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def assert_equal(a, b) -> None:
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    """The same checkpoint, bit by bit, and the same curves, but for the arguments that may change."""
    one, other = checkpoint(a), checkpoint(b)
    for name in ("run_name", "resume", "overwrite", "data_dir", "cache_dir"):
        one["args"].pop(name), other["args"].pop(name)
    assert_equal(one, other)
    one, other = scalars(a), scalars(b)
    assert one.keys() == other.keys() and "eval/loss" in one
    for name in one.keys() - CLOCK:
        assert one[name] == other[name], name


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def start(script: str, *args, cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment()} | options
    return subprocess.Popen(command, cwd=cwd, **options)


@pytest.fixture(scope="session")
def played(tmp_path_factory) -> Path:
    """A --cache-dir with 100 played rows of two games."""
    folder = tmp_path_factory.mktemp("played")
    atc = load("pretrain_atc.py")
    atc.prepare(atc.Args(cache_dir=folder, play_rows=100), ("pong", "freeway"), 1)
    return folder


# === alone ============================================================================================================
@pytest.mark.parametrize("script", PRETRAINING)
def test_alone_in_an_empty_folder(script, alone):
    """A copy of the script, and nothing else, plays its data, trains, evaluates, logs and saves."""
    folder, output = alone(script)
    assert "No --data-dir: this is a smoke test on 100 rows of random play a game." in output
    assert "samples/s" in output  # on the progress bar
    assert sorted(path.name for path in folder.iterdir()) == ["cache", script, "runs"]
    run_dir = folder / "runs" / f"{script.removesuffix('.py')}__7"
    (events,) = run_dir.glob("events*")
    assert {*run_dir.iterdir()} == {run_dir / "args.json", run_dir / "checkpoint.pt", events}
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["seed"], args["data"], args["samples"]) == (7, "random_play", args["samples"])

    content = checkpoint(run_dir)  # plain types and tensors alone: it is read with weights_only
    assert content["format"] == "atari-pb/1" and content["args"] == args
    assert content["objective"] == script.removeprefix("pretrain_").removesuffix(".py")
    assert (content["step"], content["games"]) == (3, ["pong", "freeway"])
    module = load(script)
    objective = module.Objective(module.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1)))
    parts = dict(objective.named_children())
    assert {"backbone", "neck", "head"} <= parts.keys() <= {"backbone", "neck", "head", "target"}
    assert content.keys() == {"format", "objective", "step", "args", "games", "optimizer", *parts}
    for name, part in parts.items():
        part.load_state_dict(content[name])  # all names, and no prefixes
        assert all(value.isfinite().all() for key, value in content[name].items() if key != "largest_return")
    assert set(content["backbone"]) < set(torchvision.models.resnet50().state_dict())
    assert content["backbone"]["layer4.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert content["optimizer"]["state"][0]["step"] == 3

    logged = scalars(run_dir)
    metrics = METRICS[content["objective"]]
    groups = {f"{group}/{metric}" for group in ("losses", "eval") for metric in ["loss", *metrics]}
    assert logged.keys() == groups | {"losses/grad_norm", "charts/learning_rate", "charts/SPS"}
    assert list(logged["losses/loss"]) == [1, 2, 3] and list(logged["eval/loss"]) == [3]
    assert all(value > 0 for value in logged["charts/SPS"].values())
    assert logged["charts/learning_rate"][1] == pytest.approx(0.1 * content["args"]["learning_rate"])


@pytest.mark.parametrize(("objective", "columns"), [("mae", 3), ("siammae", 4)])
def test_pictures(objective, columns, alone):
    """The held-out samples, one below the other: what goes in, the later stack, what is masked, what is made of it."""
    folder, _ = alone(f"pretrain_{objective}.py")
    events = EventAccumulator(str(folder / "runs" / f"pretrain_{objective}__7"), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["eval/picture"]
    (event,) = events.Images("eval/picture")
    picture = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape[:2] == (2 * 84, columns * 84)  # one sample of each game is held out
    frames = picture[..., 0].reshape(2, 6, 14, columns, 6, 14)
    assert np.ptp(frames[:, :, :, 0]) > 50  # not a blank
    grey = (abs(frames[:, :, :, -2].astype(int) - 127) <= 1).all((2, 4))  # [2, 6, 6], cells masked
    assert (grey.sum((1, 2)) == {"mae": 33, "siammae": 35}[objective]).all()
    seen = np.broadcast_to(~grey[:, :, None, :, None], (2, 6, 14, 6, 14))
    assert (frames[:, :, :, -2] == frames[:, :, :, -3])[seen].all()  # the others are as they were


FAST = (*QUICK, "--width-multiplier", 0.0625, "--batch-size", 4)


# === seeds ============================================================================================================
def draws(module, *args, cwd: Path) -> dict[str, torch.Tensor]:
    """What a run's first step draws at random, on the same samples whatever the seed."""
    seen = {}

    def spy(patch, place, name: str, **notes) -> None:
        """Notes what the function's arguments and result hold, the first time."""
        function = getattr(place, name)

        def spied(*args):
            result = function(*args)
            for key, note in notes.items():
                seen.setdefault(key, note(args, result))
            return np.arange(len(result)) if name == "choose" else result

        patch.setattr(place, name, spied)

    with pytest.MonkeyPatch.context() as patch:
        spy(patch, module.Windows, "choose", order=lambda args, result: torch.from_numpy(result))
        spy(patch, module.Objective, "loss", weight=lambda args, result: args[0].backbone.conv1.weight.detach().clone())
        spy(patch, module, "augment", views=lambda args, result: result)
        if hasattr(module, "random_masking"):
            spy(patch, module, "random_masking", masks=lambda args, result: result[1])
        if hasattr(module.Objective, "pairs"):
            spy(patch, module.Objective, "pairs", futures=lambda args, result: result[1])
        train(module.__name__ + ".py", *args, cwd=cwd)
    return seen


@pytest.mark.parametrize("script", PRETRAINING)
def test_seeds_reach_what_they_say(script, played, tmp_path):
    """Another seed has another initialisation, order, augmentation, masks and offsets; the same seed has the same."""
    args = (*FAST, "--batch-size", 16, "--total-steps", 1, "--cache-dir", played, "--run-name")
    one = draws(load(script), *args, "one", "--seed", 1, cwd=tmp_path)
    same = draws(load(script), *args, "same", "--seed", 1, cwd=tmp_path)
    other = draws(load(script), *args, "other", "--seed", 2, cwd=tmp_path)
    masks = {"pretrain_mae.py": ["masks"], "pretrain_siammae.py": ["masks", "futures"]}.get(script, [])
    assert sorted(one) == sorted(["order", "weight", "views", *masks])
    for name in one:
        assert torch.equal(one[name], same[name]), name
        assert not torch.equal(one[name], other[name]), name


# === interrupted ======================================================================================================
EXACT = (*FAST, "--precision", "fp32", "--total-steps", 6, "--eval-every", 3, "--save-every", 2)


class Killed(BaseException):
    """What ends a run at once."""


def interrupt(module, monkeypatch, step: int, how) -> None:
    """Calls `how` as that step begins."""
    multiplier = module.lr_multiplier

    def lr_multiplier(now: int, total_steps: int) -> float:
        if now == step:
            how()
        return multiplier(now, total_steps)

    monkeypatch.setattr(module, "lr_multiplier", lr_multiplier)


def die() -> None:
    raise Killed


@pytest.mark.parametrize("script", PRETRAINING)
def test_interrupted_and_resumed_equals_left_alone(script, played, tmp_path, monkeypatch):
    """Bit by bit: killed at a step (back to the last checkpoint), then stopped by SIGTERM, each time resumed."""
    args = (*EXACT, "--cache-dir", played)
    train(script, *args, "--run-name", "alone", cwd=tmp_path)
    run_dir = tmp_path / "runs" / "cut"
    with monkeypatch.context() as patch:
        interrupt(load(script), patch, 3, die)
        with pytest.raises(Killed):
            train(script, *args, "--run-name", "cut", cwd=tmp_path)
    assert checkpoint(run_dir)["step"] == 2
    with monkeypatch.context() as patch:
        interrupt(load(script), patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit, match=r"^Stopped by a signal\. To go on: --resume$"):
            train(script, *args, "--run-name", "cut", "--resume", "--num-workers", 1, cwd=tmp_path)
    assert checkpoint(run_dir)["step"] == 5  # the step is done
    train(script, *args, "--run-name", "cut", "--resume", "--num-workers", 4, cwd=tmp_path)
    assert_same_run(run_dir, tmp_path / "runs" / "alone")
    assert list(scalars(run_dir)["losses/loss"]) == [*range(1, 7)]


def test_resume_in_bf16_is_exact(played, tmp_path, monkeypatch):
    args = (*EXACT, "--precision", "bf16", "--cache-dir", played)
    train("pretrain_atc.py", *args, "--run-name", "alone", cwd=tmp_path)
    with monkeypatch.context() as patch:
        interrupt(load("pretrain_atc.py"), patch, 4, die)
        with pytest.raises(Killed):
            train("pretrain_atc.py", *args, "--run-name", "cut", cwd=tmp_path)
    train("pretrain_atc.py", *args, "--run-name", "cut", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "cut", tmp_path / "runs" / "alone")


@pytest.mark.parametrize("script", ["pretrain_atc.py", pytest.param("pretrain_dt.py", marks=pytest.mark.slow)])
def test_sigkill_and_resume(script, played, tmp_path):
    """A real process and a real SIGKILL, after the first checkpoint."""
    args = (*QUICK, "--precision", "fp32", "--total-steps", 30, "--save-every", 10, "--cache-dir", played)
    train(script, *args, "--run-name", "alone", cwd=tmp_path, games=DQN_REPLAY_GAMES)
    killed = tmp_path / "runs" / "killed"
    process = start(script, *args, "--run-name", "killed", cwd=tmp_path)
    wait_for((killed / "checkpoint.pt").exists, process)
    process.kill()
    process.wait()
    assert 0 < checkpoint(killed)["step"] < 30
    train(script, *args, "--run-name", "killed", "--resume", cwd=tmp_path, games=DQN_REPLAY_GAMES)
    assert_same_run(killed, tmp_path / "runs" / "alone")


LONG = (*QUICK, "--total-steps", 1_000_000, "--save-every", 1_000_000)


def handles_sigterm(process: subprocess.Popen) -> bool:
    """Whether it has a handler of its own for SIGTERM: from its first step on, until it is told to stop."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_saves_and_ends(number, played, tmp_path):
    """As a scheduler sends it, to all processes of the job. There is one: no workers, no shared memory, no sockets.

    It arrives twice, as torchrun forwards what the terminal has sent already.
    """
    long = tmp_path / ("temporary" * 12)  # no socket could have such a name
    long.mkdir()
    options = dict(cwd=tmp_path, start_new_session=True, env=environment(TMPDIR=str(long)))
    process = start("pretrain_atc.py", *LONG, "--cache-dir", played, **options)
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    wait_for(lambda: handles_sigterm(process), process)
    time.sleep(1)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert not re.findall(r"/dev/shm/(?!sem\.).*", maps)  # a semaphore is tqdm's, which does without it
    assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    assert not [*long.iterdir()]
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 1 and "Traceback" not in output, output[-3000:]
    assert output.rstrip().endswith("Stopped by a signal. To go on: --resume")
    step = checkpoint(run_dir)["step"]
    assert step > 0 and f"checkpoint.pt: {step} of 1000000 steps done" in output


def test_nohup_is_respected(played, tmp_path):
    """A signal that is ignored as the run begins stays so: it goes on when its terminal is closed."""
    nohup = dict(cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process = start("pretrain_atc.py", *LONG, "--cache-dir", played, **nohup)
    wait_for(lambda: handles_sigterm(process), process)
    time.sleep(1)
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1


def test_signal_to_one_of_two_processes_stops_both(played, tmp_path):
    """Soon, however seldom the run logs: torchrun kills what still runs after 30 seconds."""
    seldom = ("--log-every", 1_000_000, "--save-every", 5)
    command = [*TORCHRUN, str(ROOT / "pretrain_atc.py"), *map(str, (*LONG, *seldom)), "--cache-dir", str(played)]
    options = dict(env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, cwd=tmp_path, **options)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    wait_for((run_dir / "checkpoint.pt").exists, process)  # it trains
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    output = process.communicate(timeout=300)[0].decode()
    assert "Stopped by a signal. To go on: --resume" in output, output[-3000:]
    assert checkpoint(run_dir)["step"] % 20 == 0


# === on two processes =================================================================================================
DRIVER = """
import sys
import torch.distributed as dist
from conftest import GAMES, float64, load
init = dist.init_process_group
# Once for all scripts.
dist.init_process_group = lambda *backend, **options: dist.is_initialized() or init(*backend, **options)
dist.destroy_process_group = lambda: None
for script in sys.argv[1].split(","):
    module = load(script)
    assert module.WORLD_SIZE == 2
    module.DQN_REPLAY_GAMES = sorted(GAMES)
    with float64(module):
        module.train(module.tyro.cli(module.Args, args=sys.argv[2:]))
"""
TOGETHER = (*QUICK, "--precision", "fp32", "--total-steps", 1, "--max-grad-norm", "inf", "--cache-dir")


@pytest.fixture(scope="session")
def two(played, tmp_path_factory) -> Path:
    """A folder with a run of each script on two processes, of one step; made once for all of pytest's workers."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "two"
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "a+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            (folder / "driver.py").write_text(DRIVER)
            command = [
                *TORCHRUN,
                "driver.py",
                ",".join(PRETRAINING),
                "--device",
                "cpu",
                *map(str, TOGETHER),
                str(played),
            ]
            env = environment(PYTHONPATH=str(ROOT / "tests"))
            code = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
            assert code == 0, (folder / "log").read_text()[-5000:]
            (folder / "done").touch()
    return folder / "runs"


@pytest.mark.parametrize("script", PRETRAINING)
def test_two_processes_equal_one(script, played, two, tmp_path):
    """Same losses, metrics and gradients (Adam's first mean is a tenth of the first gradient) from the same batch."""
    with float64(load(script)):
        train(script, *TOGETHER, played, cwd=tmp_path)
    one_dir, two_dir = (runs / f"{script.removesuffix('.py')}__0" for runs in (tmp_path / "runs", two))
    one, two = scalars(one_dir), scalars(two_dir)
    same = [name for name in one if name.startswith(("losses/", "eval/"))]
    assert len(same) >= 3
    for name in same:  # TensorBoard has them in float32
        assert two[name][1] == pytest.approx(one[name][1], rel=1e-6), name
    one, two = checkpoint(one_dir), checkpoint(two_dir)
    assert_equal(one["neck"].pop("largest_return", None), two["neck"].pop("largest_return", None))  # DT's
    names = [f"{part}.{name}" for part in ("backbone", "neck", "head") for name in one[part]]
    states = [content["optimizer"]["state"] for content in (one, two)]
    assert len(names) == len(states[0]) == len(states[1])
    for i, name in enumerate(names):
        gradient, other = (10 * state[i]["exp_avg"] for state in states)
        assert gradient.dtype == torch.float64 and gradient.norm() > 0, name
        assert (gradient - other).norm() <= 1e-10 * gradient.norm(), name


STARTS = """
import os
from conftest import GAMES, load
atc = load("pretrain_atc.py")
os.makedirs(f"machine{atc.RANK}", exist_ok=True)
os.chdir(f"machine{atc.RANK}")
atc.train(atc.tyro.cli(atc.Args))
"""


def test_processes_that_would_start_at_different_steps(played, tmp_path):
    """Two machines without a common disk, of which one has the checkpoint: a line, instead of replicas that differ.

    Other data on one of them is told in the same way.
    """
    args = (*FAST, "--total-steps", 2, "--cache-dir", played)
    (tmp_path / "machine0").mkdir()
    train("pretrain_atc.py", *args, "--device", "cpu", cwd=tmp_path / "machine0", games=DQN_REPLAY_GAMES)
    before = (tmp_path / "machine0" / "runs" / "pretrain_atc__0" / "checkpoint.pt").read_bytes()
    (tmp_path / "driver.py").write_text(STARTS)
    command = [*TORCHRUN, "driver.py", *map(str, args), "--resume", "--device", "cpu"]
    options = dict(cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT / "tests")), capture_output=True, text=True)
    done = subprocess.run(command, timeout=600, **options)
    assert done.returncode != 0
    message = r"Processes differ in what they have found: \[\{'step': 2, 'samples': .*\{'step': 0, 'samples': "
    assert re.search(message, done.stderr), done.stderr[-3000:]
    assert (tmp_path / "machine0" / "runs" / "pretrain_atc__0" / "checkpoint.pt").read_bytes() == before


# === numbers that are none, other norms ===============================================================================
@pytest.mark.parametrize("script", ["pretrain_atc.py", "pretrain_cql.py"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(script, played, tmp_path):
    """An absurd learning rate: the first step is finite and saved, the next one's loss is not."""
    args = (*FAST, "--total-steps", 20, "--save-every", 1, "--learning-rate", 1e20, "--precision", "fp32")
    with pytest.raises(SystemExit, match=r"not finite at step \d+: .*nan.*Last good: runs/\w+/checkpoint.pt") as end:
        train(script, *args, "--cache-dir", played, cwd=tmp_path)
    content = checkpoint(tmp_path / "runs" / f"{script.removesuffix('.py')}__0")
    assert content["step"] == int(re.search(r"step (\d+)", end.value.code)[1]) - 1  # of just before the bad step
    assert all(x.isfinite().all() for part in ("backbone", "neck", "head") for x in content[part].values())


def test_nan_weight_in_a_checkpoint_to_go_on_from(played, tmp_path):
    """The run stops at the next step, and no other checkpoint is written."""
    args = (*EXACT, "--cache-dir", played)
    train("pretrain_atc.py", *args, cwd=tmp_path)
    path = tmp_path / "runs" / "pretrain_atc__0" / "checkpoint.pt"
    content = checkpoint(path.parent) | {"step": 4}
    content["backbone"]["layer1.0.conv1.weight"].view(-1)[3] = math.nan
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="not finite at step 5"):
        train("pretrain_atc.py", *args, "--resume", cwd=tmp_path)
    assert path.read_bytes() == before


def test_batch_norm_is_evaluated_in_evaluation_mode(played, tmp_path, monkeypatch):
    """With BatchNorm in place of Norm: running statistics are used; training mode comes back; resume is exact."""
    bc = load("pretrain_bc.py")
    monkeypatch.setattr(bc, "Norm", nn.BatchNorm2d)
    monkeypatch.setattr(bc, "DQN_REPLAY_GAMES", sorted(GAMES))
    modes, forward = [], bc.Objective.forward

    def spied(self, batch):
        modes.append((self.training, self.backbone.bn1.training, torch.is_grad_enabled()))
        return forward(self, batch)

    monkeypatch.setattr(bc.Objective, "forward", spied)
    args = (*FAST, "--precision", "fp32", "--total-steps", 6, "--eval-every", 3, "--save-every", 3)
    train("pretrain_bc.py", *args, "--cache-dir", played, "--run-name", "alone", cwd=tmp_path)
    assert modes == 2 * [*[(True,) * 3] * 3, (False,) * 3]  # 2 held-out samples are one batch
    run_dir = tmp_path / "runs" / "alone"
    content, logged = checkpoint(run_dir), scalars(run_dir)["eval/loss"][6]

    parsed = bc.Args(width_multiplier=0.0625, blocks=(1, 1, 1, 1), cache_dir=played, play_rows=100)
    shards, _ = bc.prepare(parsed, ["pong", "freeway"], 1)
    objective = bc.Objective(parsed).to(memory_format=torch.channels_last)
    for name, part in objective.named_children():
        part.load_state_dict(content[name])
    losses = {}
    for mode in (False, True):  # in this order, as training mode changes the statistics
        objective.train(mode)
        torch.manual_seed(0)
        with torch.no_grad():
            data = bc.Windows(shards, objective.length, 4, 0, "held_out")
            losses[mode] = objective(bc.unpack(*data.batch(0), "cpu"))[0].item()
    assert logged == pytest.approx(losses[False], rel=1e-5)
    assert logged != pytest.approx(losses[True], rel=1e-2)

    with monkeypatch.context() as patch:
        interrupt(bc, patch, 4, die)
        with pytest.raises(Killed):
            train("pretrain_bc.py", *args, "--cache-dir", played, "--run-name", "cut", cwd=tmp_path)
    train("pretrain_bc.py", *args, "--cache-dir", played, "--run-name", "cut", "--resume", cwd=tmp_path)
    assert_same_run(tmp_path / "runs" / "cut", run_dir)


# === runs that exist, and what may not change =========================================================================
def test_an_existing_run_is_kept(played, tmp_path):
    args = (*FAST, "--total-steps", 2, "--cache-dir", played)
    train("pretrain_atc.py", *args, cwd=tmp_path)
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    path = run_dir / "checkpoint.pt"
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"^runs/pretrain_atc__0 exists. Choose --resume to continue it, --overwrite"):
        train("pretrain_atc.py", *args, cwd=tmp_path)
    with pytest.raises(SystemExit, match=r"choose one of the two"):
        train("pretrain_atc.py", *args, "--resume", "--overwrite", cwd=tmp_path)
    assert path.read_bytes() == before
    train("pretrain_atc.py", *args, "--resume", cwd=tmp_path)  # complete already: nothing is trained
    assert path.read_bytes() == before and [*scalars(run_dir)["losses/loss"]] == [1, 2]
    for bad in (("--data-dir", "nowhere"), ("--batch-size", 5000), ("--games", "pongg"), ("--blocks", 0, 1, 1, 1)):
        with pytest.raises(SystemExit):
            train("pretrain_atc.py", *args, "--overwrite", *bad, cwd=tmp_path)
        assert path.read_bytes() == before and [*run_dir.glob("events*")]  # nothing goes for a run that cannot begin
    train("pretrain_atc.py", *args, "--total-steps", 1, "--overwrite", cwd=tmp_path)
    assert checkpoint(run_dir)["step"] == 1 and [*scalars(run_dir)["losses/loss"]] == [1]
    train("pretrain_atc.py", *args, "--resume", "--run-name", "new", cwd=tmp_path)  # nothing is there: it begins
    assert checkpoint(tmp_path / "runs" / "new")["step"] == 2

    run_dir.rename(tmp_path / "disk")  # a run's folder may be a link
    run_dir.symlink_to(tmp_path / "disk")
    train("pretrain_atc.py", *args, "--overwrite", cwd=tmp_path)
    assert checkpoint(run_dir)["step"] == 2 and [*scalars(run_dir)["losses/loss"]] == [1, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--learning-rate", 1], "{'learning_rate': 0.0003}"),
        (["--total-steps", 9], "{'total_steps': 2}"),
        (["--games", "freeway", "pong"], "{'games': ['pong', 'freeway']}"),
        (["--seed", 1, "--run-name", "pretrain_atc__0"], "{'seed': 0}"),
        (["--precision", "bf16"], "{'precision': 'auto'}"),
        (["--play-rows", 150], "{'play_rows': 100, 'samples': "),
        (["--save-every", 1, "--num-workers", 2, "--log-every", 5, "--eval-every", 1, "--cache-dir", "other"], None),
    ],
)
def test_arguments_of_a_resumed_run(changed, message, played, trained, tmp_path):
    """Those that change what is learned must stay; the others may change."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    args = ("pretrain_atc.py", *FAST, "--total-steps", 2, "--cache-dir", played, "--resume", *changed)
    if message is None:
        train(*args, cwd=tmp_path)
        return
    with pytest.raises(SystemExit) as end:
        train(*args, cwd=tmp_path)
    assert f"checkpoint.pt was trained with {message}" in end.value.code


@pytest.fixture(scope="session")
def trained(played, tmp_path_factory) -> Path:
    """The folder of a finished pre-training of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    train("pretrain_atc.py", *FAST, "--total-steps", 2, "--cache-dir", played, cwd=folder)
    return folder


def test_resuming_on_other_data_is_refused(replay, played, tmp_path):
    """A forgotten --data-dir does not go on with random play, nor does other data with the same number of rows."""
    files = ("--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 100, "--cache-dir", played)
    args = ("pretrain_atc.py", *FAST, *files, "--total-steps", 2)
    train(*args, "--data-dir", replay, cwd=tmp_path)
    with pytest.raises(SystemExit, match=r"was trained with .*'data': 'dqn_replay'"):
        train(*args, "--resume", cwd=tmp_path)
    train(*args, "--data-dir", os.path.relpath(replay, tmp_path), "--resume", cwd=tmp_path)  # the same, in other words


def test_a_checkpoint_cannot_run_code(played, trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "pretrain_atc__0" / "checkpoint.pt"
    torch.save(checkpoint(path.parent) | {"extra": Bomb()}, path)
    with pytest.raises(pickle.UnpicklingError):
        train("pretrain_atc.py", *FAST, "--total-steps", 2, "--cache-dir", played, "--resume", cwd=tmp_path)
    assert not (tmp_path / "exploded").exists()


# === what users get wrong =============================================================================================
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-size", 0], "--batch-size must be at least 1."),
        (["--total-steps", 0], "--total-steps must be at least 1."),
        (["--num-workers", 0], "--num-workers must be at least 1."),
        (["--blocks", 1, 0, 1, 1], "--width-multiplier must be a multiple of 1/16, and each of --blocks at least 1."),
        (["--width-multiplier", 0.3], "--width-multiplier must be a multiple of 1/16"),
        (["--width-multiplier", 0], "--width-multiplier must be a multiple of 1/16"),
        (
            ["--runs", "--data-dir", "."],
            "There must be at least one of --runs, one of --checkpoints and one row to read of each.",
        ),
        (
            ["--checkpoints", "--data-dir", "."],
            "There must be at least one of --runs, one of --checkpoints and one row to read of each.",
        ),
        (["--games", "pong", "tetris"], "Unknown game 'tetris'. Choose from: breakout "),
        (["--games", "klax", "pong"], "Unknown game 'klax'. Choose from: "),  # of far-OOD games nothing is learned
        (["--batch-size", 5000], "use more rows or lower --batch-size."),
        (["--play-rows", 4], "Too few train samples of"),
        (["--data-dir", "nowhere"], "nowhere/Pong lacks files of run 1, checkpoint 1. Where to get them: docs/data.md"),
    ],
)
def test_bad_arguments(args, message, tmp_path):
    """One line that says what to do, before there is a run."""
    with pytest.raises(SystemExit) as end:
        train("pretrain_atc.py", *QUICK, "--total-steps", 1, *args, cwd=tmp_path)
    assert message in end.value.code and "\n" not in end.value.code
    assert not [*tmp_path.glob("runs/*/*")]


@pytest.mark.parametrize("script", PRETRAINING)
def test_bad_input_of_every_script(script, replay, tmp_path):
    """An unknown game, a damaged replay file and a batch that is too large each end in a line that names it."""
    shutil.copytree(replay / "Pong", tmp_path / "data" / "Pong")
    (damaged,) = (tmp_path / "data").rglob("*observation*.gz")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    data = ("--data-dir", "data", "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 150)
    for args, message in [
        (["--games", "pongg"], "Unknown game 'pongg'"),
        (["--games", "othello"], "Unknown game 'othello'"),
        (["--games", "pong", *data], f"{damaged.relative_to(tmp_path)} cannot be read"),
        (["--batch-size", 5000], "lower --batch-size"),
    ]:
        with pytest.raises(SystemExit, match=re.escape(message)):
            train(script, *QUICK, "--total-steps", 1, *args, cwd=tmp_path)
        assert not [*tmp_path.glob("runs/*/*")]


def test_bad_flags_as_a_user_meets_them(tmp_path):
    """By the command line: exit codes, one line, no traceback."""
    done = run("pretrain_atc.py", "--no-such-flag", cwd=tmp_path, code=2)
    assert "no-such-flag" in done.stderr + done.stdout
    done = run("pretrain_atc.py", *QUICK, "--games", "pongg", cwd=tmp_path, code=1)
    assert done.stderr.startswith("Unknown game 'pongg'. Choose from: ") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_batch_that_processes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setattr(load("pretrain_atc.py"), "WORLD_SIZE", 3)
    with pytest.raises(SystemExit, match=r"--batch-size 8 is not a multiple of 3 processes\."):
        train("pretrain_atc.py", *QUICK, "--total-steps", 1, cwd=tmp_path)


def test_harmless_variables_of_another_launcher(monkeypatch, played, tmp_path):
    """A single task of it is a single process; --help works whatever they are."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "abc", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    train("pretrain_atc.py", *FAST, "--total-steps", 1, "--cache-dir", played, cwd=tmp_path)
    done = run("pretrain_atc.py", "--help", cwd=tmp_path, RANK="abc", WORLD_SIZE="many", LOCAL_RANK="-1")
    assert "--future-offset" in done.stdout and "augmented temporal contrast" in done.stdout


def test_a_place_that_cannot_be_written_is_an_error_before_training(played, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(NotADirectoryError, match="runs/pretrain_atc__0"):
        train("pretrain_atc.py", *FAST, "--total-steps", 1, "--cache-dir", played, cwd=tmp_path)
    (tmp_path / "runs").unlink()
    with pytest.raises(FileNotFoundError, match="/proc/cache"):
        train("pretrain_atc.py", *FAST, "--total-steps", 1, "--cache-dir", "/proc/cache", cwd=tmp_path)


def test_without_a_compiler(played, tmp_path):
    """A line that says so, before anything is made."""
    args = (*FAST, "--total-steps", 1, "--cache-dir", played, "--compile")
    done = run("pretrain_atc.py", *args, cwd=tmp_path, code=1, PATH="/nowhere")
    message = "torch.compile needs a compiler, and there is none: install gcc and g++, or use --no-compile.\n"
    assert done.stderr == message
    assert not [*tmp_path.iterdir()]


def test_first_line_and_the_progress_in_a_file(played, tmp_path):
    """Device and precision come first. In a file, the bar is a line every 30 seconds, and one at the end."""
    for precision, name in {"fp32": "float32", "bf16": "bfloat16"}.items():
        args = (*FAST, "--total-steps", 30, "--cache-dir", played, "--precision", precision, "--overwrite")
        done = run("pretrain_atc.py", *args, cwd=tmp_path)
        assert done.stdout.startswith(f"Device: cpu, precision: {name}\n")
        lines = [line for line in re.split(r"[\r\n]+", done.stderr) if "step" in line]
        assert len(lines) <= 3 and "30/30" in lines[-1] and "samples/s" in lines[-1], done.stderr


def test_game_names(played, tmp_path):
    """ALE's and the data set's spelling are the same game."""
    names = ("--games", "Pong", "freeway", "FREEWAY")
    train("pretrain_atc.py", *FAST, "--total-steps", 1, "--cache-dir", played, *names, cwd=tmp_path)
    assert checkpoint(tmp_path / "runs" / "pretrain_atc__0")["games"] == ["pong", "freeway"]
