"""IQM, median, mean, optimality gap and profile, each with intervals, of 10 methods, 3 seeds and 65 games.

    python benchmarks/iqm.py

Ours is `estimate` of eval_iqm.py, with 50,000 resamples. The plain way is rliable's `get_interval_estimates` with its
four aggregates and its `create_performance_profile`, timed over 500 resamples and multiplied by 100.
"""

import time
from functools import partial

import numpy as np
from common import begin, load, median, record, shown, start, table, take_turns
from rliable import library, metrics

METHODS, SEEDS, RESAMPLES, TIMED = 10, 3, 50_000, 500


def ours(module, scores: np.ndarray) -> dict[str, float]:
    clock = time.perf_counter()
    for of_method in scores:
        cells = {(game, seed): x[g] for seed, x in enumerate(of_method) for g, game in enumerate(sorted(module.SCORES))}
        module.estimate(cells, RESAMPLES, seed=0)
    return {"seconds": time.perf_counter() - clock}


def rliable(module, scores: np.ndarray) -> dict[str, float]:
    of = (metrics.aggregate_iqm, metrics.aggregate_median, metrics.aggregate_mean, metrics.aggregate_optimality_gap)
    clock = time.perf_counter()
    by_method = {str(i): of_method for i, of_method in enumerate(scores)}
    library.get_interval_estimates(by_method, lambda x: np.array([aggregate(x) for aggregate in of]), reps=TIMED)
    library.create_performance_profile(by_method, module.TAU, reps=TIMED)
    return {"seconds": (time.perf_counter() - clock) * RESAMPLES / TIMED}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    module = load("eval_iqm")
    scores = np.random.default_rng(0).lognormal(-0.5, 1, (METHODS, SEEDS, len(module.SCORES)))
    found = take_turns({"ours": partial(ours, module, scores), "rliable": partial(rliable, module, scores)})
    seconds = [of["seconds"] for of in found.values()]
    row = [*map(shown, seconds), f"{median(seconds[1]) / median(seconds[0]):.0f}"]
    table(f"Seconds for {METHODS} methods", ["ours", f"rliable, from {TIMED} resamples", "ratio (target 40)"], [row])
    record("iqm", found)


if __name__ == "__main__":
    start([], main)
