"""Every flag of every script, given a value out of its range, ends the program in one line before any work is done."""

import dataclasses
import typing
from pathlib import Path

import pytest
from conftest import PRETRAINING, ROOT, SMALL, load

SCRIPTS = [*PRETRAINING, *sorted(path.name for path in ROOT.glob("*_*.py") if path.name not in PRETRAINING)]
ENTRIES = {"finetune": "finetune", "pretrain": "train", "eval_zeroshot": "evaluate", "eval_probe": "main"}
FROM_ZERO = """seed num_workers learning_rate weight_decay adam_eps max_grad_norm eval_samples future_offset temperature
    mask_ratio spr_weight idm_weight discount max_return conservative_weight epsilon updates_per_step target_momentum
    priority_exponent importance_exponent exploration_steps exploration_final repeat_action_probability
    save_replay_rows width_multiplier""".split()  # all other numbers must be at least 1
UP_TO_ONE = """discount epsilon target_momentum importance_exponent exploration_final
    repeat_action_probability""".split()
BAD = {  # beside those which no number may have
    "atoms": ["1"],
    "temperature": ["0"],
    "mask_ratio": ["1"],
    "max_return": ["0"],
    "return_scale": ["nan", "inf"],
    "width_multiplier": ["0", "0.01", "1000"],
    "learning_starts": ["0", "1000000"],
    "blocks": ["0 1 1 1", "1 1 1", "1 1 1 101"],
    "betas": ["1 0.9", "0.9 -1", "nan 0.9"],
    "runs": ["", "-1", "1 1"],
    "checkpoints": ["", "-1", "1 1"],
    "future_offsets": ["-1 3", "3 3", "6 3"],
    "games": ["pongg"],
    "game": ["pongg"],
    "device": ["nonsense", "cuda:99"],
    "run_name": ["..", "a/b"],
    "method": ["..", "a/b"],
    "suites": ["nonsense"],
    "methods": ["nonsense"],
    "improvement_over": ["nonsense"],
    "data_dir": ["nowhere"],
    "checkpoint": ["nowhere.pt"],
    "models": ["nowhere.pt"],
    "csv": ["nowhere.csv"],
    "cache_dir": ["/dev/null"],
    "results": ["/dev/null/results"],
    "output_dir": ["/dev/null"],
    "replay_dir": ["/dev/null"],
    "save_replay": ["/dev/null"],
}
NEEDS = {  # what else the flag needs for its value to be looked at
    "save_replay": ["--save-replay-every", "10000"],
    "save_replay_every": ["--save-replay", "replay"],
}


def bad_values(name: str, kind: type) -> list[str]:
    """Values that a flag of this type must refuse."""
    if name in BAD and kind not in (int, float):
        return BAD[name]
    if kind is bool:
        return ["maybe"]
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense"]
    assert kind in (int, float), f"--{name} has no value here that is out of its range"
    values = BAD.get(name, []) + (["many", str(2**63)] if kind is int else ["many", "nan"])
    if name == "return_scale":
        return values
    if name not in FROM_ZERO:
        values.append("0")
    if name in UP_TO_ONE:
        values.append("1.5")
    if kind is float and name != "max_grad_norm":
        values.append("inf")
    return [*values, "-1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flag_out_of_range(script, alone, tmp_path, monkeypatch, capsys):
    """Any flag of any script out of its range: one line that names it, exit code 1 or 2, nothing made."""
    module = load(script)
    stem = script.removesuffix(".py")
    main = getattr(module, ENTRIES.get(stem) or ENTRIES.get(stem.split("_")[0], "report"))
    scores = tmp_path / "scores.csv"
    scores.write_text("suite,method,game,seed,score\nbc,random,pong,0,1\nbc,atc,pong,0,2\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    needed = {"finetune_bc": ["--game", "pong", *SMALL], "finetune_rainbow": ["--game", "pong", *SMALL]}
    needed["eval_zeroshot"] = ["--checkpoint", str(alone("pretrain_bc.py")[0] / "runs/pretrain_bc__7/checkpoint.pt")]
    needed["eval_iqm"] = ["--csv", str(scores)]
    base = needed.get(stem, SMALL)
    hints = typing.get_type_hints(module.Args)
    for field in dataclasses.fields(module.Args):
        kind = next((kind for kind in typing.get_args(hints[field.name]) if kind is Path), hints[field.name])
        for value in bad_values(field.name, kind):
            flag = f"--{field.name.replace('_', '-')}"
            given = [f"{flag}={value}"] if kind is bool else [flag, *value.split()]
            others = [] if (stem, field.name) == ("eval_iqm", "results") else base
            with pytest.raises(SystemExit) as end:
                main(module.tyro.cli(module.Args, args=[*others, *NEEDS.get(field.name, []), *given]))
            printed = capsys.readouterr()
            if end.value.code != 2:
                assert isinstance(end.value.code, str), f"{given}: exit code {end.value.code}"  # the code then is 1
                assert "\n" not in end.value.code, end.value.code
                assert flag in end.value.code or (value and value in end.value.code), f"{given}: {end.value.code}"
            else:
                assert flag in printed.err or value in printed.err, f"{given}: {printed}"
            assert not [*Path().iterdir()], f"{given} has left {[*Path().iterdir()]}"
