"""The patches of ablations/ apply to the scripts as they are, and what they make is a method of its own."""

import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT, SMALL, environment, load

FEW = ("--play-rows", "60", "--batch-size", "8", *SMALL)
PATCHES = sorted((ROOT / "ablations").glob("*.patch"))


def run(script: str, *args: str, cwd) -> None:
    command = [os.sys.executable, str(cwd / script), *args]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_makes_a_method_of_its_own(patch, tmp_path):
    """Pre-training and behaviour cloning by the patched scripts; the result is not that of the original method."""
    (script,) = {line[6:].strip() for line in patch.read_text().splitlines() if line.startswith("+++ b/pretrain")}
    for name in (script, "finetune_bc.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["patch", "-p1", "-s", "-F0", "-i", patch], cwd=tmp_path, check=True)
    run(script, *FEW, "--games", "pong", "--total-steps", "2", "--run-name", "mine", cwd=tmp_path)
    clone = ("--game", "pong", "--checkpoint", "runs/mine/checkpoint.pt", "--epochs", "1")
    run("finetune_bc.py", *FEW, *clone, "--eval-episodes", "1", "--max-episode-steps", "20", cwd=tmp_path)
    (result,) = (tmp_path / "results").rglob("*.json")
    method = json.loads(result.read_text())["method"]
    assert method not in {path.stem.removeprefix("pretrain_") for path in ROOT.glob("pretrain_*.py")}


@pytest.mark.parametrize("recipe", ["few-shot", "diversity", "depth-width"])
def test_recipe_calls_the_scripts_with_flags_that_they_have(recipe, tmp_path):
    """Each command that it would run is parsed by the script's own Args."""
    path = ROOT / "ablations" / f"{recipe}.sh"
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> commands\n')
    (tmp_path / "python").chmod(0o755)
    extra = ("--game", "pong") if recipe == "few-shot" else ()
    path_first = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", path, *extra], cwd=tmp_path, env=os.environ | path_first, check=True)
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    names = set()
    for script, *flags in commands:
        module = load(script)
        args = module.tyro.cli(module.Args, args=flags)
        names.add(args.method if recipe == "few-shot" else args.run_name)
        if recipe == "diversity":
            assert len(set(args.games)) * args.rows_per_checkpoint == 500_000
            assert set(args.games) <= set(module.ID_GAMES)
    assert len(names) == len(commands) > 2
