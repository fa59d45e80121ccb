"""The pieces of Rainbow: networks, objective, update, replay and environment, each against a plain second one."""

import gzip
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import load
from golden.fill import fill_array, make_batch

rainbow, recorder = load("finetune_rainbow.py"), load("record_replay.py")
CPU = torch.device("cpu")
SHARED = dict(batch_size=4, n_steps=7, discount=0.9, precision="fp32", device="cpu", compile=False)
KINDS = ("frozen", "e2e", "nature")  # fine-tuning on a frozen backbone or end to end; recording


def make_args(module=rainbow, **changes):
    """Of a small ResNet, or of a recorder's small replay"""
    if module is recorder:
        return recorder.Args("pong", Path("data"), **SHARED | dict(replay_capacity=100, save_every=40) | changes)
    small = dict(width_multiplier=0.0625, blocks=(1, 1, 1, 1), total_steps=1000)
    return rainbow.Args("pong", **SHARED | small | changes)


def make_model(kind: str = "frozen", actions: int = 6, **changes):
    if kind == "nature":
        args = make_args(recorder, **changes)
        network = recorder.Network(args, actions)
    else:
        args = make_args(freeze_backbone=kind == "frozen", **changes)
        network = rainbow.Network(args, rainbow.make_backbone(args)[0], actions)
    precision = torch.autocast("cpu", torch.bfloat16, args.precision == "bf16")
    return (recorder if kind == "nature" else rainbow).Rainbow(args, network, CPU, precision)


def make_batches(count: int, batch_size: int = 4) -> list[dict[str, np.ndarray]]:
    """What `update` takes"""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        batch = {"frames": rng.integers(256, size=(2 * batch_size, 4, 84, 84), dtype=np.uint8)}
        batch |= {"is_first": rng.random((2 * batch_size, 4)) < 0.1, "action": rng.integers(6, size=batch_size)}
        batch |= {"done": rng.random(batch_size) < 0.3, "weight": rng.random(batch_size, np.float32)}
        batches.append(batch | {"n_step_return": rng.normal(size=batch_size).astype(np.float32)})
    return batches


