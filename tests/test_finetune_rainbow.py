"""Rainbow as a user runs it: its results and saved replays, cut off in every way and continued, and bad input."""

import gzip
import json
import re
import resource
import signal
from functools import partial
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
import torch
from conftest import SMALL, load, run
from PIL import Image
from test_pretrain import assert_equal, checkpoint, scalars, start, wait_for

rainbow = load("finetune_rainbow.py")
SCRIPT = "finetune_rainbow.py"
SHORT = ("--learning-starts", 20, "--updates-per-step", 0.25, "--batch-size", 8, "--replay-capacity", 60)
SHORT += ("--log-every", 10, "--eval-episodes", 2, "--max-episode-steps", 40, "--precision", "fp32")
QUICK = ("--game", "pong", *SMALL, *SHORT, "--total-steps", 60)
NATURE = ("--game", "pong", "--encoder", "nature", *SHORT, "--total-steps", 120, "--save-every", 40)
SAVED = (*NATURE, "--max-episode-steps", 25, "--save-every", 200, "--save-replay", "data", "--save-replay-every", 60)
FIELDS = ("observation", "action", "reward", "terminal")


@pytest.fixture(scope="module")
def pretrained(alone) -> Path:
    return alone("pretrain_atc.py")[0] / "runs" / "pretrain_atc__7" / "checkpoint.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run that was left alone and saved its replay as two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    run(SCRIPT, *SAVED, cwd=folder)
    return folder


def start_limited(size: int, *args, cwd: Path) -> Popen:
    """A run on a disk that takes no file larger than `size` bytes."""
    limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return start(SCRIPT, *args, cwd=cwd, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit))


def fails(process: Popen, message: str) -> None:
    """The run ends with exit code 1 and that message, which is all that is said."""
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1 and message in output and "Traceback" not in output, output[-3000:]


