"""The project as a whole: shared sections, lengths and differences of the scripts, requirements, flags, games."""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import sync
from conftest import PRETRAINING, ROOT, load

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def test_shared_sections_are_identical():
    assert sync.first_difference([ROOT / script for script in SCRIPTS]) is None


def test_sync_names_the_first_difference_and_mends_it(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("x\n\n\n# === one [shared] ===\n1\n2\n\n\n# === two ===\nmine\n")
    b.write_text("y\n\n\n# === zero ===\n0\n\n\n# === one [shared] ===\n1\n3\n")
    difference = sync.first_difference([a, b])
    assert difference == "b.py:10: section 'one [shared]' differs from a.py's in its line 3"
    assert sync.copy(a, [a, b]) == ["b.py: one [shared]"]
    assert b.read_text() == "y\n\n\n# === zero ===\n0\n\n\n# === one [shared] ===\n1\n2\n"
    assert a.read_text().endswith("# === two ===\nmine\n")
    assert sync.first_difference([a, b]) is None


def test_a_section_of_ones_own_is_left_alone(tmp_path):
    """Without `[shared]` in its banner, a section is neither compared nor overwritten: as an ablation needs it."""
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("# === one [shared] ===\n1\n")
    b.write_text("# === one ===\n2\n")
    assert sync.first_difference([a, b]) is None and sync.copy(a, [a, b]) == []
    assert b.read_text() == "# === one ===\n2\n"


PACKAGES = {"ale_py": "ale-py", "PIL": "pillow"}  # of modules with other names


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_is_what_the_script_imports(script):
    """PEP 723: `uv run pretrain_atc.py` installs what it imports, as requirements.txt pins it, and nothing else."""
    text = (ROOT / script).read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert all("==" in requirement for requirement in requirements)
    modules = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    packages = {PACKAGES.get(module, module) for module in modules}
    if "torch.utils.tensorboard" in text:
        packages.add("tensorboard")
    expected = [requirement for requirement in requirements if requirement.partition("==")[0] in packages]
    assert metadata == {"requires-python": ">=3.11", "dependencies": expected}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """No script imports another, or anything of the project."""
    imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / script).read_text(), re.MULTILINE)
    assert imported and not {name + ".py" for name in imported} & set(SCRIPTS)
    assert not {"tests", "conftest"} & set(imported)


PYTHON = """#!/bin/bash
# A Python that is of version $VERSION, makes copies of itself as environments, and does nothing else but note it.
case "$1" in
  -c) exec {python} -c "import sys; sys.version_info = ($VERSION,); $2" ;;
  -m) if [ "$2" = venv ]; then rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi ;;
esac
echo "$*" >> "{log}"
"""


def test_make_in_a_folder_with_a_space_and_after_an_old_python(tmp_path):
    """All its recipes find the environment's Python; an old Python makes nothing that a right one would keep."""
    folder, log = tmp_path / "a folder", tmp_path / "log"
    (folder / "benchmarks").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, log=log))
    python.chmod(0o755)

    def make(target: str, version: str) -> subprocess.CompletedProcess:
        options = dict(cwd=folder, env=os.environ | {"VERSION": version}, capture_output=True, text=True)
        return subprocess.run(["make", f"PYTHON={python}", target], **options)

    done = make("quickstart", "3, 10")
    assert done.returncode != 0 and "Python 3.11 or later is needed" in done.stderr
    assert not (folder / ".venv").exists() and not log.exists()
    for target in ("quickstart", "table", "test", "test-slow", "bench", "sync"):
        done = make(target, "3, 12")
        assert done.returncode == 0, (target, done.stderr[-3000:])
    commands = log.read_text()
    assert commands.count("-m venv --clear .venv") == 1  # and is left as it is
    for called in ("../pretrain_cql.py", "../eval_probe.py", "-m pytest", "benchmarks/step.py", "tests/sync.py"):
        assert called in commands


def test_commands_in_the_documentation_have_flags_that_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for script, flags in re.findall(r"(\w+\.py)((?:(?!\w+\.py)[^\n'])*)", block.replace("\\\n", " ")):
                known = load(script).Args.__dataclass_fields__
                for flag in re.findall(r"--([a-z-]+)", flags):
                    assert flag.replace("-", "_") in known, f"{page.name}: {script} --{flag}"


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script):
    """As --help shows it: what a flag is, before its default."""
    module = load(script)
    flags = {action.option_strings[0]: action.help for action in module.tyro.extras.get_parser(module.Args)._actions}
    assert len(flags) > len(module.Args.__dataclass_fields__)
    bare = [flag for flag, text in flags.items() if not re.match(r"\w", re.sub(r"\(.*", "", text or ""))]
    assert not bare


