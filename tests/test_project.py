"""The project as a whole: shared sections, requirements, the table of games."""

import csv
import re
import tomllib

import pytest
import sync
from conftest import ROOT, load

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_equals_the_requirements(script):
    """PEP 723: `uv run pretrain_atc.py` installs what requirements.txt pins."""
    text = (ROOT / script).read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in block[1].splitlines()))
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert metadata == {"requires-python": ">=3.11", "dependencies": requirements}
    assert all("==" in requirement for requirement in requirements)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """No script imports another, or anything of the project."""
    imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / script).read_text(), re.MULTILINE)
    assert imported and not {name + ".py" for name in imported} & set(SCRIPTS)
    assert not {"tests", "conftest"} & set(imported)


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
            assert atc.TABLE_GAMES[int(row["game_id"])] == row["game"]
        environment = AtariVectorEnv(row["game"], 1)
        assert environment.single_action_space.n == int(row["minimal_actions"])
        environment.close()
    assert sum(map(len, splits.values())) == 65 and len(atc.TABLE_GAMES) == 60
    assert atc.parse_game("UpNDown") == atc.parse_game("up_n_down") == "up_n_down"


def test_defaults_are_the_papers():
    args = load("pretrain_atc.py").Args()
    assert (args.total_steps, args.batch_size, args.learning_rate, args.weight_decay) == (1_953_125, 512, 3e-4, 1e-5)
    assert (args.betas, args.adam_eps, args.max_grad_norm) == ((0.9, 0.999), 1e-8, 0.5)
    assert (args.future_offset, args.temperature) == (3, 1.0)
    assert (args.runs, args.checkpoints, args.rows_per_checkpoint) == ((1, 2), tuple(range(1, 11)), 10_000)
    args = load("finetune_bc.py").Args("pong")
    assert (args.epochs, args.batch_size, args.learning_rate, args.weight_decay) == (100, 512, 1e-3, 1e-4)
    assert (args.betas, args.max_grad_norm, args.epsilon) == ((0.9, 0.999), 0.5, 0.001)
    assert (args.runs, args.checkpoints, args.num_transitions) == ((1, 2, 3, 4, 5), (50,), 50_000)
    assert (args.eval_episodes, args.max_episode_steps, args.freeze_backbone) == (100, 27_000, True)
