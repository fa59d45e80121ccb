"""Learning is real: on frames that were not trained on, at a small width, after a few hundred steps."""

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import load, run

NETWORK = {"width_multiplier": 0.25, "blocks": (1, 1, 1, 1)}
FLAGS = ("--width-multiplier", 0.25, "--blocks", 1, 1, 1, 1)
TRAINED, UNSEEN = 2000, 1000  # rows of each game


def unseen_windows(module, shards, folder, length):
    """Batches of 64 of the windows of each shard's last UNSEEN rows, which were not trained on."""
    parts = []
    for i, (game_id, path) in enumerate(shards):
        parts.append((game_id, folder / f"unseen{i}.npy"))
        np.save(parts[-1][1], np.load(path)[-UNSEEN:])
    data = module.Windows(parts, length, 64, 0, "all")
    return [{name: torch.as_tensor(x) for name, x in data[i].items()} for i in range(data.batches - 1)]


def test_atc_retrieves_the_future_of_unseen_frames(tmp_path):
    """Accuracy of finding a stack's own future among 64, above 5 times chance; a game alone would tell 4 times."""
    games = ("riverraid", "up_n_down", "hero", "venture")
    atc = load("pretrain_atc.py")
    shards = atc.prepare(atc.Args(cache_dir=tmp_path, play_rows=TRAINED + UNSEEN), games, 0)
    data = ("--data-dir", tmp_path / f"played_{TRAINED + UNSEEN}", "--runs", 1, "--checkpoints", 1)
    steps = ("--total-steps", 200, "--batch-size", 64, "--rows-per-checkpoint", TRAINED)
    run("pretrain_atc.py", *FLAGS, *data, *steps, "--games", *games, cwd=tmp_path)

    objective = atc.ATC(atc.Args(**NETWORK))
    batches = unseen_windows(atc, shards, tmp_path, objective.length)
    content = torch.load(tmp_path / "runs" / "pretrain_atc__0" / "checkpoint.pt", weights_only=True)
    for name, part in objective.named_children():
        part.load_state_dict(content[name])
    with torch.no_grad():
        accuracy = np.mean([objective(batch)[1]["accuracy"].item() for batch in batches])
    assert accuracy > 5 / 64


def record_predictable_play(folder, rows):
    """Pong by a player whose action depends on the opponent alone: up while it is in the upper half, else down."""
    env = AtariVectorEnv("pong", 1, noop_max=0, use_fire_reset=False, reward_clipping=False)
    stack, _ = env.reset(seed=0)
    columns = {"observation": [], "action": [], "reward": [], "terminal": []}
    done = True
    while len(columns["action"]) <= rows:
        if done:
            for column, blank in zip(columns.values(), (np.zeros((84, 84), np.uint8), 0, 0.0, 0), strict=True):
                column += [blank] * 3
        frame = stack[0, -1]
        opponent = frame[14:77, 8:12] > 120  # the paddle on the left
        height = np.nonzero(opponent)[0].mean() if opponent.any() else 46
        action = 2 if height < 46 else 3  # row 46 of the court is the median of its paddle
        columns["observation"].append(frame.copy())
        stack, reward, terminated, truncated, _ = env.step(np.array([action]))
        done = bool(terminated[0] or truncated[0])
        for name, value in (("action", action), ("reward", reward[0]), ("terminal", done)):
            columns[name].append(value)
        if done:
            stack, *_ = env.step(np.array([action]))
    return {name: np.array(x) for name, x in columns.items()}


def test_cloned_behaviour_predicts_unseen_actions(tmp_path):
    """On a frozen random backbone, neck and head learn a predictable player far better than its commonest action."""
    import gzip

    bc = load("finetune_bc.py")
    replay = record_predictable_play(tmp_path, TRAINED + UNSEEN)
    for field, column in replay.items():
        (tmp_path / "data" / "Pong").mkdir(parents=True, exist_ok=True)
        with gzip.open(tmp_path / "data" / "Pong" / f"{field}_1_1.gz", "wb", compresslevel=1) as file:
            np.save(file, column.astype({"action": np.int32, "reward": np.float32}.get(field, np.uint8)))
    data = ("--data-dir", tmp_path / "data", "--runs", 1, "--checkpoints", 1, "--num-transitions", TRAINED)
    short = ("--epochs", 12, "--batch-size", 64, "--eval-episodes", 1, "--max-episode-steps", 5)
    run("finetune_bc.py", "--game", "pong", *FLAGS, *data, *short, cwd=tmp_path)

    torch.manual_seed(0)  # as the script: the same random backbone
    policy = bc.Policy(bc.ResNet(**NETWORK), freeze_backbone=True)
    saved = torch.load(tmp_path / "runs" / "finetune_bc__random__pong__0" / "policy.pt", weights_only=True)
    policy.neck.load_state_dict(saved["neck"])
    policy.head.load_state_dict(saved["head"])
    args = bc.Args("pong", data_dir=tmp_path / "data", runs=(1,), checkpoints=(1,), cache_dir=tmp_path / "cache")
    shards = bc.prepare(args, ("pong",), TRAINED + UNSEEN)
    hits, actions = [], []
    for batch in unseen_windows(bc, shards, tmp_path, 4):
        with torch.no_grad():
            logits = policy(bc.stack_frames(batch["frames"], batch["starts"])[:, 0] / 255)
        actions.append(batch["action"][:, -1].long())
        hits.append(logits.argmax(1) == actions[-1])
    accuracy = torch.cat(hits).float().mean().item()
    majority = torch.cat(actions).bincount().max().item() / torch.cat(actions).numel()
    assert majority < 0.8  # the player does vary
    assert accuracy > majority + 0.3 * (1 - majority)
