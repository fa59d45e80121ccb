"""The environment that agents are evaluated in is the benchmark's, and every episode of an evaluation counts once.

The oracle is gymnasium's Atari environment with its own preprocessing (OpenCV's area interpolation) and frame stack.
"""

import os

import ale_py
import gymnasium
import numpy as np
import pytest
from conftest import load
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

gymnasium.register_envs(ale_py)


@pytest.fixture
def bc():
    return load("finetune_bc.py")


class Noops(gymnasium.Wrapper):
    """Lets `noops` frames pass after a reset."""

    def __init__(self, env: gymnasium.Env, noops: int):
        super().__init__(env)
        self.noops = noops

    def reset(self, **options):
        result = self.env.reset(**options)
        for _ in range(self.noops):
            self.env.step(0)
        return result


def plain_env(game: str, noops: int = 0, **options) -> gymnasium.Env:
    """One environment as gymnasium makes it: no sticky actions, frame skip 4, stacks of 4 frames."""
    name = f"ALE/{''.join(word.capitalize() for word in game.split('_'))}-v5"
    options = dict(frameskip=1, repeat_action_probability=0, disable_env_checker=True) | options
    env = AtariPreprocessing(Noops(gymnasium.make(name, **options), noops), noop_max=0, frame_skip=4, screen_size=84)
    return FrameStackObservation(env, 4, padding_type="zero")


def play(module, game: str, policy, episodes: int, max_steps: int, epsilon: float, seed: int, video: bool = True):
    """Scores and frames of an evaluation."""
    args = module.Args(game, eval_episodes=episodes, max_episode_steps=max_steps, epsilon=epsilon, seed=seed)
    args.video = video
    return module.play_episodes(game, policy, args)


def values_of(actions: np.ndarray) -> np.ndarray:
    """Values [n, 18] that are the largest for these actions."""
    return np.eye(18)[actions]


def spy(module, monkeypatch) -> list:
    """Makes the module's environments, one for each episode, note themselves, their options and their actions."""
    made = []

    class Spy(module.AtariVectorEnv):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.options, self.actions = options, []
            made.append(self)

        def send(self, actions):
            self.actions.append(int(actions[0]))
            super().send(actions)

    monkeypatch.setattr(module, "AtariVectorEnv", Spy)
    return made


def pixel_sum(stacks: np.ndarray, actions: int) -> np.ndarray:
    """A deterministic policy that depends on every pixel of a stack."""
    return stacks.reshape(len(stacks), -1).sum(1, dtype=np.int64) % actions


@pytest.mark.parametrize("game", ["pong", "breakout", "ms_pacman", "skiing", "klax"])
def test_frames_are_those_of_gymnasium(bc, monkeypatch, game):
    """For the same actions, every step has to agree in the whole stack (so in every frame, the one after an episode's
    last action and the one after a reset included), in the raw reward, and in both flags, terminated and truncated."""
    limit, made = 300, spy(bc, monkeypatch)
    play(bc, game, lambda stacks, *_: values_of(np.zeros(len(stacks), int)), 1, max_steps=1, epsilon=0, seed=0)
    options = made[0].options | dict(noop_max=0, max_num_frames_per_episode=4 * limit)  # else as in evaluation
    env = bc.AtariVectorEnv(game, 1, **options)
    plain = plain_env(game, max_num_frames_per_episode=4 * limit)
    assert env.single_action_space.n == plain.action_space.n
    rng, action, ends, total = np.random.default_rng(1), 0, [], 0
    (stacks, _), (stack, _) = env.reset(seed=0), plain.reset(seed=0)
    assert stack[3].any()
    assert not stack[:3].any()
    np.testing.assert_array_equal(stacks[0], stack)
    for step in range(600):
        if rng.random() < 0.3:
            action = int(rng.integers(plain.action_space.n))
        stacks, rewards, terminations, truncations, _ = env.step(np.array([action]))
        stack, reward, terminated, truncated, _ = plain.step(action)
        total += abs(reward)
        assert (rewards[0], terminations[0], truncations[0]) == (reward, terminated, truncated), step
        np.testing.assert_array_equal(stacks[0], stack, err_msg=f"step {step}")
        if terminated or truncated:
            ends.append((terminated, truncated))
            stack, _ = plain.reset()
            stacks, rewards, terminations, truncations, _ = env.step(np.array([action]))  # the step that only resets
            assert (rewards[0], terminations[0], truncations[0]) == (0, False, False), step
            np.testing.assert_array_equal(stacks[0], stack, err_msg=f"reset after step {step}")
    assert ends  # of a lost game or of the time limit, so that resets were compared
    assert ((True, False) in ends) == (game in ("breakout", "klax"))
    assert total or game == "skiing"  # whose points come at the end of a run


