"""Files that are cut short, flipped, hostile or too large for the disk, and folders that several processes share."""

import gzip
import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, SMALL, Bomb, environment, load, run
from test_pretrain import assert_equal, scalars

atc, bc, iqm, rainbow, zeroshot = map(
    load, ("pretrain_atc.py", "finetune_bc.py", "eval_iqm.py", "finetune_rainbow.py", "eval_zeroshot.py")
)
cloning = load("pretrain_bc.py")
FIELDS = ("observation", "action", "reward", "terminal")
TRAIN = (*QUICK, "--num-workers", 0, "--total-steps", 2)
PLAY = ("--eval-episodes", 2, "--max-episode-steps", 25)
TUNE = ("--game", "pong", *SMALL, "--play-rows", 100, "--batch-size", 50, "--epochs", 1, "--num-workers", 0, *PLAY)
RAINBOW = ("--game", "pong", "--encoder", "nature", "--learning-starts", 20, "--updates-per-step", 0.25, *PLAY)
RAINBOW += ("--batch-size", 8, "--replay-capacity", 60, "--total-steps", 120, "--save-every", 80, "--precision", "fp32")
PROBE = (*SMALL, "--games", "pong", "--play-rows", 1000, "--epochs", 1, "--resamples", 5, "--rank-resamples", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with 100 played rows of two games, prepared, and a finished pre-training by behaviour cloning."""
    folder = tmp_path_factory.mktemp("home")
    run("pretrain_bc.py", *TRAIN, cwd=folder)
    return folder


def copy_cache(home: Path, folder: Path) -> None:
    """The played games, and their shards, which belong to the files' places."""
    shutil.copytree(home / "cache" / "played_100", folder / "cache" / "played_100")
    for game in ("pong", "freeway"):
        atc.prepare_shard(folder / "cache", folder / "cache" / "played_100", 100, game, 1, 1)


@pytest.fixture
def place(home, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    copy_cache(home, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRETRAINED = Path("runs", "pretrain_bc__0", "checkpoint.pt")
PONG = Path("cache", "played_100", "Pong", "1", "replay_logs")
RESULT = Path("results", "bc", "random", "pong", "seed0.json")


def replay_file(field: str) -> Path:
    return PONG / f"$store$_{field}_ckpt.1.gz"


# Files cut short, and files with a flipped bit.
class GoesOnError(Exception):
    """Raised where a script has read its files and would begin to train."""


def noticed(path: Path, read) -> bool:
    """Whether `read` ends the program, with a line that names the file, rather than goes on as if nothing had been."""
    try:
        read()
    except GoesOnError:
        return False
    except SystemExit as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and (path.name in message or "differ in length" in message), message
        return True
    return False


def places(size: int, seed: int, *also: int) -> list[int]:
    """Offsets to damage a file of so many bytes at: the first and the last two, 20 drawn ones and those given."""
    return sorted({0, 1, size - 2, size - 1, *random.Random(seed).sample(range(size), 20), *also})


def cut(path: Path, content: bytes, read, offsets: list[int]) -> dict[int, bool]:
    """Which cuts are noticed, by what is left."""
    found = {}
    for size in offsets:
        path.write_bytes(content[:size])
        found[size] = noticed(path, read)
    path.write_bytes(content)
    return found


def flip(path: Path, content: bytes, read, offsets: list[int]) -> dict[int, bool]:
    """Which flipped bits are noticed, by their bytes' offsets."""
    bits, found = random.Random(0), {}
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        found[offset] = noticed(path, read)
    path.write_bytes(content)
    return found


def flip_in(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("field", FIELDS)
def test_damaged_replay_files(field, place):
    """A replay file is cut short or has a flipped bit: an error where a byte that is needed is gone, else the same."""
    path, rows = replay_file(field), 90
    content, shards = path.read_bytes(), []

    def prepare():
        shutil.rmtree("fresh", ignore_errors=True)
        shards.append(atc.prepare_shard(Path("fresh"), Path("cache", "played_100"), rows, "pong", 1, 1))

    prepare()
    good = shards[0].read_bytes()
    needed = 128 + rainbow.REPLAY[field].itemsize * rows
    if field in ("reward", "terminal"):  # returns-to-go take all of them
        needed = len(gzip.decompress(content))
    for size, is_noticed in cut(path, content, prepare, places(len(content), 1)).items():
        left = len(zlib.decompressobj(31).decompress(content[:size]))
        assert is_noticed or (left >= needed and shards[-1].read_bytes() == good), size
    found = flip(path, content, prepare, places(len(content), 2))
    assert found[0] and found[1]  # what makes it a .gz
    assert not [*Path("fresh").rglob("*.tmp")]


def test_damaged_shard(place):
    """A prepared shard is cut short: always an error; a bit of it is flipped: an error if it is in the header."""
    (path,) = Path("cache", "prepared").glob("pong*.npy")
    content = path.read_bytes()

    def read():
        atc.open_shard.cache_clear()
        atc.map_shard.cache_clear()
        data = atc.Windows([(0, path)], 7, 8, 0, "train")
        for i in range(data.batches):
            assert data[i]["frames"].shape == (8, 7, 84, 84)

    assert all(cut(path, content, read, places(len(content), 3, 50, 128)).values())
    found = flip(path, content, read, places(len(content), 4, *range(2, 128, 7)))
    assert found[0] and found[1] and not any(is_noticed for offset, is_noticed in found.items() if offset >= 128)


def test_damaged_checkpoint_of_pre_training(place):
    """A pre-training's checkpoint is cut short: always an error; a flipped bit: an error, or the same is read."""
    content, original = PRETRAINED.read_bytes(), torch.load(PRETRAINED, weights_only=True)
    objective = cloning.Objective(cloning.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1)))
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    args = original["args"]
    backbone, cpu = bc.ResNet(0.125, (1, 1, 1, 1)), torch.device("cpu")

    def resume():
        assert cloning.load_checkpoint(PRETRAINED, objective, optimizer, args) == original["step"]
        for name, state in original["optimizer"]["state"].items():
            assert torch.equal(optimizer.state_dict()["state"][name]["exp_avg"], state["exp_avg"])
        for name, value in objective.backbone.state_dict().items():
            assert torch.equal(value, original["backbone"][name])

    readers = (
        resume,
        lambda: bc.load_backbone(backbone, PRETRAINED),
        lambda: zeroshot.Policy(PRETRAINED, cpu, zeroshot.autocast(cpu, "fp32")),
    )
    for read in readers:
        assert all(cut(PRETRAINED, content, read, places(len(content), 5)).values())
        found = flip(PRETRAINED, content, read, places(len(content), 6, *range(64, 12_000, 1_000)))
        assert any(found.values())  # in the pickle and the archive's directory


def test_flipped_name_in_a_checkpoint(place):
    """A flipped bit of a checkpoint renames a moment of Adam: --resume says that the file is damaged."""
    torch.save(torch.load(PRETRAINED, weights_only=True) | {"step": 1}, PRETRAINED)  # of 2
    content = PRETRAINED.read_bytes()
    flip_in(PRETRAINED, content.index(b"exp_avg") + 6)
    done = run("pretrain_bc.py", *TRAIN, "--resume", cwd=place, code=1)
    assert "runs/pretrain_bc__0/checkpoint.pt" in done.stderr


def start(script: str, *args, cwd: Path, limit: int | None = None) -> subprocess.Popen:
    """A script on a disk that takes no file larger than `limit` bytes."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    limits = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits) if limit else None  # Python ignores SIGXFSZ
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=cwd, env=environment(), preexec_fn=fill, **pipes)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=60)[0].decode()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory) -> Path:
    """The folder of a Rainbow that was killed after its checkpoint of step 80."""
    folder = tmp_path_factory.mktemp("rainbow")
    args = rainbow.Args(game="pong", encoder="nature", learning_starts=20, updates_per_step=0.25, eval_episodes=2)
    args.max_episode_steps, args.batch_size, args.replay_capacity, args.total_steps = 25, 8, 60, 120
    args.save_every, args.precision = 80, "fp32"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        saves, save = [], torch.save

        def save_twice(content, file):
            save(content, file)
            saves.append(content["step"])

        def leave(*_):
            if saves[-1:] == [80]:
                raise GoesOnError

        patch.setattr(rainbow.torch, "save", save_twice)
        patch.setattr(rainbow.Replay, "add", lambda self, *row, add=rainbow.Replay.add: (leave(), add(self, *row)))
        patch.setattr(rainbow, "hold", lambda folder, owner=None: folder.mkdir(parents=True, exist_ok=True))
        with pytest.raises(GoesOnError):
            rainbow.finetune(args)
    return folder


RUN = Path("runs", "finetune_rainbow__nature__pong__0")


@pytest.fixture
def rainbow_place(cut_off, tmp_path, monkeypatch) -> Path:
    shutil.copytree(cut_off, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["checkpoint.pt", "frames.bin"])
def test_damaged_files_of_rainbow(name, rainbow_place, monkeypatch):
    """A Rainbow's checkpoint or frames are cut short: always an error; a bit of the last frames flipped: an error."""
    monkeypatch.setattr(rainbow, "hold", lambda folder: None)
    monkeypatch.setattr(rainbow, "open_writer", lambda *_: (_ for _ in ()).throw(GoesOnError))
    path, args = RUN / name, rainbow.tyro.cli(rainbow.Args, args=[*map(str, RAINBOW)])
    env = rainbow.Environment(args, "pong")  # a single one: to make it takes the most time
    monkeypatch.setattr(rainbow, "Environment", lambda *_: env)
    content, read = path.read_bytes(), lambda: rainbow.finetune(args)
    assert not noticed(path, read)
    assert all(cut(path, content, read, places(len(content), 7)).values())
    found = flip(path, content, read, places(len(content), 8))
    if name == "frames.bin":  # the last 60 of 80 rows are checked; those from 80 on have not been written yet
        for offset, is_noticed in found.items():
            assert is_noticed == (20 * 7056 <= offset < 80 * 7056)
    else:
        assert found[0] or any(found.values())


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("result")
    run("finetune_bc.py", *TUNE, cwd=folder)
    return (folder / RESULT).read_bytes()


def test_damaged_result(result, tmp_path, monkeypatch):
    """A result is cut short: always an error, of the table and of a fine-tuning that would skip what is done."""
    monkeypatch.chdir(tmp_path)
    RESULT.parent.mkdir(parents=True)
    args = bc.tyro.cli(bc.Args, args=[*map(str, TUNE)])

    def table():
        ((score,),) = (of.values() for methods in iqm.load(iqm.Args()).values() for of in methods.values())
        assert np.isfinite(score)

    RESULT.write_bytes(result)
    for read in (table, lambda: bc.find_run(args, "bc", "random", "pong")):
        assert not noticed(RESULT, read)
        assert all(cut(RESULT, result, read, places(len(result), 9)).values())
        found = flip(RESULT, result, read, places(len(result), 10, *range(0, len(result), 40)))
        assert found[0] and any(found.values())


@pytest.mark.parametrize("what", ["replay", "shard", "pre-training", "backbone", "frames", "result"])
def test_damaged_file_as_a_user_meets_it(what, place, cut_off, result):
    """A single flipped bit in a file of each format: the script ends with code 1 and a line that names the file."""
    resumed, fresh = ("pretrain_bc.py", *TRAIN, "--resume"), ("pretrain_bc.py", *TRAIN, "--run-name", "fresh")
    if what == "replay":
        shutil.rmtree(place / "cache" / "prepared")
        path, offset, command = replay_file("observation"), 1, fresh
    elif what == "shard":
        (path,), offset, command = Path("cache", "prepared").glob("pong*.npy"), 20, fresh
    elif what == "pre-training":
        path, offset, command = PRETRAINED, 2, resumed
    elif what == "backbone":
        path, offset, command = PRETRAINED, 2, ("finetune_bc.py", *TUNE, "--checkpoint", PRETRAINED)
    elif what == "frames":
        shutil.copytree(cut_off, place, dirs_exist_ok=True)
        path, offset, command = RUN / "frames.bin", 50 * 7056 + 3, ("finetune_rainbow.py", *RAINBOW)
    else:
        RESULT.parent.mkdir(parents=True)
        RESULT.write_bytes(result)
        path, offset, command = RESULT, 0, ("eval_iqm.py", "--resamples", 5)
    flip_in(path, offset, bit=3)
    before = {file: file.stat().st_mtime_ns for file in place.rglob("[!.]*") if file.is_file()}
    done = run(*command, cwd=place, code=1)
    assert str(path) in done.stderr.splitlines()[-1]
    after = {file: file.stat().st_mtime_ns for file in place.rglob("[!.]*") if file.is_file()}
    prepared = {file for file in after if file.parent.name == "prepared"}
    assert {file: after[file] for file in after.keys() - prepared} == {
        file: before[file] for file in before.keys() - prepared
    }


# Files that are made to harm.
@pytest.mark.parametrize("script", ["finetune_rainbow.py", "eval_zeroshot.py", "eval_probe.py", "resumed"])
def test_a_checkpoint_cannot_run_code(script, place, cut_off):
    """A checkpoint with code in its pickle: no script runs it, each names the file."""
    path, args = PRETRAINED, ("--checkpoint", PRETRAINED, "--eval-episodes", 1)
    if script == "eval_probe.py":
        args = (*PROBE, "--models", PRETRAINED)
    elif script == "finetune_rainbow.py":
        args = ("--game", "pong", *SMALL, *args)
    elif script == "resumed":
        shutil.copytree(cut_off, place, dirs_exist_ok=True)
        path, script, args = RUN / "checkpoint.pt", "finetune_rainbow.py", RAINBOW
    torch.save(torch.load(path, weights_only=True) | {"extra": Bomb()}, path)
    assert f"{path} cannot be used" in run(script, *args, cwd=place, code=1).stderr
    assert not (place / "exploded").exists()


def test_a_shard_cannot_run_code(place):
    """A prepared shard of pickled objects: they are not run, a line names the file."""
    for path in Path("cache", "prepared").glob("*.npy"):
        with open(path, "wb") as file:
            np.save(file, np.array([Bomb()] * 100, object), allow_pickle=True)
    done = run("pretrain_bc.py", *TRAIN, "--run-name", "again", cwd=place, code=1)
    assert re.search(r"prepared/\w+\.npy cannot be used", done.stderr)
    assert not (place / "exploded").exists()


def write_bomb(path: Path, rows: int, row: np.dtype, gigabytes: int) -> None:
    """A .gz whose .npy header promises so many rows, and that inflates to gigabytes of zeros."""
    header = io.BytesIO()
    shape = (rows, *row.shape)
    np.lib.format.write_array_header_1_0(header, {"descr": row.base.str, "fortran_order": False, "shape": shape})
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = deflate.compress(header.getvalue()) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)  # may be repeated: it refers to nothing
    path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + content + block * (64 * gigabytes) + b"\x03\0" + bytes(8))