def cut_off(number: int, step: int, *args, cwd: Path) -> Popen:
    """Starts a run, and sends it that signal once its progress bar has come to `step`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_MININTERVAL", "0")  # every step is shown
        process = start(SCRIPT, *args, cwd=cwd)
    shown = b""
    while not any(int(n) >= step for n in re.findall(rb" (\d+)/\d+ \[[^\r]*step/s", shown[-1000:])):
        shown += (new := process.stdout.read1())
        assert new, f"the run ended too early: {shown[-3000:].decode()}"
    process.send_signal(number)
    return process


def kill(step: int, *args, cwd: Path) -> None:
    cut_off(signal.SIGKILL, step, *args, cwd=cwd).communicate(timeout=120)


def result(folder: Path, method: str) -> dict:
    (path,) = folder.glob(f"results/rainbow/{method}/*/*.json")
    return json.loads(path.read_text())


def policy(folder: Path) -> dict:
    (path,) = folder.glob("runs/*/policy.pt")
    return torch.load(path, weights_only=True)


def replay(folder: Path, number: int, game: str = "Pong") -> dict[str, torch.Tensor]:
    """A replay checkpoint as numpy reads it. No other file is there."""
    logs = folder / "data" / game / "0" / "replay_logs"
    files = {f"$store$_{field}_ckpt.{i}.gz" for field in FIELDS for i in (1, 2)}
    assert {path.name for path in logs.glob("[!.]*")} == files | {"run.json"}
    content = {}
    for field in FIELDS:
        with gzip.open(logs / f"$store$_{field}_ckpt.{number}.gz") as file:
            content[field] = torch.from_numpy(np.load(file))
    return content


def test_from_a_checkpoint(pretrained, tmp_path):
    done = run(SCRIPT, *QUICK, "--checkpoint", pretrained, "--exploration-steps", 20, "--video", cwd=tmp_path)
    assert "pong: atc, seed 0, from step 0 of 60" in done.stdout and "results/rainbow/atc/pong/seed0" in done.stdout
    found = result(tmp_path, "atc")
    identity = {key: found[key] for key in ("suite", "method", "game", "split", "seed", "checkpoint")}
    expected = {"suite": "rainbow", "method": "atc", "game": "pong", "split": "near_ood", "seed": 0}
    assert identity == expected | {"checkpoint": str(pretrained)}
    assert len(found["episode_scores"]) == 2
    assert found["score"] == np.mean(found["episode_scores"])
    assert found["normalized_score"] == pytest.approx((found["score"] + 20.7) / (16.61 + 20.7), rel=1e-6)
    assert found["args"]["total_steps"] == 60
    assert found["versions"]["torch"] == torch.__version__

    run_dir = tmp_path / "runs" / "finetune_rainbow__atc__pong__0"
    left = {path.name for path in run_dir.glob("[!.]*") if not path.name.startswith("events")}
    assert left == {"args.json", "policy.pt", "episode.gif"}  # the checkpoint and the frames are gone
    logged = scalars(run_dir)
    losses = {f"losses/{name}" for name in ("loss", "grad_norm", "q", "target_q")}
    assert losses | {"charts/episode_length", "eval/score"} <= logged.keys()
    assert list(logged["losses/loss"]) == [30, 40, 50, 60]
    assert list(logged["charts/episode_return"]) == [40]  # the second game was not over
    epsilon = [1 - 0.99 * 9 / 20, 1 - 0.99 * 19 / 20, 0.01, 0.01]
    assert list(logged["charts/epsilon"].values()) == pytest.approx(epsilon)
    beta = [0.4 + 0.6 * update / 10 for update in (1, 4, 6, 9)]  # of the last of as many updates, and one, so far
    assert list(logged["charts/importance_exponent"].values()) == pytest.approx(beta)
    assert all(value > 0 for value in logged["charts/updates_per_second"].values())
    assert logged["eval/score"] == {60: found["score"]}

    assert policy(tmp_path).keys() == {"neck", "head"}
    assert policy(tmp_path)["head"]["weight"].shape == (1, 512, 6 * 51)
    with Image.open(run_dir / "episode.gif") as video:
        assert 1 < video.n_frames <= 40
        assert video.size == (252, 252)
    done = run("eval_iqm.py", cwd=tmp_path)
    assert "rainbow" in done.stdout and "atc" in done.stdout


def test_baseline_learned_from_scratch(tmp_path):
    """With what the benchmark leaves out of Rainbow, too. All of the network is learned, and saved."""
    run(SCRIPT, *QUICK, "--no-freeze-backbone", "--dueling", "--noisy", cwd=tmp_path)
    assert result(tmp_path, "e2e")["checkpoint"] is None
    learned = policy(tmp_path)
    assert learned.keys() == {"backbone", "neck", "head", "value"}
    assert learned["head"]["weight_sigma"].shape == (6 * 51, 512) and learned["value"]["bias"].shape == (51,)
    torch.manual_seed(0)
    initial = rainbow.ResNet(0.125, (1, 1, 1, 1)).state_dict()
    assert learned["backbone"].keys() == initial.keys()
    assert not any(torch.equal(x, initial[name]) for name, x in learned["backbone"].items())


@pytest.mark.parametrize("method", ["random", "nature"])
def test_cut_off_and_continued_equals_left_alone(method, tmp_path):
    """Killed late before a checkpoint, in a replay of 63 slots; with one in RAM, out of disk and by a signal besides.

    Sticky actions, and episodes that end by a lost life or by the game's time: all goes on in the middle.
    """
    options = {"random": SMALL, "nature": ("--encoder", "nature", "--noisy", "--dueling", "--replay-dir", "disk")}
    args = ("--game", "berzerk", *SHORT, *options[method], "--replay-capacity", 40, "--total-steps", 160)
    args += ("--save-every", 20, "--log-every", 1, "--max-episode-steps", 50, "--repeat-action-probability", 0.25)
    args += ("--learning-starts", 60, "--updates-per-step", 0.5, "--exploration-steps", 60, "--seed", 98)
    for folder in (alone := tmp_path / "alone", cut := tmp_path / "cut"):
        folder.mkdir()
    run(SCRIPT, *args, cwd=alone)

    run_dir = Path("runs") / f"finetune_rainbow__{method}__berzerk__98"
    kill(96, *args, cwd=cut)
    content = checkpoint(cut / run_dir)
    step, fields = content["step"], content["replay"]["fields"].numpy().view(rainbow.TRANSITION)
    assert 80 <= step < 160
    assert (fields["ends"] & ~fields["terminal"]).any() and fields["terminal"].any() and fields["reward"].any()
    if method == "random":  # of the frames since step 80, in slots 17 to 36, half can be written
        fails(start_limited(27 * 84 * 84, *args, cwd=cut), f"{run_dir}/frames.bin cannot be used")
        assert checkpoint(cut / run_dir)["step"] == step
        fails(cut_off(signal.SIGTERM, 127, *args, cwd=cut), "To go on: the same command again")
        step = checkpoint(cut / run_dir)["step"]
        assert 127 <= step < 160
    assert not list(cut.rglob("*.tmp")) and not (cut / "results").exists()
    assert f"from step {step} of 160" in run(SCRIPT, *args, cwd=cut).stdout

    assert [path.name for path in (cut / "results" / "rainbow").iterdir()] == [method]
    assert result(cut, method) == result(alone, method)
    assert_equal(policy(cut), policy(alone))
    one, other = scalars(alone / run_dir), scalars(cut / run_dir)
    assert len(one["losses/loss"]) == 50 and one["charts/episode_return"][100] > 0
    for name in one.keys() - {"charts/updates_per_second"}:
        assert one[name] == other[name], name
    assert not list(tmp_path.rglob("frames.bin")) and not list(tmp_path.rglob("checkpoint.pt"))


def test_what_is_done_is_kept_until_overwrite(saved, tmp_path):
    """The same command does nothing; other arguments, or another run that would write the same replay, are refused."""
    run(SCRIPT, *SAVED, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    assert "is there already" in run(SCRIPT, *SAVED, cwd=tmp_path).stdout
    done = run(SCRIPT, *SAVED, "--batch-size", 4, cwd=tmp_path, code=1)
    assert "seed0.json was made with {'batch_size': 8}" in done.stderr
    done = run(SCRIPT, *SAVED, "--method", "mine", cwd=tmp_path, code=1)
    assert "data/Pong/0/replay_logs cannot be used" in done.stderr and "it belongs to ['pong', " in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()} == before

    run(SCRIPT, *SAVED, "--overwrite", cwd=tmp_path)
    again, first = result(tmp_path, "nature"), result(saved, "nature")
    assert again["args"].pop("overwrite") and not first["args"].pop("overwrite")
    assert again == first
    assert_equal(policy(tmp_path), policy(saved))
    made = [path for path in before if path.exists() and path.stat().st_mtime_ns > before[path]]
    assert len(made) == 8 + 3  # the replay's files, the arguments, the policy and the result
    for number in (1, 2):
        assert_equal(replay(tmp_path, number), replay(saved, number))


def test_saved_replay(saved, tmp_path):
    """Of games of 25 steps, 60 steps each: rows and 3 blank ones before every game, which the other scripts read."""
    for number, rows, games, ends in ((1, 69, [0, 28, 56], [27, 55]), (2, 66, [15, 43], [14, 42])):
        content = replay(saved, number)
        assert {len(column) for column in content.values()} == {rows}
        assert content["terminal"].nonzero().flatten().tolist() == ends
        blank = [first + i for first in games for i in range(3)]
        assert (content["observation"].flatten(1) == 0).all(1).nonzero().flatten().tolist() == blank
        assert content["action"].unique().tolist() == [*range(6)]

    data = ("--data-dir", saved / "data", "--runs", 0, "--checkpoints", 1, 2, *SMALL, "--batch-size", 8)
    evaluation = ("--epochs", 1, "--eval-episodes", 1, "--max-episode-steps", 5)
    done = run("finetune_bc.py", "--game", "pong", *data, *evaluation, "--num-transitions", 100, cwd=tmp_path)
    assert "on 85 transitions" in done.stdout  # 44 real rows of each 50, the first 3 of the second file mere history
    done = run(
        "pretrain_atc.py", "--games", "pong", *data, "--rows-per-checkpoint", 50, "--total-steps", 1, cwd=tmp_path
    )
    assert "1 games, 65 samples, 2 held out" in done.stdout


def test_rows_of_a_saved_replay(saved, tmp_path):
    """Fewer rows, and one that readers leave out, of the same play."""
    run(SCRIPT, *SAVED, "--save-replay-rows", 20, cwd=tmp_path)
    for number in (1, 2):
        first = {field: column[:21] for field, column in replay(saved, number).items()}
        assert_equal(replay(tmp_path, number), first)
    assert_equal(policy(tmp_path), policy(saved))


def test_saving_a_replay_after_a_kill_and_on_a_full_disk(saved, tmp_path):
    """Goes on after the last saved one, and to files equal to an undisturbed run's. No half-written file stays."""
    args = (*SAVED, "--replay-dir", "disk")  # memory-mapped, so that the replay's are the first files to grow
    kill(70, *args, cwd=tmp_path)
    (run_dir,) = tmp_path.glob("runs/*")
    assert checkpoint(run_dir)["step"] == 60
    logs = Path("data") / "Pong" / "0" / "replay_logs"
    process = start_limited(5000, *args, "--log-every", 100, cwd=tmp_path)
    fails(process, f"{logs}/$store$_observation_ckpt.2.gz cannot be written")
    assert len([*(tmp_path / logs).glob("[!.]*")]) == 4 + 1  # the first checkpoint's, and whose they are
    run(SCRIPT, *args, cwd=tmp_path)
    for number in (1, 2):
        assert_equal(replay(tmp_path, number), replay(saved, number))
    assert_equal(policy(tmp_path), policy(saved))


