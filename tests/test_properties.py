"""Properties that must hold whatever the input, on inputs that Hypothesis makes up: each against a plain definition.

Of the order of the windows and their sharing among processes, of the stacks of frames, of Rainbow's replay and its
tree of sums, and of the statistics and their bootstrap. The same inputs are made up in every run.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import load
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

atc, iqm = load("pretrain_atc.py"), load("eval_iqm.py")
rainbow, recorder = load("finetune_rainbow.py"), load("record_replay.py")


def examples(count: int) -> settings:
    """So many of them, the same in every run; a busy machine makes no test fail."""
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# === windows ==========================================================================================================
PARTS = ("train", "held_out")


class Case(NamedTuple):
    """What a `Windows` is made of; `rows` are the lengths of its shards."""

    rows: list[int]
    length: int
    part: str
    world_size: int
    batch_size: int
    seed: int


def windows_of(rows: list[int], length: int, part: str) -> list[list[tuple[int, int]]]:
    """The windows of a part, as (shard, first row), for each shard."""
    found = []
    for shard, count in enumerate(rows):
        every = [(shard, first) for first in range(count - length + 1)]
        held_out = every[len(every) - math.ceil(len(every) / 100) :]
        train = [(shard, first) for _, first in every if first + length <= held_out[0][1]]
        found.append({"train": train, "held_out": held_out}[part])
    return found


@st.composite
def cases(draw, parts: tuple[str, ...] = PARTS, most: int = 150) -> Case:
    """Shards that are long enough for every part, and batches that are no larger than the part."""
    length, part = draw(st.integers(1, 9)), draw(st.sampled_from(parts))
    least, hundreds = 2 * length + 1, [length + 98, length + 99, length + 199]  # rows of 99, of 100 and of 200 windows
    rows = draw(st.lists(st.integers(least, least + most) | st.sampled_from(hundreds), min_size=1, max_size=4))
    size = sum(map(len, windows_of(rows, length, part)))
    world_size = draw(st.integers(1, min(4, size)))
    batch_size = world_size * draw(st.integers(1, min(size // world_size, 50)))
    return Case(rows, length, part, world_size, batch_size, draw(st.integers(0, 2**32)))


def numbered(shard: int, row: np.ndarray) -> np.ndarray:
    """Rows of those numbers of a shard, which show in every field which rows they are, and of which shard."""
    rows = np.zeros(len(row), atc.ROW)
    rows["frame"] = (row % 251)[:, None, None]
    rows["frame"][:, 0, 0] = shard
    columns = {"action": row % 18, "reward": row % 3 - 1, "is_first": row % 7 == 0, "terminal": row % 7 == 6}
    for name, column in (columns | {"return_to_go": 1000 * shard + row}).items():
        rows[name] = column
    return rows


@contextmanager
def shards_of(rows: list[int]) -> Iterator[list[tuple[int, Path]]]:
    """Files of so many rows; shard s is of game s + 5. Whatever is opened meanwhile is closed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, ExitStack() as opened:

        def open_file(path: Path, flags: int) -> int:
            file = os.open(path, flags)
            opened.callback(os.close, file)
            return file

        patch.setattr(atc, "os", SimpleNamespace(open=open_file, O_RDONLY=os.O_RDONLY, preadv=os.preadv))
        shards = [(s + 5, Path(folder, f"{s}.bin")) for s in range(len(rows))]
        for shard, (count, (_, path)) in enumerate(zip(rows, shards, strict=True)):
            numbered(shard, np.arange(count)).tofile(path)
        yield shards


