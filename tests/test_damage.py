"""Files that are cut short, hostile or too large for the disk, and folders that are protected or shared."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GAMES, QUICK, ROOT, SMALL, Bomb, environment, load, run, train
from test_pretrain import assert_same_run, checkpoint

atc = load("pretrain_atc.py")
FAST = (*QUICK, "--width-multiplier", 0.0625, "--batch-size", 4, "--eval-every", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a pre-training of 4 steps and its cache."""
    folder = tmp_path_factory.mktemp("home")
    train("pretrain_bc.py", *FAST, "--total-steps", 4, cwd=folder)
    return folder


RUN = Path("runs", "pretrain_bc__0")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_short(share, home, tmp_path):
    """It is never read as if it were whole, and never written over."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    path = tmp_path / RUN / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    damaged = path.read_bytes()
    with pytest.raises((RuntimeError, EOFError, OSError)):
        train("pretrain_bc.py", *FAST, "--total-steps", 4, "--resume", cwd=tmp_path)
    assert path.read_bytes() == damaged


def test_a_full_disk_keeps_the_last_checkpoint(home, tmp_path, monkeypatch):
    """What could not be written whole does not take the place of what was; with room, --resume goes on."""
    bc, save, saves = load("pretrain_bc.py"), torch.save, []

    def fill(content, path):
        saves.append(content["step"])
        save(content, path)
        if content["step"] == 3:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    args = ("pretrain_bc.py", *FAST, "--total-steps", 4, "--cache-dir", home / "cache", "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(bc.torch, "save", fill)
        with pytest.raises(OSError, match="No space left on device"):
            train(*args, cwd=tmp_path)
    assert saves == [1, 2, 3] and checkpoint(tmp_path / RUN)["step"] == 2
    train(*args, "--save-every", 1000, "--resume", cwd=tmp_path)
    one, other = checkpoint(tmp_path / RUN), checkpoint(home / RUN)
    assert all(torch.equal(value, other["backbone"][name]) for name, value in one["backbone"].items())
    assert_same_run_but_for(("save_every",), tmp_path, home)


def assert_same_run_but_for(names: tuple[str, ...], folder: Path, other: Path) -> None:
    """As assert_same_run, with these arguments of the first made equal to the second's."""
    content = checkpoint(folder / RUN)
    for name in names:
        content["args"][name] = checkpoint(other / RUN)["args"][name]
    torch.save(content, folder / RUN / "checkpoint.pt")
    assert_same_run(folder / RUN, other / RUN)


def test_a_full_disk_leaves_no_half_shard(cache, tmp_path, monkeypatch):
    """Nothing that a later run would take for prepared data."""
    written = []

    class Full(type(tmp_path)):
        def replace(self, target):
            written.append(self)
            raise OSError(errno.ENOSPC, "No space left on device", str(self))

    args = atc.Args(cache_dir=Full(tmp_path))
    with pytest.raises(OSError, match="No space left on device"):
        atc.play_shard(args, 50, "pong")
    assert written and not [*tmp_path.glob("*.bin")]
    path = atc.play_shard(atc.Args(cache_dir=tmp_path), 50, "pong")
    assert path.stat().st_size == 50 * atc.ROW.itemsize


def test_data_is_read_only_and_has_an_odd_name(replay, tmp_path):
    """Data is in a protected folder with spaces and foreign letters in its name: it is read, nothing is written."""
    data = tmp_path / "Daten für Atari" / "リプレイ 1"
    shutil.copytree(replay, data)
    paths = [*sorted(data.rglob("*")), data]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in paths}
    args = ("--data-dir", data, "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 90, "--total-steps", 1)
    train("pretrain_bc.py", *FAST, *args, "--cache-dir", "Zwischen lager ß", cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (*sorted(data.rglob("*")), data)} == before
    assert len([*(tmp_path / "Zwischen lager ß").iterdir()]) == 2
    for path in reversed(paths):
        path.chmod(0o755)


PREPARE = """
import sys
from pathlib import Path
from conftest import GAMES, load
atc = load("pretrain_atc.py")
args = dict(data_dir=Path(sys.argv[1]), runs=(1,), checkpoints=(1,)) if sys.argv[1:] else dict(play_rows=300)
shards, _ = atc.prepare(atc.Args(cache_dir=Path("cache"), **args), GAMES, 500)
print(*(path for _, path in shards))
"""


@pytest.mark.slow
@pytest.mark.parametrize("played", [True, False])
def test_three_runs_make_one_cache(played, replay, tmp_path):
    """Three runs start at once with the same empty --cache-dir: all end with the same shards, made whole."""
    command = [sys.executable, "-c", PREPARE, *([] if played else [str(replay)])]
    options = dict(cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT / "tests")), stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **options) for _ in range(3)]
    outputs = {process.communicate(timeout=600)[0].splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0] * 3 and len(outputs) == 1
    shards = [tmp_path / path for path in outputs.pop().split()]
    assert sorted(shards) == sorted((tmp_path / "cache").iterdir()) and len(shards) == len(GAMES)
    alone = tmp_path / "alone"
    alone.mkdir()
    options = {} if played else {"data_dir": replay, "runs": (1,), "checkpoints": (1,)}
    for game, path in zip(GAMES, shards, strict=True):
        args = atc.Args(cache_dir=alone, **options)
        expected = atc.play_shard(args, 300, game) if played else atc.prepare_shard(args, 500, game, 1, 1)
        assert path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("script", ["finetune_bc.py", "finetune_rainbow.py", "eval_zeroshot.py", "eval_probe.py"])
def test_a_checkpoint_cannot_run_code(script, home, tmp_path):
    """A checkpoint with code in its pickle: no script runs it, each names the file."""
    path = tmp_path / "hostile.pt"
    torch.save(checkpoint(home / RUN) | {"extra": Bomb()}, path)
    args = {"eval_probe.py": (*SMALL, "--models", path), "eval_zeroshot.py": ("--checkpoint", path)}
    done = run(script, *args.get(script, ("--game", "pong", *SMALL, "--checkpoint", path)), cwd=tmp_path, code=1)
    assert str(path) in done.stderr
    assert not (tmp_path / "exploded").exists()