def test_killed_before_a_checkpoint(saved, tmp_path):
    """The same command begins again, in the folders that are marked as its own, and ends as if nothing had been."""
    kill(40, *SAVED, cwd=tmp_path)
    assert "from step 0 of 120" in run(SCRIPT, *SAVED, cwd=tmp_path).stdout
    for number in (1, 2):
        assert_equal(replay(tmp_path, number), replay(saved, number))
    assert_equal(policy(tmp_path), policy(saved))


def test_what_is_made_again_can_be_cut_off(tmp_path):
    """From when a run is made again, the old result does not count: the same command without --overwrite goes on."""
    args = (*NATURE, "--total-steps", 400)
    run(SCRIPT, *args, cwd=tmp_path)
    first, learned = result(tmp_path, "nature"), policy(tmp_path)
    again = (*args, "--overwrite")
    fails(cut_off(signal.SIGTERM, 45, *again, cwd=tmp_path), "the same command again, but without --overwrite")
    (run_dir,) = tmp_path.glob("runs/*")
    assert 45 <= checkpoint(run_dir)["step"] < 400 and not [*tmp_path.glob("results/**/*.json")]
    assert "from step 0 " not in run(SCRIPT, *args, cwd=tmp_path).stdout
    assert result(tmp_path, "nature") == first
    assert_equal(policy(tmp_path), learned)