@contextmanager
def process(rank: int, world_size: int) -> Iterator[None]:
    """As if this were that process of so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atc, "RANK", rank)
        patch.setattr(atc, "WORLD_SIZE", world_size)
        yield


def places(batch: dict, length: int) -> list[tuple[int, int]]:
    """(shard, first row) of a batch's windows, of which everything is as in those rows."""
    found = [divmod(int(first), 1000) for first in batch["return_to_go"][:, 0]]
    assert batch["game_id"].tolist() == [shard + 5 for shard, _ in found]
    for w, (shard, first) in enumerate(found):
        expected = numbered(shard, np.arange(first, first + length))
        np.testing.assert_array_equal(batch["frames"][w], expected["frame"])
        for name, _ in atc.FIELDS:
            np.testing.assert_array_equal(batch[name][w], expected[name], err_msg=name)
    return found


def batch_of(windows, i: int) -> dict[str, np.ndarray]:
    """Batch i as it is on the device."""
    return {name: tensor.numpy() for name, tensor in atc.unpack(*windows.batch(i), "cpu").items()}


def epoch_of(windows, epoch: int = 0) -> list[dict]:
    return [batch_of(windows, epoch * windows.batches + i) for i in range(windows.batches)]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@examples(80)
@given(cases(), st.integers(0, 3))
def test_an_epoch_visits_every_window_once(case, epoch):
    """All processes together visit each window of the part once, minus an incomplete last batch, in equal parts."""
    expected = list(itertools.chain(*windows_of(case.rows, case.length, case.part)))
    visited, sizes = [], []
    with shards_of(case.rows) as shards:
        for rank in range(case.world_size):
            with process(rank, case.world_size):
                windows = atc.Windows(shards, case.length, case.batch_size, case.seed, case.part)
                batches = [places(batch, case.length) for batch in epoch_of(windows, epoch)]
            visited += itertools.chain(*batches)
            sizes.append([len(batch) for batch in batches])
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(expected)
    left_out = len(expected) % case.batch_size
    event(f"{case.part}: {'some' if left_out else 'none'} left out")
    assert len(visited) == len(expected) - left_out
    assert set(itertools.chain(*sizes)) <= {case.batch_size // case.world_size}


@examples(60)
@given(cases(parts=("train",), most=250))
def test_training_and_held_out_windows_share_no_row(case):
    """Every row of every shard is in a training window or in a held-out one, but none is in both."""
    with shards_of(case.rows) as shards:
        both = [atc.Windows(shards, case.length, 1, case.seed, part) for part in ("train", "held_out")]
        train, held_out = ({int(row) for batch in epoch_of(data) for row in batch["return_to_go"][0]} for data in both)
    assert not train & held_out
    assert train | held_out == {1000 * s + row for s, count in enumerate(case.rows) for row in range(count)}


@examples(100)
@given(cases(), st.integers(0, 3))
def test_processes_share_the_batch_of_a_single_one(case, epoch):
    """Their parts of a batch, in the order of their ranks, are the batch that one process alone would get."""
    with shards_of(case.rows) as shards:
        arguments = shards, case.length, case.batch_size, case.seed, case.part
        whole = epoch_of(atc.Windows(*arguments), epoch)
        pieces = []
        for rank in range(case.world_size):
            with process(rank, case.world_size):
                pieces.append(epoch_of(atc.Windows(*arguments), epoch))
    for batch, *parts in zip(whole, *pieces, strict=True):
        assert same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


@examples(100)
@given(cases(), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_batch_is_the_same_however_it_is_reached(case, order):
    """Batch i is the same after any other batches as it is when it is the first to be asked for."""
    with shards_of(case.rows) as shards, process(case.world_size - 1, case.world_size):
        arguments = shards, case.length, case.batch_size, case.seed, case.part
        windows = atc.Windows(*arguments)
        order = [i % (3 * windows.batches) for i in order]  # of three epochs
        for i in [*order, order[0]]:
            assert same(batch_of(windows, i), batch_of(atc.Windows(*arguments), i)), i


@examples(40)
@given(cases(parts=("train",)), st.integers(0, 2**32), st.integers(0, 3))
def test_every_epoch_and_every_seed_has_an_order_of_its_own(case, other_seed, epoch):
    """Of 20 windows or more, no two epochs come in the same order, nor do two seeds' or the rows' own."""
    assume(case.seed != other_seed and min(case.rows) - 2 * case.length >= 20)
    with shards_of(case.rows) as shards:
        orders = []
        for seed, of in ((case.seed, epoch), (case.seed, epoch + 1), (other_seed, epoch)):
            batches = epoch_of(atc.Windows(shards, case.length, 1, seed, case.part), of)
            orders.append([float(batch["return_to_go"][0, 0]) for batch in batches])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert all(one != other for one, other in itertools.combinations([*orders, sorted(orders[0])], 2))


@examples(100)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(PARTS),
)
def test_too_little_is_refused_and_enough_is_not(rows, length, world_size, share, part):
    """Refused are shards without a window of the part, and parts without a batch (train) or a window per process."""
    least = share * world_size if part == "train" else world_size
    counts = [0 if count < length else len(windows_of([count], length, part)[0]) for count in rows]
    enough = min(counts) >= 1 and sum(counts) >= least
    event(f"{part}: {'enough' if enough else 'too little'}")
    with shards_of(rows) as shards, process(0, world_size):
        if enough:
            assert atc.Windows(shards, length, share * world_size, 0, part).size == sum(counts)
        else:
            with pytest.raises(SystemExit, match="use more rows"):
                atc.Windows(shards, length, share * world_size, 0, part)


# === frame stacks =====================================================================================================
def plain_stack(frames: list[np.ndarray], is_first: list[bool], i: int) -> np.ndarray:
    """The stack of row i: going back from it, frames up to the one that starts its episode, and black ones before."""
    stack = np.zeros((4, 84, 84), np.uint8)
    for k in range(4):
        stack[3 - k] = frames[i - k]
        if is_first[i - k]:
            break
    return stack


@examples(150)
@given(st.integers(1, 3), st.integers(4, 10), st.data())
def test_stacks_are_the_last_frames_of_the_episode(b, rows, data):
    """Whichever rows start an episode, a stack ends with its own frame and holds no frame of another episode."""
    starts = data.draw(st.lists(st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=b, max_size=b))
    frames = np.random.default_rng(0).integers(1, 256, (b, rows, 84, 84), np.uint8)
    found = atc.stack_frames(torch.from_numpy(frames), torch.tensor(starts))
    assert found.dtype == torch.uint8 and found.shape == (b, rows - 3, 4, 84, 84)
    for w, n in itertools.product(range(b), range(rows - 3)):
        np.testing.assert_array_equal(found[w, n], plain_stack(frames[w], starts[w], n + 3))


# === Rainbow's replay =================================================================================================
class Row(NamedTuple):
    """What `Replay.add` takes."""

    frame: np.ndarray
    action: int
    reward: float
    is_first: bool
    life_over: bool
    game_over: bool


class Moment(NamedTuple):
    """A replay, what was played into it so far, and the priority of each row of a known future, before `exponent`."""

    replay: object
    args: object
    played: list[Row]
    losses: dict[int, float]

    def live(self) -> list[int]:
        """The rows that can be drawn."""
        oldest = len(self.played) - getattr(self.args, "replay_capacity", math.inf)
        return [i for i in self.losses if i >= oldest]

    def rows_of(self, slots: np.ndarray) -> list[int]:
        """The latest row in each slot."""
        last = len(self.played) - 1
        return [last - (last - int(slot)) % len(self.replay.frames) for slot in slots]

    def priorities(self) -> np.ndarray:
        """Of each slot"""
        return self.replay.tree.levels[0] if isinstance(self.replay, recorder.Replay) else self.replay.priorities


def future(played: list[Row], i: int, n: int, discount: float) -> tuple[float, bool, int] | None:
    """G, whether the episode ends within n steps, and the row of the later stack; None as long as that is unknown."""
    value = 0.0
    for k in range(n):
        if i + k == len(played):
            return None
        value += discount**k * ((played[i + k].reward > 0) - (played[i + k].reward < 0))
        if played[i + k].life_over:
            return value, True, i
    return (value, False, i + n) if i + n < len(played) else None


@st.composite
def plays(draw) -> tuple[object, list[Row], int, int]:
    """Arguments of a small replay, what is played into it, how often it is sampled from, and a seed for the draws.

    It holds all that is played, as in fine-tuning, or the latest rows, as in recording.
    """
    n_steps = draw(st.integers(1, 6))
    options = dict(n_steps=n_steps, discount=draw(st.floats(0, 1)), priority_exponent=draw(st.floats(0, 1)))
    if draw(st.booleans()):
        args = rainbow.Args("pong", total_steps=120, **options)
    else:
        sizes = dict(replay_capacity=n_steps + draw(st.integers(1, 30)), save_every=draw(st.integers(1, 9)))
        args = recorder.Args("pong", Path("data"), **sizes, **options)
    steps = st.tuples(st.integers(-300, 300), st.integers(0, 17), st.sampled_from(["go on"] * 8 + ["life", "game"]))
    played, starts = [], True
    count = draw(st.integers(2, 120))  # lists are short if it is left to them
    for i, (reward, action, then) in enumerate(draw(st.lists(steps, min_size=count, max_size=count))):
        frame = np.full((84, 84), i + 1, np.uint8)
        played.append(Row(frame, action, float(reward), starts, then != "go on", then == "game"))
        starts = then == "game"
    return args, played, draw(st.integers(1, 25)), draw(st.integers(0, 2**32))


def moments(play: tuple) -> Iterator[Moment]:
    """Plays the rows and learns from them: all moments at which something can be drawn and it is time to."""
    args, rows, every, seed = play
    replay = (rainbow if isinstance(args, rainbow.Args) else recorder).Replay(args)
    rng = np.random.default_rng(seed)
    now, greatest = Moment(replay, args, [], {}), 1.0
    for row in rows:
        replay.add(*row)
        now.played.append(row)
        count = len(now.played)
        for i in range(max(0, count - args.n_steps - 1), count):
            if i not in now.losses and future(now.played, i, args.n_steps, args.discount):
                now.losses[i] = greatest
        if (count % every == 0 or count == len(rows)) and now.live():
            yield now
            slots, _, _ = replay.sample(4, rng)
            losses = (10 ** rng.uniform(-5, 5, 4)).astype(np.float32)
            replay.set_losses(slots, losses)
            now.losses.update(zip(now.rows_of(slots), losses.tolist(), strict=True))
            greatest = max(greatest, float(losses.max()))
    event(f"wraps around {len(rows) // len(replay.frames)} times")


@examples(100)
@given(plays())
def test_rows_have_the_priority_of_their_last_loss(play):
    """Rows of a known future, up to the capacity: their last loss, or else the greatest then, by the exponent."""
    for now in moments(play):
        expected = np.zeros(len(now.priorities()))
        for i in now.live():
            expected[i % len(now.replay.frames)] = now.losses[i] ** now.args.priority_exponent
        np.testing.assert_allclose(now.priorities(), expected, rtol=1e-12)
        slots, probabilities, _ = now.replay.sample(16, np.random.default_rng(0))
        np.testing.assert_allclose(probabilities, expected[slots], rtol=1e-12)  # of which the weights are made
        assert probabilities.min() > 0


@examples(100)
@given(plays())
def test_samples_are_the_n_steps_that_were_played(play):
    """Action, n-step return, done flag and both stacks of a sample follow from the rows played, by the definition."""
    for now in moments(play):
        slots, _, batch = now.replay.sample(8, np.random.default_rng(len(now.played)))
        stacks = rainbow.stack_frames(torch.from_numpy(batch["frames"]), torch.from_numpy(batch["is_first"]))
        frames, is_first = [row.frame for row in now.played], [row.is_first for row in now.played]
        for j, i in enumerate(now.rows_of(slots)):
            value, done, later = future(now.played, i, now.args.n_steps, now.args.discount)
            assert batch["action"][j] == now.played[i].action
            assert batch["done"][j] == done
            assert batch["n_step_return"][j] == pytest.approx(value, rel=1e-6, abs=1e-6)
            np.testing.assert_array_equal(stacks[j, 0], plain_stack(frames, is_first, i))
            np.testing.assert_array_equal(stacks[8 + j, 0], plain_stack(frames, is_first, later))


@examples(100)
@given(plays(), st.integers(1, 32))
def test_every_part_of_the_sum_of_priorities_has_one_sample(play, batch_size):
    """Of b samples, the j-th is a row whose share of the priorities' sum meets the j-th of b equal parts."""
    for now in moments(play):
        slots, _, _ = now.replay.sample(batch_size, np.random.default_rng(1))
        ends = now.priorities().cumsum()
        ends /= ends[-1]
        begins = np.concatenate([[0], ends[:-1]])
        assert (begins[slots] <= (np.arange(batch_size) + 1) / batch_size + 1e-12).all()
        assert (ends[slots] >= np.arange(batch_size) / batch_size - 1e-12).all()


# === the tree of sums =================================================================================================
SIZES = st.sampled_from([1, 2, 63, 64, 65, 200, 4096, 4097, 5000])  # of one level to three
SOME_PRIORITY = st.one_of(
    st.sampled_from([0.0, 5e-324, 1e-300, 1e-12, 1.0, 1e12, 1e300]),
    st.floats(0, 1e300),
    st.floats(0, 10),
)


@st.composite
def priorities(draw, elements: st.SearchStrategy) -> tuple[int, list[list[tuple[int, float]]]]:
    """A tree's size, and what is set in it one after the other: slots, some of them again, and their priorities."""
    size = draw(SIZES)
    pair = st.tuples(st.integers(0, size - 1) | st.just(size - 1) | st.just(0), elements)
    updates = draw(st.lists(st.lists(pair, min_size=1, max_size=40), min_size=1, max_size=5))
    return size, updates


def grow(size: int, updates: list) -> tuple[object, np.ndarray]:
    """The tree after the updates, and the priorities, each the last that was set."""
    tree, plain = recorder.SumTree(size), np.zeros(size)
    for update in updates:
        slots, values = zip(*update, strict=True)
        tree.set(np.array(slots), np.array(values, float))
        for slot, value in update:
            plain[slot] = value
    return tree, plain


@examples(200)
@given(priorities(SOME_PRIORITY))
def test_nodes_are_the_sums_of_their_children(case):
    """Leaves hold what was set last, and every node of every level the sum of its 64 children."""
    tree, plain = grow(*case)
    np.testing.assert_array_equal(tree.levels[0][: len(plain)], plain)
    assert not tree.levels[0][len(plain) :].any()
    for children, parents in itertools.pairwise(tree.levels):
        sums = [math.fsum(children[i : i + 64]) for i in range(0, len(children), 64)]
        np.testing.assert_allclose(parents[: len(sums)], sums, rtol=1e-14)
        assert not parents[len(sums) :].any()
    assert len(tree.levels[-1]) == 64
    assert tree.levels[-1].sum() == pytest.approx(math.fsum(plain), rel=1e-13)


@examples(200)
@given(priorities(st.integers(0, 1000)), st.data())
def test_draw_finds_the_slot_whose_interval_holds_the_share(case, data):
    """Of whole numbers, unit k of the sum is of the slot up to which more than k units are, exactly."""
    tree, plain = grow(*case)
    total = int(plain.sum())
    assume(total > 0)
    ends = plain.cumsum()
    edges = np.concatenate([ends - 1, ends])
    units = np.unique(np.clip([*edges, *data.draw(st.lists(st.integers(0, total - 1)))], 0, total - 1))
    found = tree.draw((units + 0.5) / total)
    np.testing.assert_array_equal(found, [int((ends <= unit).sum()) for unit in units])


@examples(300)
@given(priorities(SOME_PRIORITY), st.lists(st.floats(0, 1, exclude_max=True), max_size=30))
def test_draw_never_finds_a_slot_of_priority_0(case, shares):
    """A slot of priority 0 is never drawn, however tiny or huge the others are, nor one far from the share."""
    tree, plain = grow(*case)
    total = math.fsum(plain)
    assume(total > 0)
    ends = np.minimum(plain.cumsum() / total, 1) if total >= 1e-300 else None  # below, shares themselves are rounded
    edges = [] if ends is None else ends[plain > 0].tolist()
    near = [e for edge in edges for e in (edge, np.nextafter(edge, 0), np.nextafter(edge, 1)) if e < 1]
    shares = np.array([*shares, *near, 0, np.nextafter(0, 1), np.nextafter(1, 0)])
    found = tree.draw(shares)
    assert found.min() >= 0 and found.max() < len(plain)
    assert (plain[found] > 0).all()
    if ends is not None:
        begins = np.concatenate([[0], ends[:-1]])
        assert (begins[found] <= shares + 1e-12).all()
        assert (shares <= ends[found] + 1e-12).all()


# === statistics and their bootstrap ===================================================================================
SOME_GAMES = ("alien", "klax", "montezuma_revenge", "pong", "qbert", "zaxxon")
STATISTICS = ("iqm", "median", "mean", "optimality_gap")
SCORES = st.integers(-300, 300).map(lambda x: x / 100) | st.floats(-4, 4)
Table = dict[str, list[float]]  # the scores of each game


def tables(games: int = 6, seeds: int = 5, elements: st.SearchStrategy = SCORES) -> st.SearchStrategy[Table]:
    """Of at most so many games, each of at most so many seeds."""
    of_a_game = st.lists(elements, min_size=1, max_size=seeds)
    return st.dictionaries(st.sampled_from(SOME_GAMES), of_a_game, min_size=1, max_size=games)


def pairs(games: int = 6, seeds: int = 5, elements: st.SearchStrategy = SCORES) -> st.SearchStrategy:
    """Tables of X and of Y, which have one game in common at least."""
    one = tables(games, seeds, elements)
    return st.tuples(one, one).map(lambda of: (of[0], dict(zip(of[0], of[1].values(), strict=False)) | of[1]))


def cells(table: Table) -> dict[tuple[str, int], float]:
    """As the script has them."""
    return {(game, seed): score for game, scores in table.items() for seed, score in enumerate(scores)}


def average(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def plain_iqm(table: Table) -> float:
    """The mean of the middle half: of the scores; where numbers of seeds differ, each is 1/n of a game."""
    scores = sorted((Fraction(score), Fraction(1, len(of))) for of in table.values() for score in of)
    if len({len(of) for of in table.values()}) == 1:
        cut = len(scores) // 4
        return average([float(score) for score, _ in scores[cut : len(scores) - cut]])
    total, end, low, high = Fraction(0), Fraction(0), Fraction(len(table), 4), Fraction(3 * len(table), 4)
    for score, weight in scores:
        begin, end = end, end + weight
        total += score * max(Fraction(0), min(end, high) - max(begin, low))
    return float(total / (high - low))


def plain_statistics(table: Table) -> dict[str, float]:
    """The definitions, of lists."""
    of_games = sorted(average(of) for of in table.values())
    middle = of_games[(len(of_games) - 1) // 2 : len(of_games) // 2 + 1]
    in_mean = [average(of) for game, of in table.items() if game != "montezuma_revenge" or len(table) == 1]
    gaps = [1 - average([min(score, 1) for score in of]) for of in table.values()]
    return {
        "iqm": plain_iqm(table),
        "median": average(middle),
        "mean": average(in_mean),
        "optimality_gap": average(gaps),
    }


def close(expected: float):
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


def resamples_of(table: Table) -> Iterator[Table]:
    """All that are equally probable."""
    for drawn in itertools.product(*(itertools.product(of, repeat=len(of)) for of in table.values())):
        yield dict(zip(table, drawn, strict=True))


def assert_interval(estimate: dict, exact: list[float], name: str = "") -> None:
    """The ends are percentiles 2.5 and 97.5 of the exact values to within 1: 4 deviations of what 5,000 draws tell."""
    exact, n = sorted(exact), len(exact)
    percentile = lambda p: exact[min(max(math.ceil(p / 100 * n) - 1, 0), n - 1)]  # noqa: E731
    for end, p in (("low", 2.5), ("high", 97.5)):
        assert percentile(p - 1) - 1e-9 <= estimate[end] <= percentile(p + 1) + 1e-9, (name, end)


@examples(150)
@given(tables())
def test_statistics_are_their_definitions(table):
    """The value of every statistic is that of its definition, of any games and any numbers of seeds."""
    estimates = iqm.estimate(cells(table), 1, 0)
    assert tuple(estimates) == (*STATISTICS, "profile")
    for name, expected in plain_statistics(table).items():
        assert estimates[name]["value"] == close(expected), name


@examples(100)
@given(tables(games=3, seeds=3))
def test_intervals_are_those_of_all_resamples(table):
    """Both ends are the percentiles of the statistic over all equally probable resamples, each game's of its own."""
    assume(math.prod(len(of) ** len(of) for of in table.values()) <= 27 * 27)
    exact = [plain_statistics(resample) for resample in resamples_of(table)]
    event(f"{len(exact)} resamples")
    estimates = iqm.estimate(cells(table), 5_000, 0)
    for name in STATISTICS:
        assert_interval(estimates[name], [statistics[name] for statistics in exact], name)


@examples(150)
@given(tables(), st.integers(1, 50), st.integers(0, 2**32))
def test_intervals_lie_between_the_worst_and_the_best(table, resamples, seed):
    """No end of any interval is beyond what each game's worst score, or its best, would give every time."""
    ends = [plain_statistics({game: [pick(of)] * len(of) for game, of in table.items()}) for pick in (min, max)]
    estimates = iqm.estimate(cells(table), resamples, seed)
    for name in STATISTICS:
        estimate = estimates[name]
        least, most = sorted(end[name] for end in ends)
        assert least - 1e-9 <= estimate["low"] <= estimate["high"] <= most + 1e-9, name


@examples(100)
@given(pairs(), st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_the_order_of_games_and_seeds_does_not_count(pair, random, seed):
    """The order of games and seeds does not count, nor do the seeds' numbers: all is the same, bit by bit."""

    def shuffled(scores: dict) -> dict:
        renamed = [((game, 3 * number + 5), score) for (game, number), score in scores.items()]
        random.shuffle(renamed)
        return dict(renamed)

    x, y = map(cells, pair)
    assert iqm.estimate(shuffled(x), 30, seed) == iqm.estimate(x, 30, seed)
    assert iqm.improvement(shuffled(x), shuffled(y), 30, seed) == iqm.improvement(x, y, 30, seed)


@examples(150)
@given(tables(), st.floats(0.01, 100), st.floats(-10, 10))
def test_estimates_move_with_the_scores(table, scale, shift):
    """Under x -> a x + b with a > 0 values and ends move alike; the gap under x -> 1 + a (x - 1), by a."""
    before = iqm.estimate(cells(table), 40, 0)
    moved = iqm.estimate(cells({g: [scale * x + shift for x in of] for g, of in table.items()}), 40, 0)
    about_1 = iqm.estimate(cells({g: [1 + scale * (x - 1) for x in of] for g, of in table.items()}), 40, 0)
    for name, end in itertools.product(STATISTICS, ("value", "low", "high")):
        if name == "optimality_gap":
            assert about_1[name][end] == pytest.approx(scale * before[name][end], rel=1e-9, abs=1e-9), end
        else:
            assert moved[name][end] == pytest.approx(scale * before[name][end] + shift, rel=1e-9, abs=1e-9), (name, end)


@examples(100)
@given(tables(seeds=1), st.lists(st.integers(1, 5), min_size=6, max_size=6), st.integers(0, 2**32))
def test_equal_seeds_leave_no_interval(table, seeds, seed):
    """Where each game's scores are equal, whatever the games', every interval is the value alone."""
    table = {game: of * count for (game, of), count in zip(table.items(), seeds, strict=False)}
    x = cells(table)
    for name, found in {**iqm.estimate(x, 40, seed), "improvement": iqm.improvement(x, x, 40, seed)}.items():
        assert found["low"] == close(found["value"]) == found["high"], name


@examples(100)
@given(tables(), st.integers(0, 2**32), st.integers(0, 2**32), st.integers(1, 60))
def test_the_same_seed_gives_the_same_result(table, seed, other, resamples):
    """The same seed gives the same result; another changes no value, but the ends of intervals."""
    x = cells(table)
    first, again, another = (iqm.estimate(x, resamples, s) for s in (seed, seed, other))
    assert first == again
    assert iqm.improvement(x, x, resamples, seed) == iqm.improvement(x, x, resamples, seed)
    assert [first[name]["value"] for name in STATISTICS] == [another[name]["value"] for name in STATISTICS]
    if seed != other and any(len({round(score, 1) for score in of}) > 3 for of in table.values()):
        event("another seed")
        assert iqm.estimate(x, 60, seed) != iqm.estimate(x, 60, other)


@examples(80)
@given(tables(seeds=4, elements=st.integers(-20, 120).map(lambda x: x / 50)))
def test_profiles_are_their_definition(table):
    """At each tau the mean over games of their share of scores above it; the interval holds it, all fall in tau."""
    found = iqm.estimate(cells(table), 50, 0)["profile"]
    for tau, value in zip(iqm.TAU, found["value"], strict=True):
        assert value == close(average([average([float(score > tau) for score in of]) for of in table.values()]))
    assert all((np.diff(found[end]) <= 1e-9).all() for end in ("value", "low", "high"))


FEW = st.integers(-4, 4).map(lambda x: x / 4)  # many of them equal


def plain_improvement(x: Table, y: Table) -> float:
    """P(X > Y) by its definition."""
    games = x.keys() & y.keys()
    return average([average([(a > b) + (a == b) / 2 for a in x[g] for b in y[g]]) for g in games])


@examples(120)
@given(pairs(elements=FEW))
def test_improvement_is_its_definition(pair):
    """A mean over common games of the chance to win, ties half; what X wins over Y, Y does not win over X."""
    x, y = pair
    found, reverse = (iqm.improvement(cells(a), cells(b), 20, 0) for a, b in ((x, y), (y, x)))
    assert found["value"] == close(plain_improvement(x, y))
    assert found["value"] + reverse["value"] == close(1)
    assert -1e-9 <= found["low"] <= found["high"] <= 1 + 1e-9


@examples(80)
@given(pairs(games=2, seeds=2, elements=FEW))
def test_intervals_of_improvement_are_those_of_all_resamples(pair):
    """Both ends are the percentiles over all equally probable resamples of X and, independently, of Y."""
    x, y = pair
    exact = [plain_improvement(a, b) for a, b in itertools.product(resamples_of(x), resamples_of(y))]
    assert_interval(iqm.improvement(cells(x), cells(y), 5_000, 0), exact)


@examples(100)
@given(pairs(elements=FEW), st.integers(0, 2**32))
def test_improvement_does_not_count_by_how_much(pair, seed):
    """The same increasing map of both methods' scores changes neither the value nor its interval, by no bit."""
    mapped = [cells({g: [math.exp(5 * score) - 3 for score in of] for g, of in table.items()}) for table in pair]
    assert iqm.improvement(*mapped, 40, seed) == iqm.improvement(*map(cells, pair), 40, seed)
