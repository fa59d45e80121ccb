"""What the tests share: running a script as a user does or in this process, and small data sets made once."""

import contextlib
import fcntl
import functools
import gzip
import importlib.util
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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
ROOT = Path(__file__).resolve().parent.parent
GAMES = ("pong", "ms_pacman", "breakout", "freeway")
PRETRAINING = sorted(path.name for path in ROOT.glob("pretrain_*.py"))
SMALL = ("--width-multiplier", "0.125", "--blocks", "1", "1", "1", "1")  # a ResNet that trains in milliseconds
QUICK = (*SMALL, "--games", "pong", "freeway", "--play-rows", 100, "--batch-size", 8, "--log-every", 1)
FIELDS = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}  # replay files
BUCKET, FLAT = "{game}/{run}/replay_logs/$store$_{field}_ckpt.{checkpoint}.gz", "{game}/{field}_{run}_{checkpoint}.gz"


@functools.cache
def load(script: str):
    """The script as a module, imported as nobody would but a test."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def environment(**changes: str) -> dict[str, str]:
    keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}  # freed memory is used again: faster
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | keep_memory | changes


def run(script: str, *args, cwd: Path, code: int = 0, timeout: float = 3600, **changes) -> subprocess.CompletedProcess:
    """Runs a script in a folder of its own, checks its exit code and returns what it printed."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    options = dict(env=environment(**changes), capture_output=True, text=True, timeout=timeout)
    done = subprocess.run(command, cwd=cwd, **options)
    assert done.returncode == code, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr[-5000:]}"
    if code:  # what went wrong is said in a line, not in a traceback
        assert "Traceback" not in done.stderr, done.stderr[-5000:]
    return done


@contextlib.contextmanager
def float64(*modules):
    """Everything in double precision, what these modules read from shards, too.

    What two ways of computing make of the same numbers then differs by 1e-12 or so, on every processor. In float32 a
    unit at the edge of its ReLU may fall to either side with the last bit of a sum, which changes a gradient by 1e-4.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in modules:
            patch.setattr(module, "unpack", functools.partial(unpack_double, module.unpack))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def unpack_double(unpack, *args) -> dict[str, torch.Tensor]:
    batch = unpack(*args)
    return batch | {"return_to_go": batch["return_to_go"].double()}


def train(script: str, *args, cwd: Path, games: tuple[str, ...] = GAMES) -> None:
    """Pre-trains in this process, in that folder, as the script does when it is given these arguments.

    As if the data set had only a few games: what the networks have for each game takes most of the time else.
    """
    module, writers = load(script), []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in signals}

    def open_writer(*args, make=module.SummaryWriter, **options):
        time.sleep(1)  # TensorBoard orders the files of a run by the second in their names
        writers.append(make(*args, **options))
        return writers[-1]

    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DQN_REPLAY_GAMES", sorted(games))
        patch.setattr(module, "SummaryWriter", open_writer)
        try:
            module.train(module.tyro.cli(module.Args, args=["--device", "cpu", "--no-compile", *map(str, args)]))
        finally:
            for writer in writers:
                writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def write_replay(data_dir: Path, game: str, columns: dict, layout: str = BUCKET, number: int = 1) -> dict[str, Path]:
    """Writes the four replay files of a checkpoint of run 1; arrays keep their dtype. Returns the files by field."""
    paths = {}
    for field, dtype in FIELDS.items():
        name = "".join(word.capitalize() for word in game.split("_"))
        paths[field] = data_dir / layout.format(game=name, run=1, field=field, checkpoint=number)
        paths[field].parent.mkdir(parents=True, exist_ok=True)
        column = columns[field]
        with gzip.open(paths[field], "wb", compresslevel=1) as stream:
            np.save(stream, column if isinstance(column, np.ndarray) else np.array(column, dtype))
    return paths


class Bomb:
    """What a pickle may hold: code that runs as it is read, and leaves a file behind."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A --cache-dir with 1,000 played rows of each of GAMES."""
    folder = tmp_path_factory.mktemp("cache")
    module = load("pretrain_atc.py")
    module.prepare(module.Args(cache_dir=folder), GAMES, 1)
    return folder


@pytest.fixture(scope="session")
def replay(cache, tmp_path_factory) -> Path:
    """A --data-dir with run 1's checkpoint 1 of each of GAMES: the 1,000 played rows, and a last one."""
    folder, row = tmp_path_factory.mktemp("replay"), load("pretrain_atc.py").ROW
    for game in GAMES:
        rows = np.fromfile(cache / f"{game}_played_1000.bin", row)
        rows = np.append(rows[-1000:], rows[-1:])
        columns = {"observation": rows["frame"], "action": rows["action"].astype(np.int32)}
        columns |= {"reward": rows["reward"].astype(np.float32), "terminal": rows["terminal"].astype(np.uint8)}
        write_replay(folder, game, columns)
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """`alone(script)` runs a copy of the script in a folder of its own, once: that folder, and what was printed.

    Once for all of pytest's workers, whose temporary folders have the same parent.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def run_alone(script: str) -> tuple[Path, str]:
        folder = shared / "alone" / script.removesuffix(".py")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "a+") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            if not (folder / script).exists():
                shutil.copy(ROOT / script, folder)
                command = [sys.executable, script, *map(str, QUICK), "--total-steps", "3", "--seed", "7"]
                subprocess.run(command, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT, check=True)
            return folder, folder.with_suffix(".log").read_text()

    return run_alone