def test_one_process_at_a_time(tmp_path):
    """Has a run's folder and that of its frames. What another program has in such a folder is kept, too."""
    args = (*NATURE, "--total-steps", 100_000, "--replay-dir", "disk")
    process = start(SCRIPT, *args, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    for options, name in (((), "runs/finetune_rainbow__nature__pong__0"), (("--method", "mine"), "disk")):
        done = run(SCRIPT, *args, *options, cwd=tmp_path, code=1)
        assert f"{name} is in use by another process" in done.stderr
    process.kill()  # which it has not been until now
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    fails(cut_off(signal.SIGTERM, 1, *args, cwd=tmp_path), "To go on: the same command again")  # it is free again

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "frames.bin").write_text("mine")
    done = run(SCRIPT, *QUICK, "--replay-dir", "home", cwd=tmp_path, code=1)
    assert "home cannot be used" in done.stderr and "frames.bin" in done.stderr
    assert (tmp_path / "home" / "frames.bin").read_text() == "mine"


def test_no_room_for_the_frames(tmp_path):
    fails(start_limited(500_000, *QUICK, cwd=tmp_path), "frames.bin cannot be written")  # 60 + 3 + 10,000 of them
    assert not [path for path in tmp_path.rglob("[!.]*") if path.is_file()]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    """What a run left to go on from must be there, whole, and its own; put right, it goes on."""
    args = (*NATURE, "--replay-dir", "disk")
    fails(cut_off(signal.SIGINT, 45, *args, cwd=tmp_path), "Stopped by a signal after step")
    (run_dir,) = tmp_path.glob("runs/*")
    assert checkpoint(run_dir)["step"] < 120
    done = run(SCRIPT, *args, "--game", "breakout", cwd=tmp_path, code=1)
    assert "disk cannot be used" in done.stderr and f"it belongs to ['pong', '{run_dir}']" in done.stderr

    frames, saved = tmp_path / "disk" / "frames.bin", run_dir / "checkpoint.pt"
    for path, size in ((frames, 0), (frames, 5000), (saved, 5000), (frames, None)):  # missing, cut short, another's
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)) if size is None else content[:size]) if size != 0 else path.unlink()
        done = run(SCRIPT, *args, cwd=tmp_path, code=1)
        assert str(path.relative_to(tmp_path)) in done.stderr and "--overwrite" in done.stderr
        path.write_bytes(content)
    assert not (tmp_path / "results").exists()
    run(SCRIPT, *args, cwd=tmp_path)
    assert result(tmp_path, "nature")["args"]["replay_dir"] == "disk"
    assert not [*frames.parent.glob("[!.]*")]  # another run may have it now


