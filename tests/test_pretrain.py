"""Pre-training as a user runs it: alone, interrupted, on several processes, with wrong arguments and bad numbers."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRETRAINING, QUICK, ROOT, SMALL, Bomb, environment, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONTRAST, ACTION, PIXELS = ["accuracy"], ["accuracy", "majority_accuracy"], ["masked_error"]
METRICS = {"curl": CONTRAST, "atc": CONTRAST, "r3m": CONTRAST, "spr": CONTRAST, "mae": PIXELS, "siammae": PIXELS}
METRICS |= {"bc": ACTION, "idm": ACTION, "dt": ACTION, "spr_idm": ["spr_loss", "idm_loss", *ACTION]}
METRICS["cql"] = ["td_loss", "conservative_loss", "accuracy"]


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


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def start(script: str, *args, cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=environment(), **options)


@pytest.mark.parametrize("script", PRETRAINING)
def test_alone_in_an_empty_folder(script, alone):
    """A copy of the script, and nothing else, plays its data, trains, evaluates, logs and saves."""
    folder, output = alone(script)
    assert "No --data-dir: a smoke test on 100 rows of random play a game" in output
    assert "images/s" in output  # on the progress bar
    assert sorted(path.name for path in folder.iterdir()) == ["cache", script, "runs"]
    run_dir = folder / "runs" / f"{script.removesuffix('.py')}__7"
    assert json.loads((run_dir / "args.json").read_text())["seed"] == 7

    content = checkpoint(run_dir)
    assert content["format"] == "atari-pb/1"
    assert content["objective"] == script.removeprefix("pretrain_").removesuffix(".py")
    assert (content["step"], content["games"]) == (3, ["pong", "freeway"])
    assert content["backbone"]["layer4.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert {"backbone", "neck", "head", "optimizer", "rng", "args"} <= content.keys()
    logged = scalars(run_dir)
    metrics = METRICS[content["objective"]]
    assert {f"{group}/{metric}" for group in ("losses", "eval") for metric in metrics} <= logged.keys()
    assert {"losses/loss", "losses/grad_norm", "eval/loss", "charts/learning_rate", "charts/teraflops"} <= logged.keys()
    assert list(logged["losses/loss"]) == [1, 2, 3]
    assert all(value > 0 for value in logged["charts/images_per_second"].values())
    assert logged["charts/learning_rate"][1] == pytest.approx(0.1 * content["args"]["learning_rate"])


def test_operations_are_counted(tmp_path):
    """ATC's step of the full network is 19.6 GFLOP a sample: 3 x 4.9 for the query, 4.9 for the key, little else."""
    run("pretrain_atc.py", "--total-steps", 1, *QUICK[len(SMALL) :], cwd=tmp_path)
    logged = scalars(tmp_path / "runs" / "pretrain_atc__0")
    operations = 1e12 * logged["charts/teraflops"][1] / logged["charts/images_per_second"][1]
    assert operations == pytest.approx(19.6e9, rel=0.02)


@pytest.mark.parametrize(("objective", "columns"), [("mae", 3), ("siammae", 4)])
def test_pictures(objective, columns, alone):
    """The held-out samples, one below the other: what goes in, the later stack, what is masked, what is made of it."""
    folder, _ = alone(f"pretrain_{objective}.py")
    events = EventAccumulator(str(folder / "runs" / f"pretrain_{objective}__7"), {"images": 0}).Reload()
    (name,) = events.Tags()["images"]
    (event,) = events.Images(name)
    picture = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    assert len(name.removeprefix("eval/").split("_")) == columns
    assert picture.shape[:2] == (2 * 84, columns * 84)  # one sample of each game is held out
    frames = picture[..., 0].reshape(2, 6, 14, columns, 6, 14)
    assert np.ptp(frames[:, :, :, 0]) > 50  # not a blank
    grey = (abs(frames[:, :, :, -2].astype(int) - 127) <= 1).all((2, 4))  # [2, 6, 6], cells masked
    assert (grey.sum((1, 2)) == {"mae": 33, "siammae": 35}[objective]).all()
    seen = np.broadcast_to(~grey[:, :, None, :, None], (2, 6, 14, 6, 14))
    assert (frames[:, :, :, -2] == frames[:, :, :, -3])[seen].all()  # the others are as they were


@pytest.mark.parametrize("script", PRETRAINING)
def test_killed_and_resumed_equals_left_alone(script, tmp_path):
    args = (*QUICK, "--precision", "fp32", "--total-steps", 40, "--eval-every", 20, "--save-every", 10)
    run(script, *args, "--run-name", "alone", cwd=tmp_path)
    killed = tmp_path / "runs" / "killed"
    process = start(script, *args, "--run-name", "killed", cwd=tmp_path)
    wait_for((killed / "checkpoint.pt").exists, process)
    time.sleep(0.1)
    process.kill()
    process.wait()
    assert 0 < checkpoint(killed)["step"] < 40
    run(script, *args, "--run-name", "killed", "--resume", cwd=tmp_path)

    a, b = checkpoint(tmp_path / "runs" / "alone"), checkpoint(killed)
    assert (a["args"].pop("run_name"), b["args"].pop("run_name")) == ("alone", "killed")
    assert b["args"].pop("resume") and not a["args"].pop("resume")
    assert_equal(a, b)
    alone, killed = scalars(tmp_path / "runs" / "alone"), scalars(killed)
    assert len(alone["losses/loss"]) == 40
    for name in ("losses/loss", "losses/grad_norm", "eval/loss"):
        assert alone[name] == killed[name]