def peak(*command, cwd: Path) -> tuple[int, int, str]:
    """Exit code, largest resident memory in MB of the process and those it started, and the output."""
    process = start(*command, cwd=cwd)
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss // 1024, output


def test_gzip_bomb(place):
    """A .gz inflates to 8 GB more than its header says: no more than the header's rows are read, in bounded memory."""
    path = replay_file("observation")
    with gzip.open(path) as file:
        rows = len(np.load(file))
    command = ("pretrain_bc.py", *TRAIN, "--run-name", "bombed", "--data-dir", "cache/played_100", "--runs", 1)
    command += ("--checkpoints", 1, "--rows-per-checkpoint", 90)
    code, usual, output = peak(*command, cwd=place)
    assert code == 0, output
    write_bomb(path, rows, rainbow.REPLAY["observation"], 8)
    assert path.stat().st_size < 10_000_000
    code, memory, output = peak(*command, "--overwrite", cwd=place)
    assert code == 0 and memory < usual + 300, output


PREPARE = """
import resource, sys
from pathlib import Path
from conftest import load
bc = load("finetune_bc.py")
usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        bc.prepare_shard(Path("fresh"), Path(folder), 90, "pong", 1, 1)
    except SystemExit as error:
        print(error)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual
    assert memory < 300 * 1024, (folder, memory)
"""