def test_policy_is_the_target_network(tmp_path):
    """Which with a momentum of 1 stays what it was at first, whatever the online network learns."""
    run(SCRIPT, *QUICK, "--target-momentum", 1, cwd=tmp_path)
    torch.manual_seed(0)
    args = rainbow.Args("pong", width_multiplier=0.125, blocks=(1, 1, 1, 1))
    first = rainbow.Rainbow(args, rainbow.make_backbone(args)[0], actions=6).target
    assert_equal(policy(tmp_path), {"neck": first.neck.state_dict(), "head": first.head.state_dict()})


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """An absurd learning rate: the first update is finite and saved, the next one's loss is not."""
    done = run(SCRIPT, *QUICK, "--learning-rate", 1e30, "--save-every", 9, cwd=tmp_path, code=1)
    assert "Stopped at step 28: loss nan" in done.stderr
    (run_dir,) = tmp_path.glob("runs/*")
    content = checkpoint(run_dir)
    assert (content["step"], content["updates"]) == (27, 1)
    assert all(x.isfinite().all() for x in content["model"].values())
    assert not (tmp_path / "results").exists()


def test_bad_checkpoints(pretrained, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(pretrained.read_bytes()[:5000])
    done = run(SCRIPT, *QUICK, "--checkpoint", "damaged.pt", cwd=tmp_path, code=1)
    assert "damaged.pt cannot be used" in done.stderr
    done = run(SCRIPT, *QUICK, "--checkpoint", pretrained, "--width-multiplier", 0.25, cwd=tmp_path, code=1)
    assert "--width-multiplier and --blocks" in done.stderr and str(pretrained) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pt"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--encoder", "vgg"], 2, "vgg"),
        (["--game", "chess"], 1, "Unknown game 'chess'"),
        (["--encoder", "nature", "--checkpoint", "a.pt"], 1, "--encoder nature is learned from scratch"),
        (["--learning-starts", "10"], 1, "--learning-starts must be between --n-steps and"),
        (["--discount", "1.5"], 1, "--discount must be at most 1"),
        (["--save-replay", "data"], 1, "--total-steps must be a multiple of --save-replay-every"),
        (["--save-replay", "data", "--save-replay-every", "60", "--replay-capacity", "59"], 1, "must be at least"),
        (["--device", "cuda"], 1, "cuda cannot be used"),
    ],
)
def test_bad_arguments(args, code, message, tmp_path):
    done = run(SCRIPT, *QUICK, *args, cwd=tmp_path, code=code)
    assert message in done.stderr + done.stdout
    assert not [*tmp_path.iterdir()]


def test_torchrun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(SCRIPT, *QUICK, cwd=tmp_path, code=1)
    assert "run it without torchrun" in done.stderr
    assert not [*tmp_path.iterdir()]