@pytest.mark.parametrize("script", PRETRAINING)
def test_two_processes_equal_one(script, tmp_path):
    """Same losses, metrics and gradients (Adam's first mean is a tenth of the first gradient) from the same batch."""
    args = [*map(str, QUICK), "--precision", "fp32", "--total-steps", "1", "--max-grad-norm", "inf"]
    run(script, *args, "--run-name", "one", cwd=tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / script), *args, "--run-name", "two"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]

    one, two = scalars(tmp_path / "runs" / "one"), scalars(tmp_path / "runs" / "two")
    same = [name for name in one if name.startswith(("losses/", "eval/"))]
    assert len(same) >= 3
    for name in same:  # torch's norm of millions of float32 on a CPU depends on the number of threads: 1e-3
        # Adam's first step is one of full length for every parameter, however near to 0 its gradient: evaluation shows.
        tolerance = 1e-4 if name.startswith("losses/") and name != "losses/grad_norm" else 1e-3
        assert two[name][1] == pytest.approx(one[name][1], rel=tolerance, abs=1e-6), name
    one, two = checkpoint(tmp_path / "runs" / "one"), checkpoint(tmp_path / "runs" / "two")
    assert_equal(one.get("action_loss"), two.get("action_loss"))  # what was counted of all processes' samples, as is
    assert_equal(one["neck"].pop("largest_return", None), two["neck"].pop("largest_return", None))  # DT's
    names = [f"{part}.{name}" for part in ("backbone", "neck", "head") for name in one[part]]
    states = [content["optimizer"]["state"] for content in (one, two)]
    assert len(names) == len(states[0]) == len(states[1])
    for i, name in enumerate(names):
        gradient, other = (10 * state[i]["exp_avg"] for state in states)
        # A unit at the edge of its ReLU, in backbone or neck, may fall to either side with the last bit of a sum.
        tolerance = 1e-4 if name.startswith("head") else 2e-2
        assert gradient.norm() > 0, name
        assert (gradient - other).norm() <= tolerance * gradient.norm(), name


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """An absurd learning rate: the first step is finite and saved, the next one's loss is not."""
    args = (*QUICK, "--total-steps", 20, "--save-every", 1, "--learning-rate", 1e20, "--precision", "fp32")
    done = run("pretrain_atc.py", *args, cwd=tmp_path, code=1)
    assert "Stopped at step" in done.stderr and "nan" in done.stderr
    content = checkpoint(tmp_path / "runs" / "pretrain_atc__0")
    step = int(done.stderr.split("Stopped at step ")[1].split(":")[0])
    assert content["step"] == step - 1  # the checkpoint is of just before the bad step
    assert all(x.isfinite().all() for part in ("backbone", "neck", "head") for x in content[part].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(number, tmp_path):
    args = (*QUICK, "--total-steps", 100_000, "--save-every", 100_000)
    process = start("pretrain_atc.py", *args, cwd=tmp_path)
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    wait_for(lambda: list(run_dir.glob("events*")), process)
    time.sleep(1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1 and "To go on: --resume" in output and "Traceback" not in output, output[-3000:]
    step = checkpoint(run_dir)["step"]
    assert f"after step {step}" in output


def test_signal_to_all_processes_of_a_job(tmp_path):
    """As a scheduler sends it, to the workers too."""
    args = (*QUICK, "--total-steps", 100_000, "--num-workers", 2)
    process = start("pretrain_atc.py", *args, cwd=tmp_path, start_new_session=True)
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    wait_for(lambda: list(run_dir.glob("events*")), process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert "To go on: --resume" in output and "Traceback" not in output, output[-3000:]
    assert checkpoint(run_dir)["step"] > 0


def test_signal_to_one_of_two_processes_stops_both(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain_atc.py"), *map(str, QUICK), "--total-steps", "100000"]
    environ = environment(OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run_dir = tmp_path / "runs" / "pretrain_atc__0"
    wait_for(lambda: list(run_dir.glob("events*")), process)
    time.sleep(3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert "To go on: --resume" in output, output[-3000:]
    assert checkpoint(run_dir)["step"] > 0


def test_resuming_on_other_data_is_refused(cache, tmp_path):
    """A forgotten --data-dir does not go on with random play."""
    data = ("--data-dir", cache / "played_1000", "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 150)
    run("pretrain_atc.py", *QUICK, *data, "--total-steps", 2, cwd=tmp_path)
    options = ("--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 150)
    done = run("pretrain_atc.py", *QUICK, *options, "--total-steps", 2, "--resume", cwd=tmp_path, code=1)
    assert "was trained with {'samples': " in done.stderr


def test_an_existing_run_is_kept(tmp_path):
    args = (*QUICK, "--total-steps", 2)
    run("pretrain_atc.py", *args, cwd=tmp_path)
    path = tmp_path / "runs" / "pretrain_atc__0" / "checkpoint.pt"
    before = path.read_bytes()
    done = run("pretrain_atc.py", *args, cwd=tmp_path, code=1)
    assert "runs/pretrain_atc__0 exists" in done.stderr and "--resume" in done.stderr
    done = run("pretrain_atc.py", *args, "--resume", "--learning-rate", 1, cwd=tmp_path, code=1)
    assert "'learning_rate': 0.0003" in done.stderr
    assert path.read_bytes() == before
    run("pretrain_atc.py", *args, "--resume", cwd=tmp_path)  # complete already: nothing is trained
    assert_equal(torch.load(path, weights_only=True)["backbone"], checkpoint(path.parent)["backbone"])
    assert checkpoint(path.parent)["step"] == 2
    run("pretrain_atc.py", *QUICK, "--total-steps", 1, "--overwrite", cwd=tmp_path)
    assert checkpoint(path.parent)["step"] == 1
    path.write_bytes(before[:1000])
    done = run("pretrain_atc.py", *args, "--resume", cwd=tmp_path, code=1)
    assert str(Path("runs/pretrain_atc__0/checkpoint.pt")) in done.stderr and "--overwrite" in done.stderr
    for bad in (("--data-dir", "nowhere"), ("--batch-size", 5000), ("--temperature", 0), ("--resume",)):
        run("pretrain_atc.py", *args, "--overwrite", *bad, cwd=tmp_path, code=1)
        assert path.read_bytes() == before[:1000]  # nothing is deleted for a run that cannot begin

    path.parent.rename(tmp_path / "disk")
    path.parent.symlink_to(tmp_path / "disk")
    run("pretrain_atc.py", *args, "--overwrite", cwd=tmp_path)
    assert checkpoint(path.parent)["step"] == 2 and [*scalars(path.parent)["losses/loss"]] == [1, 2]


def test_a_checkpoint_cannot_run_code(tmp_path):
    run("pretrain_atc.py", *QUICK, "--total-steps", 1, cwd=tmp_path)
    path = tmp_path / "runs" / "pretrain_atc__0" / "checkpoint.pt"
    torch.save(checkpoint(path.parent) | {"extra": Bomb()}, path)
    run("pretrain_atc.py", *QUICK, "--total-steps", 1, "--resume", cwd=tmp_path, code=1)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--no-such-flag"], 2, "no-such-flag"),
        (["--batch-size", "many"], 2, "batch-size"),
        (["--batch-size", "0"], 1, "--batch-size must be at least 1"),
        (["--blocks", "1", "0", "1", "1"], 1, "--blocks"),
        (["--learning-rate", "nan"], 1, "--learning-rate must be at least 0"),
        (["--betas", "1.5", "0.9"], 1, "--betas"),
        (["--device", "nonsense"], 1, "nonsense cannot be used"),
        (["--device", "cuda"], 1, "cuda cannot be used"),
        (["--run-name", ".."], 1, "--run-name"),
        (["--run-name", "../elsewhere", "--overwrite"], 1, "--run-name"),
        (["--runs", "--data-dir", "."], 1, "--runs"),
        (["--cache-dir", "/dev/null"], 1, "cannot be written"),
        (["--games", "pongg"], 1, "Unknown game 'pongg'"),
        (["--batch-size", "5000"], 1, "lower --batch-size"),
        (["--games", "klax", "pong"], 1, "--games klax: far-OOD games"),
        (["--data-dir", "nowhere"], 1, "nowhere/Pong"),
    ],
)
def test_bad_arguments(args, code, message, tmp_path):
    done = run("pretrain_atc.py", *QUICK, "--total-steps", 1, *args, cwd=tmp_path, code=code)
    assert message in done.stderr + done.stdout
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize("script", PRETRAINING)
def test_bad_input_of_every_script(script, cache, tmp_path):
    """A wrong flag, an unknown game and a damaged file each end in a line that names it, before anything is made."""
    shutil.copytree(cache / "played_1000" / "Pong", tmp_path / "data" / "Pong")
    (damaged,) = (tmp_path / "data").rglob("*observation*.gz")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    data = ("--data-dir", tmp_path / "data", "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 150)
    for args, code, message in [
        (["--no-such-flag"], 2, "no-such-flag"),
        (["--games", "pongg"], 1, "Unknown game 'pongg'"),
        (["--games", "pong", *data], 1, f"{damaged} cannot be used"),
    ]:
        done = run(script, *QUICK, "--total-steps", 1, *args, cwd=tmp_path, code=code)
        assert message in done.stderr + done.stdout
        assert not (tmp_path / "runs").exists()


def test_game_names(tmp_path):
    """ALE's and the data set's spelling are the same game."""
    run("pretrain_atc.py", *QUICK, "--total-steps", 1, "--games", "MsPacman", "up_n_down", "UpNDown", cwd=tmp_path)
    assert checkpoint(tmp_path / "runs" / "pretrain_atc__0")["games"] == ["ms_pacman", "up_n_down"]
