"""An evaluation's 100 episodes: environment steps and seconds, for random play and for play with a few endless games.

    python benchmarks/evaluate.py

Ours is `play_episodes`, which steps only what still runs. The plain way is one environment for all episodes, stepped
until the last has ended; what has ended begins again and plays for nothing. Both must give the same scores. In the last
case, every tenth episode never serves the ball and ends at 3,000 steps. The network, which is the same, is left out.
"""

import time
from functools import partial

import ale_py
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from common import begin, load, median, record, start, table, take_turns

GAMES = ("pong", "breakout", "space_invaders", "ms_pacman", "asterix")
EPISODES = 100


def together(game: str, policy, args) -> tuple[np.ndarray, int]:
    """Scores, and the steps that were played."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
    most_frames = 4 * args.max_episode_steps
    env = AtariVectorEnv(game, EPISODES, max_num_frames_per_episode=most_frames, **options)
    num_actions, rng = env.single_action_space.n, np.random.default_rng(args.seed)
    stacks, _ = env.reset(seed=int(rng.integers(2**30)))  # [episodes, 4, 84, 84]
    scores, running, steps = np.zeros(EPISODES), np.full(EPISODES, True), 0
    actions, rewards = np.zeros(EPISODES, int), np.zeros(EPISODES)
    while running.any():
        which = running.nonzero()[0]
        values = policy(stacks[which], which, actions[which], rewards[which])
        actions = rng.integers(num_actions, size=EPISODES)
        greedy = rng.random(EPISODES)[which] >= args.epsilon
        actions[which[greedy]] = values[greedy, :num_actions].argmax(1)
        stacks, rewards, terminated, truncated, _ = env.step(actions)
        steps += EPISODES
        scores[which] += rewards[which]
        running &= ~(terminated | truncated)
    return scores, steps


def alone(module, game: str, policy, args) -> tuple[np.ndarray, int]:
    """Scores, and the steps that were played, by the script."""
    played = []

    class Counter(AtariVectorEnv):
        def send(self, actions):
            played.append(len(actions))
            super().send(actions)

    module.AtariVectorEnv = Counter
    scores, _ = module.play_episodes(game, policy, args)
    return scores, sum(played)


def measure(play, game: str, never_fires: bool, args) -> dict[str, float]:
    used, rng = [], np.random.default_rng(0)

    def policy(stacks, which, *_):
        used.append(len(which))
        values = rng.random((len(which), 18))
        if never_fires:
            values[which % 10 == 0] = np.eye(18)[0]  # the no-op
        return values

    clock, cpu_clock = time.perf_counter(), time.process_time()
    scores, steps = play(game, policy, args)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu_clock
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "steps": steps, "used": sum(used), "score": scores.mean()}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0], rounds=1)  # of each case, which takes minutes
    module, rows, record_of = load("finetune_bc"), [], {}
    for game, never_fires in [*((game, False) for game in GAMES), ("breakout", True)]:
        args = module.Args(game, eval_episodes=EPISODES, epsilon=0)
        args.max_episode_steps = 3_000 if never_fires else args.max_episode_steps
        name = f"{game}, a tenth of the episodes without serving" if never_fires else game
        ways = {"ours": partial(alone, module), "plain": together}
        found = take_turns({way: partial(measure, play, game, never_fires, args) for way, play in ways.items()}, 1)
        record_of[name] = found
        ours, plain = found.values()
        if ours["score"] != plain["score"] or ours["used"] != plain["used"]:
            raise SystemExit(f"{name}: the two ways differ: {found}")
        ratios = [median(plain[key]) / median(ours[key]) for key in ("seconds", "cpu_seconds")]
        waste = [median(of["steps"]) / median(of["used"]) for of in (ours, plain)]
        seconds = [median(of["seconds"]) for of in (ours, plain)]
        row = [f"{median(ours['used']):,}", *(f"{x:.2f}" for x in waste), *(f"{x:.0f}" for x in seconds)]
        rows.append([name, *row, *(f"{ratio:.2f}" for ratio in ratios)])
    header = ["random play", "steps used", "played for one used: ours (target 1.2)", "plain", "ours, s", "plain, s"]
    header += ["plain / ours (target 2 in the last case)", "CPU seconds, plain / ours"]
    table(f"{EPISODES} episodes", header, rows)
    record("evaluate", record_of)


if __name__ == "__main__":
    start([], main)
