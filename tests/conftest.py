"""What the tests share: running a script as a user does, importing one, and a small replay played once."""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GAMES = ("pong", "ms_pacman", "breakout", "freeway")
PRETRAINING = sorted(path.name for path in ROOT.glob("pretrain_*.py"))
SMALL = ("--width-multiplier", "0.125", "--blocks", "1", "1", "1", "1")  # a ResNet that trains in milliseconds
QUICK = (*SMALL, "--games", "pong", "freeway", "--play-rows", 100, "--batch-size", 8, "--log-every", 1)


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


def run(script: str, *args, cwd: Path, code: int = 0, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs a script in a folder of its own, checks its exit code and returns what it printed."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr[-5000:]}"
    if code:  # what went wrong is said in a line, not in a traceback
        assert "Traceback" not in done.stderr, done.stderr[-5000:]
    return done


class Bomb:
    """What a pickle may hold: code that runs as it is read, and leaves a file behind."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A --cache-dir with 1,000 played rows of each of GAMES."""
    folder = tmp_path_factory.mktemp("cache")
    module = load("pretrain_atc.py")
    module.prepare(module.Args(cache_dir=folder), GAMES, 0)
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