def test_performance_tells_of_every_benchmark():
    page = (ROOT / "docs" / "performance.md").read_text()
    (parts,) = re.findall(r"for part in ([\w ]+);", (ROOT / "Makefile").read_text())
    others = {"common", "players", "rainbow_learning", "study"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - others
    assert set(parts.split()) == files
    assert all(f"`python benchmarks/{part}.py`" in page for part in files)


@pytest.mark.parametrize("target", ["quickstart", "table"])
def test_make_sets_the_allocator(target, tmp_path):
    """Every script that these targets start has its settings."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$MALLOC_MMAP_MAX_ $MALLOC_TRIM_THRESHOLD_" >> {tmp_path}/started\n')
    python.chmod(0o755)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "installed").touch()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "MAKE"))}
    subprocess.run(["make", "-f", ROOT / "Makefile", target], cwd=tmp_path, env=bare, check=True, capture_output=True)
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) > 15 and set(started) == {f"0 {2**34}"}


def test_games_are_the_benchmarks():
    """Names, splits, ids and action counts are those of the score table, and of ale-py's environments."""
    from ale_py.vector_env import AtariVectorEnv

    atc = load("pretrain_atc.py")
    with open(ROOT / "tests" / "golden" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 65
    splits = {"id": atc.ID_GAMES, "near_ood": atc.NEAR_OOD_GAMES, "far_ood": atc.FAR_OOD_GAMES}
    for row in rows:
        assert row["game"] in splits[row["split"]]
        if row["game_id"]:
            assert atc.DQN_REPLAY_GAMES[int(row["game_id"])] == row["game"]
        environment = AtariVectorEnv(row["game"], 1)
        assert environment.single_action_space.n == int(row["minimal_actions"])
        environment.close()
    assert sum(map(len, splits.values())) == 65 and len(atc.DQN_REPLAY_GAMES) == 60
    assert sorted(splits["id"] + splits["near_ood"]) == atc.DQN_REPLAY_GAMES
    for name in ("UpNDown", "up_n_down", "upndown"):
        assert atc.parse_game(name, atc.DQN_REPLAY_GAMES) == "up_n_down"
    with pytest.raises(SystemExit, match=r"^Unknown game 'klax'\. Choose from: air_raid "):
        atc.parse_game("klax", atc.DQN_REPLAY_GAMES)


CONVOLUTIONAL = {"weight_decay": 1e-5, "betas": (0.9, 0.999), "max_grad_norm": 0.5, "batch_size": 512}
MASKED = {
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "max_grad_norm": math.inf,
    "batch_size": 512,
    "learning_rate": 3e-4,
}
DEFAULTS = {
    "curl": CONVOLUTIONAL | {"learning_rate": 3e-6, "temperature": 1.0},
    "atc": CONVOLUTIONAL | {"learning_rate": 3e-4, "temperature": 1.0, "future_offset": 3},
    "mae": MASKED | {"mask_ratio": 0.9},
    "siammae": MASKED | {"mask_ratio": 0.95, "max_future_offset": 3},
    "bc": CONVOLUTIONAL | {"learning_rate": 1e-4},
    "spr": CONVOLUTIONAL | {"learning_rate": 3e-5, "batch_size": 128, "prediction_steps": 4},
    "idm": CONVOLUTIONAL | {"learning_rate": 3e-4},
    "r3m": CONVOLUTIONAL | {"learning_rate": 3e-4, "temperature": 1.0, "future_offsets": (3, 6)},
    "spr_idm": CONVOLUTIONAL
    | {"learning_rate": 3e-5, "batch_size": 128, "prediction_steps": 4}
    | {"spr_weight": 2.0, "idm_weight": 1.0},
    "dt": CONVOLUTIONAL
    | {"learning_rate": 1e-4, "weight_decay": 0.05, "betas": (0.9, 0.95), "batch_size": 64}
    | {"total_steps": 1_875_000, "context_steps": 8, "return_scale": 0.01},
    "cql": CONVOLUTIONAL
    | {"learning_rate": 1e-4, "adam_eps": 1.5e-4, "loss": "distributional", "atoms": 51}
    | {"max_return": 10.0, "n_steps": 3, "discount": 0.99, "conservative_weight": 0.1, "target_momentum": 0.99},
}


@pytest.mark.parametrize("objective", DEFAULTS)
def test_defaults_are_the_papers(objective):
    args = load(f"pretrain_{objective}.py").Args()
    expected = {"total_steps": 1_953_125, "adam_eps": 1e-8, "rows_per_checkpoint": 10_000} | DEFAULTS[objective]
    expected |= {"runs": (1, 2), "checkpoints": tuple(range(1, 11)), "blocks": (3, 4, 6, 3), "width_multiplier": 1.0}
    assert {name: getattr(args, name) for name in expected} == expected


def test_defaults_of_fine_tuning_are_the_papers():
    args = load("finetune_bc.py").Args("pong")
    assert (args.epochs, args.batch_size, args.learning_rate, args.weight_decay) == (100, 512, 1e-3, 1e-4)
    assert (args.max_grad_norm, args.epsilon) == (0.5, 0.001)
    assert args.num_transitions == 50_000  # which runs and checkpoints: test_finetune.py
    assert (args.eval_episodes, args.max_episode_steps, args.freeze_backbone) == (100, 27_000, True)


def test_defaults_of_rainbow_are_the_papers():
    args = load("finetune_rainbow.py").Args("pong")
    assert (args.total_steps, args.learning_starts, args.updates_per_step, args.batch_size) == (50_000, 2_000, 2, 32)
    assert (args.learning_rate, args.adam_eps, args.max_grad_norm, args.target_momentum) == (1e-4, 1.5e-4, 10, 0.99)
    assert (args.discount, args.n_steps, args.atoms, args.max_return) == (0.99, 10, 51, 10)
    assert (args.priority_exponent, args.importance_exponent) == (0.5, 0.4)
    assert (args.exploration_steps, args.exploration_final) == (10_000, 0.01)
    assert (args.episodic_life, args.repeat_action_probability, args.freeze_backbone) == (True, 0, True)
    assert (args.eval_episodes, args.max_episode_steps, args.epsilon) == (100, 27_000, 0.001)
    recorder = load("record_replay.py").Args("klax", None)  # of the far-OOD games
    of_its_own = {"total_steps": 2_000_000, "learning_starts": 20_000, "updates_per_step": 1, "seed": 1}
    of_its_own |= {"exploration_steps": 1_000_000, "exploration_final": 0.02, "precision": "fp32"}
    for name in vars(args).keys() & vars(recorder).keys() - {"game"}:
        assert getattr(recorder, name) == of_its_own.get(name, getattr(args, name)), name
    assert (recorder.replay_capacity, recorder.steps_per_checkpoint) == (1_000_000, 1_000_000)
    assert recorder.rows_per_checkpoint == 50_000


MOST_LINES = dict.fromkeys(("atc", "curl", "bc", "idm", "r3m", "cql", "spr"), 785)
MOST_LINES |= dict.fromkeys(("mae", "siammae", "dt", "spr_idm"), 880)
MOST_LINES = {f"pretrain_{objective}.py": lines for objective, lines in MOST_LINES.items()}
MOST_LINES |= {"finetune_rainbow.py": 730, "record_replay.py": 660}
MOST_LINES |= {"finetune_bc.py": 640, "eval_probe.py": 650, "eval_zeroshot.py": 470}


@pytest.mark.parametrize("script", MOST_LINES)
def test_a_script_can_be_read(script):
    """A file that one wants to copy is short."""
    assert (ROOT / script).read_text().count("\n") <= MOST_LINES[script]
    assert set(PRETRAINING) < MOST_LINES.keys()


def changed_lines(script: str) -> int:
    """What `diff pretrain_atc.py SCRIPT` shows, both sides."""
    shown = subprocess.run(["diff", ROOT / "pretrain_atc.py", ROOT / script], capture_output=True, text=True).stdout
    return sum(line.startswith(("<", ">")) for line in shown.splitlines())


MOST_CHANGES = dict.fromkeys(("curl", "r3m"), 60) | dict.fromkeys(("bc", "idm", "spr"), 110)
MOST_CHANGES |= dict.fromkeys(("spr_idm", "dt", "cql"), 195) | dict.fromkeys(("mae", "siammae"), 310)


@pytest.mark.parametrize("objective", MOST_CHANGES)
def test_a_diff_is_the_difference_between_two_papers(objective):
    assert 0 < changed_lines(f"pretrain_{objective}.py") <= MOST_CHANGES[objective]
    assert len(MOST_CHANGES) == len(PRETRAINING) - 1


@pytest.mark.parametrize("script", PRETRAINING)
def test_docstring_tells_what_the_script_does(script):
    """Its commands name the script itself; the epochs and the rows played are those of the defaults."""
    module = load(script)
    text, args = module.__doc__, module.Args()
    assert set(re.findall(r"\w+\.py", text)) == {script}
    (epochs,) = re.findall(r"(\d+) epochs", text)
    assert int(epochs) == round(args.total_steps * args.batch_size / 10e6)
    assert f"plays {args.play_rows:,} random steps of each game" in text


def test_readme_tells_the_lines_of_each_objective():
    """Wherever it gives a number of lines."""
    for script, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert int(lines) == (ROOT / script).read_text().count("\n"), script
