"""Learning is real: on frames that were not trained on, at a small width, after a few hundred steps.

No objective is trained well in this time: where knowing the game alone would give something, the test says what.
"""

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import load, run, train, write_replay

pytestmark = pytest.mark.slow

NETWORK = {"width_multiplier": 0.25, "blocks": (1, 1, 1, 1)}
FLAGS = ("--width-multiplier", 0.25, "--blocks", 1, 1, 1, 1)
FEW_FILES = ("--runs", 1, "--checkpoints", 1)
GAMES = ("riverraid", "up_n_down", "hero", "venture")  # in which stacks differ from each other even in random play
TWO = GAMES[:2]  # predictable players are learned sooner in two games
TRAINED, UNSEEN = 2000, 1000  # rows of each game
BATCHES = 5  # unseen batches of 64 to judge by


def unseen_windows(module, shards, folder, length):
    """Batches of 64 of windows of each shard's last UNSEEN rows, which were not trained on."""
    parts = []
    for i, (game_id, path) in enumerate(shards):
        parts.append((game_id, folder / f"unseen{i}.bin"))
        np.fromfile(path, module.ROW)[-UNSEEN:].tofile(parts[-1][1])
    data = module.Windows(parts, length, 64, 0, "train")
    return [module.unpack(*data.batch(i), "cpu") for i in range(data.batches)]


class Learned:
    """The objective of pretrain_<method>.py, trained on the first rows of the games, and batches of the later rows.

    As in `train`, its networks are made for these games alone.
    """

    def __init__(self, method, folder, data_dir, games, **changes):
        self.module = load(f"pretrain_{method}.py")
        given = [text for name, value in changes.items() for text in (f"--{name.replace('_', '-')}", value)]
        data = ("--data-dir", data_dir, *FEW_FILES, "--rows-per-checkpoint", TRAINED, "--cache-dir", data_dir / "cache")
        run_name = ("--run-name", method)
        train(f"pretrain_{method}.py", *FLAGS, *run_name, *data, *given, "--games", *games, cwd=folder, games=games)
        content = torch.load(folder / "runs" / method / "checkpoint.pt", weights_only=True)

        args = self.module.Args(data_dir=data_dir, cache_dir=data_dir / "cache", runs=(1,), checkpoints=(1,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, "DQN_REPLAY_GAMES", sorted(games))
            self.trained_shards, _ = self.module.prepare(args, games, TRAINED)
            shards, _ = self.module.prepare(args, games, TRAINED + UNSEEN)
            self.objective = self.module.Objective(self.module.Args(**NETWORK, **changes))
        for name, part in self.objective.named_children():
            part.load_state_dict(content[name])
        self.objective.eval()
        self.batches = unseen_windows(self.module, shards, folder, self.objective.length)[:BATCHES]

    def metrics(self):
        """Means of the metrics over the unseen samples, augmented as in training."""
        torch.manual_seed(0)
        with torch.no_grad():
            results = [self.objective(batch)[1] for batch in self.batches]
        return {name: np.mean([result[name].item() for result in results]) for name in results[0]}

    def masked_errors(self):
        """The squared error on masked pixels of unseen stacks, and that of the mean frame of all rows trained on.

        The stacks are not augmented; SiamMAE also gets the stacks 3 steps before.
        """
        mean_frame = (
            np.mean([np.fromfile(path, self.module.ROW)["frame"].mean(0) for _, path in self.trained_shards], 0) / 255
        )
        generator, errors = torch.Generator().manual_seed(0), []
        for batch in self.batches:
            stacks = self.module.stack_frames(batch["frames"], batch["is_first"]) / 255  # [b, 1 or 4, 4, 84, 84]
            views, target = stacks[:, :: max(1, stacks.shape[1] - 1)].unbind(1), stacks[:, -1]
            noise = torch.rand(len(stacks), 36, generator=generator)
            with torch.no_grad():
                pixels, masked = self.objective.reconstruct(*views, batch["game_id"], noise)
            masked = masked.expand_as(target)
            errors.append([(guess - target)[masked].square().mean() for guess in (pixels, torch.tensor(mean_frame))])
        return np.mean(errors, 0)

    def majority(self):
        """The accuracy of always naming the commonest unseen action of a game."""
        games = torch.cat([batch["game_id"] for batch in self.batches])
        actions = torch.cat([batch["action"][:, 3] for batch in self.batches]).long()
        return sum(actions[games == game].bincount().max().item() for game in games.unique()) / len(actions)


@pytest.fixture(scope="module")
def random_play(tmp_path_factory):
    """A --data-dir of random play."""
    folder, rng = tmp_path_factory.mktemp("random"), np.random.default_rng(0)
    for game in GAMES:
        record(folder, game, lambda frame: int(rng.integers(6)), TRAINED + UNSEEN)
    return folder


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("atc", {"total_steps": 100, "batch_size": 32, "learning_rate": 1e-3}),  # the default is for 2M steps
        ("curl", {"total_steps": 80, "batch_size": 32, "learning_rate": 1e-3}),
        ("r3m", {"total_steps": 200, "batch_size": 32, "learning_rate": 1e-3}),
        ("spr", {"total_steps": 80, "batch_size": 16, "learning_rate": 3e-4}),
    ],
)
def test_contrast_finds_the_own_key_of_unseen_frames(method, changes, tmp_path, random_play):
    """Among the keys of 64 samples, above 5 times chance; the game alone would tell 4 times.

    The own key is ATC's stack 3 steps later, CURL's other view, SPR's stack 1 to 4 steps ahead, R3M's stack 3 steps
    later, to be told from the one 6 steps later, too.
    """
    learned = Learned(method, tmp_path, random_play, GAMES, **changes)
    keys = 64 * (4 if method == "spr" else 1)
    assert learned.metrics()["accuracy"] > 5 / keys