# === networks and objective ===========================================================================================
def test_golden():
    """Losses, values and gradient norms of the whole network, learning end to end, on the golden parameters."""
    numbers = dict(np.load(Path(__file__).parent / "golden" / "rainbow.npz", allow_pickle=False))
    shapes = {name: tuple(map(int, shape.split("x"))) for name, shape in (x.split() for x in numbers["param_names"])}
    args = rainbow.Args("pong", precision="fp32", device="cpu", compile=False)
    network = rainbow.Network(args, rainbow.ResNet(1.0, (3, 4, 6, 3)), 18)
    model = rainbow.Rainbow(args, network, CPU, torch.autocast("cpu", enabled=False))
    for network, prefix in ((model.online, "given/"), (model.target, "given/target/")):
        parameters = dict(network.named_parameters())
        assert parameters.keys() == shapes.keys()
        for name, parameter in parameters.items():
            values = torch.from_numpy(fill_array(prefix + name, shapes[name]).reshape(shapes[name]))
            of_a_game = name.startswith("head.") or name == "neck.spatial_embed"
            parameter.data = (values[17] if of_a_game else values).reshape(parameter.shape).clone()
    batch = make_batch("given/", n=4)
    stacks = torch.cat([torch.from_numpy(batch[name][:, 0]) / 255 for name in ("obs", "next_obs")])
    action, n_step_return, done = (torch.from_numpy(batch[name][:, 0]) for name in ("action", "rtg", "done"))
    cross_entropy, q, target_q = model.losses(stacks, action, n_step_return, done.bool())
    weighted = torch.tensor([1, 0.5, 0.25, 0.75]) * cross_entropy
    weighted.mean().backward()
    found = {"per_sample": weighted, "q_pred": q, "q_target": target_q, "loss": weighted.mean()}
    for name, values in found.items():
        np.testing.assert_allclose(values.detach(), numbers[name], rtol=1e-5, atol=1e-6 if name == "q_pred" else 0)
    for name in ("backbone", "neck", "head"):
        gradients = [parameter.grad.double() for parameter in getattr(model.online, name).parameters()]
        norm = sum(gradient.square().sum().item() for gradient in gradients) ** 0.5
        assert norm == pytest.approx(float(numbers[f"grad_norm_{name}"]), rel=1e-4), name
    assert all(parameter.grad is None for parameter in model.target.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_definition(kind):
    """Losses, values and gradients: one pass of a frozen backbone stands for three, and it has no gradient."""
    torch.manual_seed(0)
    model, freeze = make_model(kind), kind == "frozen"
    for parameter in model.target.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    backbone, target_backbone = model.online.backbone, model.target.backbone
    assert (backbone is target_backbone) == freeze
    (now, later), support = torch.rand(2, 32, 4, 84, 84), torch.linspace(-10, 10, 51)
    sample, action, done = torch.arange(32), torch.randint(6, (32,)), torch.arange(32) % 4 == 0
    n_step_return = torch.randn(32)

    best = (model.online(backbone(later)).softmax(-1) @ support).argmax(1)
    other = (model.online(target_backbone(later)).softmax(-1) @ support).argmax(1)
    assert (best == other).all() == freeze
    p = model.target(target_backbone(later))[sample, best].softmax(1)
    atoms = n_step_return[:, None] + 0.9**7 * support * ~done[:, None]
    log_p = model.online(backbone(now))[sample, action].log_softmax(1)
    cross_entropy = -(rainbow.project(p, atoms, support) * log_p).sum(1)
    expected = torch.stack([cross_entropy, log_p.exp() @ support, n_step_return + 0.9**7 * ~done * (p @ support)])
    found = model.losses(torch.cat([now, later]), action, n_step_return, done)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    learned = {name: parameter for name, parameter in model.online.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone") for name in learned) != freeze
    gradients = [torch.autograd.grad(results[0].sum(), list(learned.values())) for results in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_target_network_is_the_player():
    torch.manual_seed(0)
    model = make_model("e2e")
    for parameter in model.target.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    stacks = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    support = torch.linspace(-10, 10, 51)
    values = [n(n.backbone(stacks / 255)).softmax(-1) @ support for n in (model.target, model.online)]
    torch.testing.assert_close(model.act(stacks), values[0])
    assert (values[0] - values[1]).abs().min() > 1e-3


def test_loss_stays_positive():
    """A sample that is predicted perfectly keeps a priority, 1e-5; one that is not at all has 1e5 at most."""
    model = make_model(actions=2)
    model.online.head.weight.data.zero_()
    model.online.head.bias.data = ((torch.arange(51) == 25) * torch.tensor([[1000.0], [-1e6]])).view(1, -1)
    inputs = torch.tensor([0, 1]), torch.zeros(2), torch.tensor([True, True])
    torch.testing.assert_close(model.losses(torch.rand(4, 4, 84, 84), *inputs)[0], torch.tensor([1e-5, 1e5]))


def test_projection():
    """On random atoms, far beyond both ends and exactly on the support's; a mean that is not clipped is preserved."""
    rng = np.random.default_rng(0)
    support = np.linspace(-10, 10, 11)
    atoms = np.concatenate([rng.uniform(-25, 25, (20, 11)), support[rng.integers(11, size=(20, 11))]])
    atoms = np.concatenate([atoms, support[None], 0.5 * support[None] + 3, 0 * support[None] - 4.7])
    probabilities = rng.dirichlet(np.ones(11), len(atoms))
    found = rainbow.project(*map(torch.from_numpy, (probabilities, atoms, support))).numpy()
    expected = np.zeros_like(probabilities)
    for (i, j), position in np.ndenumerate((atoms.clip(-10, 10) + 10) / 2):  # algorithm 1 of 1707.06887
        lower, share = int(position), position % 1
        expected[i, lower] += probabilities[i, j] * (1 - share)
        expected[i, min(lower + 1, 10)] += probabilities[i, j] * share
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_allclose(found[-3], probabilities[-3])
    inside = np.abs(atoms).max(1) <= 10
    assert 3 <= inside.sum() < len(atoms)
    np.testing.assert_allclose(found[inside] @ support, (probabilities * atoms).sum(1)[inside])


def test_nature_network_is_the_published_one():
    network = make_model("nature", actions=18).online
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    convolutions = [(32, 4, 8, 8), (32,), (64, 32, 4, 4), (64,), (64, 64, 3, 3), (64,)]
    assert shapes == [*convolutions, (512, 3136), (512,), (918, 512), (918,)]
    assert sum(parameter.numel() for parameter in network.backbone.parameters()) == 77_984
    maps = network.backbone(torch.rand(2, 4, 84, 84))
    assert maps.shape == (2, 64, 7, 7) and maps.min() == 0
    assert network(maps).shape == (2, 18, 51)


# === update and action ================================================================================================
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    """As on GPUs by default; "eager" runs the one graph that was traced, forward and backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make_model(kind, precision="bf16")
    losses, act = (torch.compile(f, backend="eager", fullgraph=True, dynamic=False) for f in (model.losses, model.act))
    inputs = torch.rand(4, 4, 84, 84), torch.tensor([0, 5]), torch.randn(2), torch.tensor([True, False])
    torch.manual_seed(0)
    results = losses(*inputs)
    torch.manual_seed(0)
    close = dict(rtol=0.1, atol=0.3)  # the norm is in plain operations when compiled, which round otherwise
    torch.testing.assert_close(results, model.losses(*inputs), **close)
    results[0].mean().backward()
    assert all(parameter.grad.any() for parameter in model.learned if parameter.ndim > 1)
    stacks = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8)
    torch.manual_seed(1)
    values = act(stacks)
    torch.manual_seed(1)
    torch.testing.assert_close(values, model.act(stacks), **close)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("freeze", [True, False])
def test_an_update_is_its_steps(freeze, precision):
    """Of 20 updates through `Graph`, eager on a CPU, losses and weights equal those of the single steps."""
    kind, changes = "frozen" if freeze else "e2e", dict(precision=precision, max_grad_norm=0.5, target_momentum=0.75)
    torch.manual_seed(0)
    model = make_model(kind, **changes)
    torch.manual_seed(0)
    other = make_model(kind, **changes)
    optimizer = torch.optim.Adam(other.learned, 1e-4, eps=1.5e-4)
    update = rainbow.Graph(model.update, CPU)
    for step, batch in enumerate(make_batches(20 if freeze and precision == "fp32" else 2)):
        torch.manual_seed(step)
        found = update(**batch)
        torch.manual_seed(step)
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        stacks = rainbow.augment(rainbow.stack_frames(batch["frames"], batch["is_first"])).squeeze(1)
        losses = other.losses(stacks, batch["action"], batch["n_step_return"], batch["done"])
        loss = (batch["weight"] * losses[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.learned, 0.5)
        assert norm > 0.5
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(other.averages, other.learned, strict=True):
                average.copy_(0.75 * average + 0.25 * parameter)
        expected = torch.cat([torch.stack([loss, norm]), losses.flatten()]).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-2 if precision == "bf16" else 1e-3, atol=1e-3)
    for name, parameter in model.named_parameters():
        tolerance = dict(rtol=1e-2, atol=1e-3) if precision == "bf16" else dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(parameter, dict(other.named_parameters())[name], **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns(kind):
    """All but a frozen backbone, whatever the precision; the target network follows, without a history."""
    model = make_model(kind, precision="bf16", target_momentum=0.75)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.update(**{name: torch.from_numpy(array) for name, array in make_batches(1)[0].items()})
    for name, parameter in model.named_parameters():
        frozen = kind == "frozen" and "backbone" in name
        assert parameter.equal(before[name]) == frozen, name
        assert parameter.requires_grad == (name.startswith("online") and not frozen), name
        assert parameter.grad is None and parameter.is_leaf
        if name.startswith("target") and not frozen:
            online = model.online.get_parameter(name.removeprefix("target."))
            torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * online)


def test_the_target_network_and_a_frozen_backbone_never_train():
    """Which counts for those who put BatchNorm or dropout into them."""
    for kind in KINDS:
        model = make_model(kind)
        assert not any(part.training for part in model.target.modules())
        assert model.online.backbone.training == (kind != "frozen") and model.online.neck.training


# === environment and replay ===========================================================================================
class Row(NamedTuple):
    """What `Replay.add` takes."""

    frame: np.ndarray
    action: int
    reward: float
    is_first: bool
    life_over: bool
    game_over: bool


def play(env, rng: np.random.Generator) -> Iterator[tuple[Row, np.ndarray, bool]]:
    """Random play as in the training loop: each row, the stack that the player saw, and whether a life was lost."""
    while True:
        stack, lives = env.stack.copy(), env.lives
        row = Row(*env.step(int(rng.integers(env.num_actions))))
        yield row, stack, env.lives < lives
        if env.game_over:
            env.reset(env.episode + 1)
            assert not env.stack[:3].any() and env.stack[3].any()
        else:  # a lost life resets nothing
            np.testing.assert_array_equal(env.stack[:3], stack[1:])


def future(played: list[Row], i: int, n: int) -> tuple[float, bool, int] | None:
    """G, whether the episode ends within n steps, and the row of the later stack; None as long as that is unknown."""
    value = 0
    for k, row in enumerate(played[i : i + n]):
        value += 0.9**k * np.sign(row.reward)
        if row.life_over:
            return value, True, i
    return (value, False, i + n) if i + n < len(played) else None


def priorities_of(replay) -> np.ndarray:
    return replay.tree.levels[0] if isinstance(replay, recorder.Replay) else replay.priorities


@pytest.mark.parametrize(
    ("game", "max_steps", "episodic_life"),
    [("breakout", 27_000, True), ("breakout", 27_000, False), ("ms_pacman", 200, True), ("pong", 60, True)],
)
@pytest.mark.parametrize("module", [rainbow, recorder], ids=["finetune", "record"])
def test_replay_holds_what_was_played(module, game, max_steps, episodic_life):
    """Acting and learning see the same stacks, n steps are added up as defined, and exactly the rows of a known future
    that are no older than the capacity can be drawn: with their last loss, else with the greatest so far."""
    args = make_args(module, max_episode_steps=max_steps, episodic_life=episodic_life, seed=1)
    args.game = game
    env, replay = module.Environment(args), module.Replay(args)
    size, capacity = len(replay.frames), 100 if module is recorder else 1000
    rng, played, stacks, deaths = np.random.default_rng(0), [], [], []
    losses, greatest, kinds = {}, 1.0, set()
    for row, stack, lost in islice(play(env, rng), 900):
        replay.add(*row)
        played.append(row)
        stacks.append(stack)
        assert row.life_over == (row.game_over or (episodic_life and lost))
        deaths.append(lost and not row.game_over)
        rows = len(played)
        if rows < 10 or rows % (4 if module is recorder else 12):
            continue
        futures = {i: future(played, i, 7) for i in range(max(0, rows - capacity), rows)}
        leaves = np.zeros_like(priorities_of(replay))
        for i in [i for i, known in futures.items() if known]:
            leaves[i % size] = losses.setdefault(i, greatest) ** 0.5
        np.testing.assert_allclose(priorities_of(replay), leaves, rtol=1e-12)
        slots, probabilities, batch = replay.sample(16, rng)
        np.testing.assert_allclose(probabilities, leaves[slots], rtol=1e-12)
        shown = rainbow.stack_frames(torch.from_numpy(batch["frames"]), torch.from_numpy(batch["is_first"])).squeeze(1)
        new_losses = rng.exponential(2, 16).astype(np.float32)
        replay.set_losses(slots, new_losses)
        greatest = max(greatest, float(new_losses.max()))
        for j, slot in enumerate(slots):
            i = rows - 1 - (rows - 1 - slot) % size  # the latest row in that slot
            value, done, later = futures[i]
            assert (batch["action"][j], batch["done"][j]) == (played[i].action, done)
            assert batch["n_step_return"][j] == pytest.approx(value)
            np.testing.assert_array_equal(shown[j], stacks[i])
            np.testing.assert_array_equal(shown[16 + j], stacks[later])
            losses[i] = float(new_losses[j])
            kinds |= {("done", done), ("reward", value != 0), ("new game", not stacks[i][0].any())}
    assert len(kinds) == 6  # there were some of each
    assert (max(row.reward for row in played) >= 10) == (game == "ms_pacman")  # raw rewards
    assert (rows > 6 * size) == (module is recorder) and sum(row.game_over for row in played) > 1
    assert any(deaths) == (game != "pong")


def test_environment_continues_from_its_actions():
    """In the middle of the second game, whatever has been played since; sticky actions are drawn alike, too."""
    args = make_args(recorder, max_episode_steps=50, repeat_action_probability=0.25)
    args.game = "breakout"
    env, other = recorder.Environment(args), recorder.Environment(args)
    list(islice(play(env, np.random.default_rng(0)), 70))
    list(islice(play(other, np.random.default_rng(1)), 130))
    args.repeat_action_probability = 0
    not_sticky = recorder.Environment(args)
    for e in (other, not_sticky):
        e.reset(env.episode)
        for action in env.actions:
            e.step(action)
    assert (env.episode, env.actions, env.score) == (other.episode, other.actions, other.score) and env.episode == 1
    assert (not_sticky.stack != env.stack).any()
    both = [islice(play(e, np.random.default_rng(2)), 100) for e in (env, other)]
    for (row, stack, _), (other_row, other_stack, _) in zip(*both, strict=True):
        assert row[1:] == other_row[1:]
        np.testing.assert_array_equal(stack, other_stack)


@pytest.mark.parametrize("size", [1, 64, 65, 1000, 4097])
def test_sum_tree(size):
    """After many updates, duplicates among them: every unit of the priorities' sum leads to the slot that it is of."""
    rng, tree, plain = np.random.default_rng(size), recorder.SumTree(size), np.zeros(size, int)
    for _ in range(200):
        slots, priorities = rng.integers(size, size=40), rng.integers(6, size=40)
        tree.set(slots, priorities)
        for slot, priority in zip(slots, priorities, strict=True):
            plain[slot] = priority
    tree.set(slots[:1], 3.0)
    plain[slots[0]] = 3
    total = plain.sum()
    found = tree.draw((np.arange(total) + 0.5) / total)
    np.testing.assert_array_equal(found, np.repeat(np.arange(size), plain))

    priorities = 10 ** rng.uniform(-12, 3, size) * (rng.random(size) < 0.7)  # whose sums are rounded
    priorities[rng.integers(size)] = 1e-3
    tree.set(np.arange(size), priorities)
    for children, parents in zip(tree.levels, tree.levels[1:], strict=False):
        np.testing.assert_array_equal(parents[: len(children) // 64], children.reshape(-1, 64).sum(1))
    assert tree.levels[-1].sum() == pytest.approx(priorities.sum())
    uniform = np.concatenate([[0, np.nextafter(0, 1), np.nextafter(1, 0), 1], rng.random(20_000)])
    found, before = tree.draw(uniform), np.concatenate([[0], priorities.cumsum()])
    assert (priorities[found] > 0).all()
    assert (before[found] / before[-1] <= uniform + 1e-12).all()
    assert (uniform <= before[found + 1] / before[-1] + 1e-12).all()


def synthetic(count: int, seed: int = 0) -> Iterator[Row]:
    """Rows of noise, of games of about 30 rows in which lives are lost."""
    rng, is_first = np.random.default_rng(seed), True
    for _ in range(count):
        terminal, lost = (rng.random(2) < (0.03, 0.05)).tolist()
        frame, action, reward = rng.integers(256, size=(84, 84)), int(rng.integers(18)), float(rng.integers(-50, 51))
        yield Row(frame.astype(np.uint8), action, reward, is_first, terminal or lost, terminal)
        is_first = terminal


def learn(replay, batch_size: int = 32) -> dict[str, np.ndarray]:
    """What an update draws, by numbers that depend on the rows played so far alone; losses are set."""
    rng = np.random.default_rng(replay.rows)
    slots, probabilities, batch = replay.sample(batch_size, rng)
    replay.set_losses(slots, rng.exponential(2, batch_size).astype(np.float32))
    return batch | {"slots": slots, "probabilities": probabilities}


def test_replay_continues_from_its_checkpoint(tmp_path):
    """Though the killed run had gone on for `save_every` rows, whose frames are in the file."""
    frames = tmp_path / "frames.bin"
    undisturbed, replay = recorder.Replay(make_args(recorder)), recorder.Replay(make_args(recorder))
    for i, row in enumerate(synthetic(500), start=1):
        undisturbed.add(*row)
        replay.add(*row)
        if i in (50, 299, 310, 333, 437):
            file = io.BytesIO()
            replay.save_frames(frames)
            torch.save(replay.state_dict(), file)
            for other in synthetic(40, seed=1):
                replay.add(*other)
            learn(replay)
            replay.save_frames(frames)  # and then the run was killed, before its checkpoint was written
            file.seek(0)
            replay = recorder.Replay(make_args(recorder))
            replay.load_state_dict(torch.load(file, weights_only=True))
            replay.load_frames(frames)
        if i % 10 == 0 or i in (299, 333, 437):
            found, expected = (learn(r, 32 if i % 10 == 0 else 1000) for r in (replay, undisturbed))
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("size", [1, 50, 333])
def test_draws_follow_the_priorities(size):
    """Each of b equal parts of the priorities' sum has a draw of the row in whose interval it is; none is of 0."""
    rng, replay = np.random.default_rng(size), rainbow.Replay(make_args(total_steps=400))
    for row in synthetic(size + 7):
        replay.add(*row)
    replay.ready = size
    replay.priorities[:size] = 10 ** rng.uniform(-12, 3, size) * (rng.random(size) < 0.7)
    replay.priorities[rng.integers(size)] = 1.0
    before = np.concatenate([[0], replay.priorities[:size].cumsum()])

    class Given:
        def __init__(self, value: float):
            self.random = lambda count: np.full(count, value)

    for value in (0, 0.3, np.nextafter(1, 0), 1):  # 1: what rounding can make of it
        rows, priorities, _ = replay.sample(64, Given(value))
        parts = (np.arange(64) + value) / 64
        assert (priorities > 0).all() and (priorities == replay.priorities[rows]).all()
        assert (before[rows] / before[-1] <= parts + 1e-12).all()
        assert (parts <= before[rows + 1] / before[-1] + 1e-12).all()


@pytest.mark.parametrize(("first", "rows"), [(0, 0), (1100, 0), (1100, 150), (1100, 1)])
def test_recordings(first, rows, tmp_path):
    """Blank rows before every game, raw rewards, the ends of games alone: complete, cut off, and from within a game."""
    sizes = dict(replay_capacity=1100, steps_per_checkpoint=1100, rows_per_checkpoint=rows, total_steps=2200)
    args = make_args(recorder, **sizes)
    replay, played = recorder.Replay(args), list(synthetic(2200))
    assert not played[1100].is_first
    recorded = []
    for i, row in enumerate(played):
        replay.add(*row)
        if i >= first and (number := recorder.record(args, replay, tmp_path)):
            assert number == i // 1100 + 1
            recorded.append(i + 1)
    at = min(rows + 1, 1100) if rows else 1100
    assert recorded == [n + at for n in (0, 1100) if n >= first]
    expected = []
    for row in played[first : first + 1100]:
        expected += [(np.zeros((84, 84)), 0, 0, 0)] * (3 if row.is_first else 0)
        expected.append((row.frame, row.action, row.reward, row.game_over))
    dtypes = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}  # DQN Replay's
    for j, (name, dtype) in enumerate(dtypes.items()):
        path = tmp_path / f"$store$_{name}_ckpt.{first // 1100 + 1}.gz"
        column = np.array([row[j] for row in expected[: rows + 1 if rows else None]], dtype)
        with gzip.open(path) as stream:
            np.testing.assert_array_equal(np.load(stream), column, strict=True)
    assert not [*tmp_path.rglob("*.tmp")]
