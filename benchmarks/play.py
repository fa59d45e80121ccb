"""Agent steps per second of playing, against the bare environment in the same number.

    python benchmarks/play.py

The bare way steps an `AtariVectorEnv` and does nothing else. Ours are `play_episodes`, with a player that does not
think, and whose clock starts as it is first asked, when the environments are there; and `play_game`, which makes the
small embedded replay: one game, whose 1,000 rows it then writes into `.gz` files.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from common import begin, load, median, record, shown, start, table, take_turns

EPISODES, STEPS, ROWS = 8, 500, 1_000


def evaluation(module, game: str) -> dict[str, float]:
    clocks = []

    def act(stacks: np.ndarray, *_) -> np.ndarray:
        clocks.append(time.perf_counter())
        return np.zeros(len(stacks), int)

    module.play_episodes(game, act, EPISODES, STEPS, 0.001, seed=0)
    return {"steps per second": EPISODES * len(clocks) / (time.perf_counter() - clocks[0])}


def embedded(module, game: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        module.play_game(Path(folder), ROWS, game)
        return {"steps per second": ROWS / (time.perf_counter() - clock)}


def bare_evaluation(game: str) -> dict[str, float]:
    options = dict(use_fire_reset=False, reward_clipping=False, noop_max=30, max_num_frames_per_episode=4 * STEPS)
    env = AtariVectorEnv(game, EPISODES, **options)
    env.reset(seed=0)
    actions, clock = np.zeros(EPISODES, int), time.perf_counter()
    for _ in range(STEPS):
        env.step(actions)
    rate = EPISODES * STEPS / (time.perf_counter() - clock)
    env.close()
    return {"steps per second": rate}


def bare_play(game: str) -> dict[str, float]:
    """With the resets that give each episode a seed of its own."""
    clock = time.perf_counter()
    options = dict(use_fire_reset=False, reward_clipping=False, noop_max=0, repeat_action_probability=0.25)
    env = AtariVectorEnv(game, 1, **options)
    actions, rows, done = np.zeros(1, int), 0, True
    while rows <= ROWS:
        if done:
            env.reset(seed=rows)
            rows += 3  # as many blank ones, which nobody plays, are in the replay
        _, _, terminated, truncated, _ = env.step(actions)
        rows, done = rows + 1, terminated[0] or truncated[0]
    env.close()
    return {"steps per second": ROWS / (time.perf_counter() - clock)}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    module, figures, rows = load("finetune_bc"), {}, []
    for game in ("pong", "ms_pacman"):
        for name, ours, bare in (
            (f"evaluation, {EPISODES} episodes", evaluation, bare_evaluation),
            (f"embedded play, {ROWS:,} rows", embedded, bare_play),
        ):
            found = take_turns({"ours": partial(ours, module, game), "bare": partial(bare, game)})
            figures[f"{game}, {name}"] = found
            rates = [of["steps per second"] for of in found.values()]
            rows.append([f"{name}, {game}", *map(shown, rates), f"{median(rates[0]) / median(rates[1]):.0%}"])
    table("Agent steps per second", ["", "ours", "bare AtariVectorEnv", "ours / bare (target 90%)"], rows)
    record("play", figures)


if __name__ == "__main__":
    start([], main)