@pytest.mark.parametrize(("game", "episodes", "max_steps"), [("breakout", 4, 200), ("ms_pacman", 3, 27_000)])
def test_every_episode_counts_once(bc, monkeypatch, game, episodes, max_steps):
    """Scores, what the policy is asked, and the frames are those of the episodes played one by one. No more is played:
    an environment stands still when its episode is over."""
    seed = 7
    first = int(np.random.default_rng(seed).integers(2**30))  # consecutive seeds, from here on, draw the no-ops
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
    _, info = bc.AtariVectorEnv(game, episodes, **options).reset(seed=first)
    noops = info["episode_frame_number"]
    assert len(set(noops)) > 1
    assert noops.min() >= 0
    assert noops.max() <= 30

    played, scores, largest = [], [], 0  # the stacks of each episode, its score, the largest reward of a step
    for episode in range(episodes):
        env = plain_env(game, int(noops[episode]))
        stack, _ = env.reset(seed=0)
        played.append([])
        scores.append(0)
        over = False
        while not over and len(played[-1]) < max_steps:
            played[-1].append(stack)
            stack, reward, terminated, truncated, _ = env.step(int(pixel_sum(stack[None], env.action_space.n)[0]))
            scores[-1] += reward
            largest = max(largest, reward)
            over = terminated or truncated
    lengths = [len(stacks) for stacks in played]
    assert len(set(lengths)) > 1  # some episodes go on when others are over
    if max_steps < 27_000:
        assert min(lengths) < max(lengths) == max_steps
    else:
        assert largest > 1  # it is raw points that are added up

    calls, last, actions, made = [], [], int(env.action_space.n), spy(bc, monkeypatch)

    def act(stacks, which, action, reward):
        calls.append(stacks.copy())
        last.append((which.copy(), action.copy(), reward.copy()))
        return values_of(pixel_sum(stacks, actions))

    found, frames = play(bc, game, act, episodes, max_steps, 0, seed)
    assert found.tolist() == scores
    assert [len(env.actions) for env in made] == lengths
    assert len(calls) == max(lengths)
    for step, stacks in enumerate(calls):  # asked of the running episodes alone
        np.testing.assert_array_equal(stacks, [stacks[step] for stacks in played if step < len(stacks)])
    totals = np.zeros(episodes)
    for step, (which, action, reward) in enumerate(last):  # which they are, and what they did and got before
        assert which.tolist() == [i for i, stacks in enumerate(played) if step < len(stacks)]
        before = [played[i][step - 1] for i in which] if step else None
        assert action.tolist() == (pixel_sum(np.array(before), actions).tolist() if step else [0] * episodes)
        totals[which] += reward
    assert (totals <= scores).all() and totals.any()  # all but what the last steps brought
    assert not calls[0][:, :3].any()
    assert calls[0][:, 3].any((1, 2)).all()
    np.testing.assert_array_equal(frames, [stack[-1] for stack in played[0][:1800]])  # two minutes at most