@pytest.mark.parametrize("field", ["observation", "terminal"])
def test_header_that_promises_what_is_not_there(field, place):
    """A header promises more rows than there are, or fewer than none: the file is named, in little memory."""
    promised = (2**31, 2**40, 2**62, 2**80, -1)
    for rows in promised:
        shutil.copytree("cache/played_100", f"with {rows}")
        path = Path(f"with {rows}", *replay_file(field).parts[2:])
        write_bomb(path, rows, rainbow.REPLAY[field], 1 if rows < 0 else 0)
    folders = [f"with {rows}" for rows in promised]
    path = environment(PYTHONPATH=str(ROOT / "tests"))
    command = [sys.executable, "-c", PREPARE, *folders]
    done = subprocess.run(command, cwd=place, env=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, message in zip(folders, done.stdout.splitlines(), strict=True):
        assert folder in message


# A full disk.
def fails_for(path: Path | str, process: subprocess.Popen, folder: Path) -> str:
    """The script ends with code 1 and, says in a line which file cannot be written; no half of it stays."""
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 1 and "Traceback" not in output, output[-3000:]
    assert [line for line in output.splitlines() if str(path) in line and "cannot be" in line], output[-3000:]
    assert not [*folder.rglob("*.tmp")]
    return output


@pytest.mark.parametrize(
    ("limit", "file"),
    [(3_000, "$store$_observation_ckpt.1.gz"), (100_000, ".npy"), (400, "args.json"), (1_000_000, "checkpoint.pt")],
    ids=["playing", "preparing", "args.json", "checkpoint.pt"],
)
def test_full_disk_in_pre_training(limit, file, home, tmp_path):
    """A full disk while a game is played, a shard prepared, arguments or a checkpoint written: the file is named."""
    if limit != 3_000:
        copy_cache(home, tmp_path)
    if limit == 100_000:
        shutil.rmtree(tmp_path / "cache" / "prepared")
    fails_for(file, start("pretrain_bc.py", *TRAIN, cwd=tmp_path, limit=limit), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(file) and "prepared" not in path.parts]
    run("pretrain_bc.py", *TRAIN, "--resume", cwd=tmp_path)
    ours, theirs = (torch.load(folder / PRETRAINED, weights_only=True) for folder in (tmp_path, home))
    assert_equal(ours["backbone"], theirs["backbone"])


def test_full_disk_keeps_the_last_checkpoint(home, tmp_path):
    """A full disk at a later checkpoint: the file is named, the one before is kept whole, and --resume goes on."""
    copy_cache(home, tmp_path)
    args = (*TRAIN, "--total-steps", 40, "--save-every", 1)
    process = start("pretrain_bc.py", *args, cwd=tmp_path)
    wait_for(tmp_path / PRETRAINED, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    fails_for(PRETRAINED, process, tmp_path)
    step = torch.load(tmp_path / PRETRAINED, weights_only=True)["step"]
    assert 0 < step < 40
    run("pretrain_bc.py", *args, "--save-every", 40, "--resume", cwd=tmp_path)
    assert torch.load(tmp_path / PRETRAINED, weights_only=True)["step"] == 40


@pytest.mark.parametrize("script", ["pretrain_bc.py", "finetune_bc.py", "finetune_rainbow.py"])
def test_full_disk_for_tensorboard(script, home, tmp_path):
    """A full disk as TensorBoard's events are written: a line that names the run's folder or its file."""
    copy_cache(home, tmp_path)
    args = {"pretrain_bc.py": TRAIN, "finetune_bc.py": TUNE, "finetune_rainbow.py": RAINBOW}[script]
    process = start(script, *args, cwd=tmp_path)
    pattern = "runs/*/events*"
    end = time.monotonic() + 60
    while not [*tmp_path.glob(pattern)]:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    (events,) = tmp_path.glob(pattern)
    events.unlink()
    events.symlink_to("/dev/full")
    fails_for("runs/", process, tmp_path)


def test_full_disk_in_fine_tuning(home, tmp_path):
    """A full disk as a fine-tuning's policy or result is written: the file is named; with room, the command ends."""
    copy_cache(home, tmp_path)
    args = (*TUNE, "--eval-episodes", 10, "--max-episode-steps", 300)
    fails_for("policy.pt", start("finetune_bc.py", *args, cwd=tmp_path, limit=100_000), tmp_path)
    assert not [*tmp_path.rglob("policy.pt")]
    process = start("finetune_bc.py", *args, cwd=tmp_path)
    wait_for(tmp_path / "runs" / "finetune_bc__random__pong__0" / "policy.pt", process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    fails_for("runs/", process, tmp_path)  # TensorBoard's come first
    assert not (tmp_path / RESULT).exists()
    run("finetune_bc.py", *args, cwd=tmp_path)
    assert (tmp_path / RESULT).exists()


def test_full_disk_for_rainbows_checkpoint(tmp_path):
    """A full disk as Rainbow's checkpoint is written: the file is named; with room, the same command begins again."""
    fails_for(RUN / "checkpoint.pt", start("finetune_rainbow.py", *RAINBOW, cwd=tmp_path, limit=2_000_000), tmp_path)
    assert {path.name for path in (tmp_path / RUN).glob("[!.]*")} == {"frames.bin"}
    run("finetune_rainbow.py", *RAINBOW, cwd=tmp_path)
    assert [*tmp_path.glob("results/rainbow/nature/pong/seed0.json")]


@pytest.mark.parametrize("video", [False, True])
def test_full_disk_in_zero_shot_play(video, place):
    """A full disk as zero-shot play writes its result or its film: the file is named; with room, it ends."""
    args = ("--checkpoint", PRETRAINED, "--games", "pong", *PLAY, *["--video"] * video)
    file = "episode.gif" if video else "results/zeroshot/bc/pong/seed0.json"
    fails_for(file, start("eval_zeroshot.py", *args, cwd=place, limit=100), place)
    assert not [*place.rglob("seed0.json")] and not [*place.rglob("episode.gif")]
    run("eval_zeroshot.py", *args, cwd=place)
    assert (place / "results" / "zeroshot" / "bc" / "pong" / "seed0.json").exists()


def test_full_disk_for_the_table(result, tmp_path):
    """A full disk at any file of eval_iqm.py's report: the file is named, and what was there before is kept whole."""
    for method in ("random", "atc"):
        path = tmp_path / "results" / "bc" / method / "pong" / "seed0.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(result.replace(b'"method": "random"', f'"method": "{method}"'.encode()))
    run("eval_iqm.py", "--resamples", 5, cwd=tmp_path)
    names = ("iqm.md", "iqm.json", "iqm.png", "profiles.png", "improvement.png")
    before = {name: (tmp_path / "reports" / name).read_bytes() for name in names}
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {*names}
    for limit in sorted({len(content) for content in before.values()}):
        full = next(name for name in names if len(before[name]) >= limit)
        process = start("eval_iqm.py", "--resamples", 5, cwd=tmp_path, limit=limit - 1)
        fails_for(f"reports/{full}", process, tmp_path)
        assert {name: (tmp_path / "reports" / name).read_bytes() for name in names} == before
    run("eval_iqm.py", "--resamples", 5, cwd=tmp_path)


def test_full_disk_for_the_probe(cache, tmp_path):
    """A full disk as eval_probe.py writes its report: the file is named; with room, the same command ends."""
    args = (*PROBE, "--cache-dir", cache)
    fails_for("reports/probe.md", start("eval_probe.py", *args, cwd=tmp_path, limit=100), tmp_path)
    assert not [*(tmp_path / "reports").iterdir()]
    run("eval_probe.py", *args, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {"probe.md", "probe.json", "probe.png"}


# Folders.
def test_data_is_read_only_and_has_an_odd_name(home, tmp_path):
    """Data is in a protected folder with spaces and foreign letters in its name: it is read, nothing is written."""
    data = tmp_path / "Daten für Atari" / "リプレイ 1"
    shutil.copytree(home / "cache" / "played_100", data)
    paths = sorted(data.rglob("*"))
    for path in (*paths, data):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (*paths, data)}
    args = ("--data-dir", data, "--runs", 1, "--checkpoints", 1)
    run("pretrain_bc.py", *TRAIN, *args, "--rows-per-checkpoint", 90, "--cache-dir", "Zwischen lager ß", cwd=tmp_path)
    run("finetune_bc.py", *TUNE, *args, "--num-transitions", 90, "--cache-dir", "Zwischen lager ß", cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (*sorted(data.rglob("*")), data)} == before
    assert len([*(tmp_path / "Zwischen lager ß" / "prepared").iterdir()]) == 2
    for path in (data, *paths):
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "args"), [("pretrain_bc.py", TRAIN), ("finetune_bc.py", TUNE)], ids=["pre-training", "fine-tuning"]
)
def test_cache_below_a_file(script, args, tmp_path):
    """A --cache-dir below what is a file: a line that names it, and nothing is made."""
    (tmp_path / "taken").write_text("mine")
    done = run(script, *args, "--cache-dir", "taken/cache", cwd=tmp_path, code=1)
    assert "taken/cache" in done.stderr.splitlines()[-1] and "cannot be" in done.stderr.splitlines()[-1]
    assert [*tmp_path.iterdir()] == [tmp_path / "taken"] and (tmp_path / "taken").read_text() == "mine"


def test_three_runs_make_one_cache(home, tmp_path):
    """Three runs start at once with the same empty --cache-dir: all end with equal losses, on files made whole."""
    processes = [start("pretrain_bc.py", *TRAIN, "--run-name", name, cwd=tmp_path) for name in "abc"]
    for process in processes:
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 0, output
    losses = [scalars(tmp_path / "runs" / name)["losses/loss"] for name in "abc"]
    assert losses[0] == losses[1] == losses[2] == scalars(home / "runs" / "pretrain_bc__0")["losses/loss"]
    files = {path.relative_to(tmp_path) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert len(files) == 2 * (4 + 1)
    played = {path for path in files if path.suffix == ".gz"}
    assert {path.name for path in played} == {f"$store$_{field}_ckpt.1.gz" for field in FIELDS}
    for path in played:
        assert gzip.decompress((tmp_path / path).read_bytes()) == gzip.decompress((home / path).read_bytes())


def test_leftovers_of_killed_processes(tmp_path):
    """A temporary file that a killed process left an hour ago: the next write of that file deletes it, no other."""
    path = tmp_path / "a shard.npy"
    old, young, foreign = (tmp_path / f".{name}.tmp" for name in ("a shard.npy.1", "a shard.npy.2", "another.npy.1"))
    for left, age in ((old, 3700), (young, 3500), (foreign, 3700)):
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    with atc.atomic_write(path) as file:
        file.write(b"whole")
    assert {*tmp_path.iterdir()} == {path, young, foreign}
    assert path.read_bytes() == b"whole"