def test_masked_autoencoders_reconstruct_unseen_frames(tmp_path, random_play):
    """The error in masked cells: MAE's below 0.8 of the mean frame's; SiamMAE's, which sees an earlier stack, lower."""
    equally = {"total_steps": 200, "batch_size": 8, "learning_rate": 1.6e-3, "mask_ratio": 0.9}
    error, mean_frame_error = Learned("mae", tmp_path, random_play, GAMES, **equally).masked_errors()
    assert error < 0.8 * mean_frame_error
    error_with_the_past, _ = Learned("siammae", tmp_path, random_play, GAMES, **equally).masked_errors()
    assert error_with_the_past < error


def record(data_dir, game, player, rows):
    """A replay of a game, without sticky actions, by a player: a function of its newest frame."""
    env = AtariVectorEnv(game, 1, noop_max=0, use_fire_reset=False, reward_clipping=False)
    stack, _ = env.reset(seed=0)
    columns = {"observation": [], "action": [], "reward": [], "terminal": []}
    done = True
    while len(columns["action"]) <= rows:
        if done:
            for column, blank in zip(columns.values(), (np.zeros((84, 84), np.uint8), 0, 0.0, 0), strict=True):
                column += [blank] * 3
        frame = stack[0, -1].copy()
        action = player(frame)
        stack, reward, terminated, truncated, _ = env.step(np.array([action]))
        done = bool(terminated[0] or truncated[0])
        for column, value in zip(columns.values(), (frame, action, reward[0], done), strict=True):
            column.append(value)
        if done:
            stack, *_ = env.step(np.array([action]))
    write_replay(data_dir, game, columns)


def pong_follower():
    """Up while the opponent, the paddle on the left, is in the upper half of the court, else down."""

    def player(frame):
        opponent = frame[14:77, 8:12] > 120
        height = np.nonzero(opponent)[0].mean() if opponent.any() else 46
        return 2 if height < 46 else 3  # row 46 of the court is the median of its paddle

    return player


def brightness_follower():
    """Action 3 while the upper half of the frame outshines the lower one more than it usually does, else 2."""
    seen = []

    def player(frame):
        seen.append(frame[:42].mean() - frame[42:].mean())
        return 3 if seen[-1] >= np.median(seen[-500:]) else 2

    return player


@pytest.fixture(scope="module")
def predictable_play(tmp_path_factory):
    """A --data-dir of a player whose action depends on the frame alone."""
    folder = tmp_path_factory.mktemp("predictable")
    for game in TWO:
        record(folder, game, brightness_follower(), TRAINED + UNSEEN)
    return folder


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("bc", {"total_steps": 150, "batch_size": 16}),
        ("idm", {"total_steps": 150, "batch_size": 16}),
        ("spr_idm", {"total_steps": 60, "batch_size": 16}),
        ("dt", {"total_steps": 60, "batch_size": 8}),
        ("cql", {"total_steps": 150, "batch_size": 16, "learning_rate": 1e-3, "conservative_weight": 1.0}),
    ],
)
def test_actions_of_a_predictable_player_are_predicted_on_unseen_frames(method, changes, tmp_path, predictable_play):
    """Far better than by each game's commonest action. The present tells this action; IDM sees the next stack too.

    Of DT it is the action of each of its 8 steps, of CQL that of the largest value: its conservative term, weighted
    more than by default, teaches it sooner than the rewards.
    """
    learned = Learned(method, tmp_path, predictable_play, TWO, **{"learning_rate": 5e-4} | changes)
    majority = learned.majority()
    assert majority < 0.7  # the player does vary
    assert learned.metrics()["accuracy"] > majority + 0.2 * (1 - majority)


def test_cloned_behaviour_predicts_unseen_actions(tmp_path):
    """On a frozen random backbone, neck and head learn a predictable player far better than its commonest action."""
    bc, play = load("finetune_bc.py"), tmp_path / "play"
    record(play, "pong", pong_follower(), TRAINED + UNSEEN)
    data = ("--data-dir", play, *FEW_FILES, "--num-transitions", TRAINED)
    learning = ("--epochs", 20, "--learning-rate", 3e-3, "--batch-size", 64)
    short = ("--eval-episodes", 1, "--max-episode-steps", 5)
    run("finetune_bc.py", "--game", "pong", *FLAGS, *data, *learning, *short, cwd=tmp_path)

    torch.manual_seed(0)  # as the script: the same random backbone
    policy = bc.Policy(bc.ResNet(**NETWORK).requires_grad_(False))
    (path,) = tmp_path.glob("runs/*/policy.pt")
    saved = torch.load(path, weights_only=True)
    policy.neck.load_state_dict(saved["neck"])
    policy.head.load_state_dict(saved["head"])
    pretraining = load("pretrain_bc.py")
    args = bc.Args("pong", data_dir=play, runs=(1,), checkpoints=(1,), cache_dir=tmp_path / "cache")
    shards, _ = bc.prepare(args, ["pong"], TRAINED + UNSEEN)
    hits, actions = [], []
    for batch in unseen_windows(pretraining, shards, tmp_path, 4):
        with torch.no_grad():
            logits = policy(bc.stack_frames(batch["frames"], batch["is_first"])[:, 0] / 255)
        actions.append(batch["action"][:, -1].long())
        hits.append(logits.argmax(1) == actions[-1])
    accuracy = torch.cat(hits).float().mean().item()
    majority = torch.cat(actions).bincount().max().item() / torch.cat(actions).numel()
    assert majority < 0.8  # the player does vary
    assert accuracy > majority + 0.3 * (1 - majority)