def test_episodes_are_those_of_one_vector_environment(bc):
    """The random actions, too: the plain way steps all episodes until the last one ends."""
    seed, episodes, max_steps, epsilon = 3, 8, 160, 0.3
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False, max_num_frames_per_episode=4 * max_steps)
    env, rng = bc.AtariVectorEnv("breakout", episodes, **options), np.random.default_rng(seed)
    stacks, _ = env.reset(seed=int(rng.integers(2**30)))
    scores, running, steps = np.zeros(episodes), np.full(episodes, True), []
    while running.any():
        steps.append((running.copy(), stacks[running].copy()))
        random, values = rng.integers(4, size=episodes), pixel_sum(stacks, 4)
        stacks, rewards, terminated, truncated, _ = env.step(np.where(rng.random(episodes) < epsilon, random, values))
        scores += rewards * running
        running &= ~(terminated | truncated)
    assert len({int(running.sum()) for running, _ in steps}) > 2  # episodes of different lengths
    assert len(set(scores)) > 1

    calls = []

    def act(stacks, which, *_):
        calls.append((which, stacks))
        return values_of(pixel_sum(stacks, 4))

    found, _ = play(bc, "breakout", act, episodes, max_steps, epsilon, seed)
    assert found.tolist() == scores.tolist()
    assert len(calls) == len(steps)
    for (which, stacks), (running, expected) in zip(calls, steps, strict=True):
        assert which.tolist() == running.nonzero()[0].tolist()
        np.testing.assert_array_equal(stacks, expected)


def test_an_evaluation_leaves_no_threads(bc):
    """Zero-shot play evaluates 50 games in one process."""
    threads = len(os.listdir("/proc/self/task"))
    most = []

    def act(stacks, *_):
        most.append(len(os.listdir("/proc/self/task")))
        return values_of(np.zeros(len(stacks), int))

    play(bc, "pong", act, episodes=5, max_steps=3, epsilon=0, seed=0)
    assert max(most) >= threads + 5
    assert len(os.listdir("/proc/self/task")) <= threads


def test_play_stops_at_max_steps(bc):
    calls = []

    def act(stacks, *_):
        calls.append(len(stacks))
        return values_of(np.zeros(len(stacks), int))

    scores, frames = play(bc, "pong", act, episodes=3, max_steps=25, epsilon=0, seed=0)
    assert calls == [3] * 25
    assert len(frames) == 25
    assert scores.shape == (3,)


def test_random_actions_are_all_of_the_games(bc, monkeypatch):
    """epsilon = 1: uniform over all 18 actions, the last one too, whatever the policy says."""
    made = spy(bc, monkeypatch)
    act = lambda stacks, *_: values_of(np.full(len(stacks), 4))  # noqa: E731
    play(bc, "boxing", act, episodes=4, max_steps=180, epsilon=1, seed=0)
    counts = np.bincount([action for env in made for action in env.actions], minlength=18)
    assert counts.sum() == 4 * 180
    assert len(counts) == 18
    assert counts.min() > 15  # 40 expected, a standard deviation is about 6
    assert counts.max() < 65


def test_epsilon_is_the_probability_of_a_random_action(bc, monkeypatch):
    made, asked = spy(bc, monkeypatch), []

    def act(stacks, which, action, reward):
        asked.append((which, action))
        return values_of(np.full(len(stacks), 4))

    play(bc, "boxing", act, episodes=2, max_steps=100, epsilon=0, seed=0)
    assert sum(len(which) for which, _ in asked) == 2 * 100
    assert {action for env in made for action in env.actions} == {4}  # nothing else was ever played

    asked.clear()
    made.clear()
    play(bc, "boxing", act, episodes=4, max_steps=180, epsilon=0.25, seed=0)
    actions = np.array([action for env in made for action in env.actions])
    told = [action[which == 0] for which, action in asked[1:]]  # of the last step, the drawn actions too
    assert np.concatenate(told).tolist() == made[0].actions[: len(told)]
    assert 0.7 < (actions == 4).mean() < 0.83
    assert set(actions) == set(range(18))


def test_play_is_a_function_of_its_seed(bc):
    def frames(seed):
        act = lambda stacks, *_: values_of(pixel_sum(stacks, 9))  # noqa: E731
        return np.array(play(bc, "ms_pacman", act, 1, 60, 0.5, seed)[1])

    np.testing.assert_array_equal(frames(0), frames(0))
    assert (frames(0) != frames(1)).any()


def test_actions_that_a_game_lacks_are_never_taken(bc, monkeypatch):
    """However large their values are: of 18, a game with 6 uses the first 6."""
    made = spy(bc, monkeypatch)
    play(bc, "pong", lambda stacks, *_: np.tile(np.arange(18.0), (len(stacks), 1)), 2, 50, 0, 0)
    assert [env.actions for env in made] == 2 * [50 * [5]]
