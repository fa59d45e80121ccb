"""Deterministic parameters, batches and noise behind the golden numbers in this folder.

Every value is a function of a name alone, so any implementation that gives its parameters
the canonical names can fill itself with the same numbers and compare what comes out.
"""

import zlib

import numpy as np


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def fill_array(name: str, shape: tuple) -> np.ndarray:
    """Values of the parameter `name` (salt + optional 'target/' + canonical name), float32, any layout of `shape`.

    Matrices, kernels and per-game tables: standard normal / sqrt(elements per first-dimension entry).
    The per-game spatial embedding (name ends in 'spatial_embed'): standard normal.
    Vectors: biases 0.02 * standard normal; norm weights (name ends in 'norm.weight') 1 + 0.02 * standard normal.
    Tokens (shape 1 x 1 x d): 0.02 * standard normal.
    The flat order is that of the shape listed in the .npz (`param_names`): reshape from it.
    """
    size = int(np.prod(shape))
    z = _rng(name).standard_normal(size, dtype=np.float32)
    if name.endswith("spatial_embed"):
        return z
    vector = len(shape) == 1 or (len(shape) == 3 and shape[0] == shape[1] == 1)
    if vector:
        return 1 + 0.02 * z if name.endswith("norm.weight") else 0.02 * z
    return z / np.float32(np.sqrt(size / shape[0]))


def make_batch(salt: str, n: int = 4, t: int = 1, two_futures: bool = False) -> dict:
    """A batch of frame stacks: obs, next_obs uint8 [n, t, 4, 84, 84] (next_obs [n, t, 2, 4, 84, 84] for two futures,
    the first being the nearer one), action, reward, rtg, game_id [n, t], done [n, t]."""
    rng = _rng(f"{salt}batch/{n}/{t}/{int(two_futures)}")
    base = rng.integers(0, 256, (n, 1, 1, 12, 12), dtype=np.uint8).repeat(7, 3).repeat(7, 4)  # blocks, like sprites

    def frames(lead):
        noise = rng.integers(0, 64, (n, t, *lead, 84, 84), dtype=np.uint8)
        b = base.reshape(n, 1, *([1] * len(lead)), 84, 84)
        return (b // 2 + noise).astype(np.uint8)

    obs = frames((4,))
    next_obs = frames((2, 4)) if two_futures else frames((4,))
    done = np.zeros((n, t), dtype=np.uint8)
    if t == 1:
        done[n - 1, 0] = 1  # the last sample's future lies past an episode's end
    return {
        "obs": obs,
        "next_obs": next_obs,
        "action": rng.integers(0, 18, (n, t)).astype(np.int64),
        "reward": rng.integers(-1, 2, (n, t)).astype(np.float32),
        "rtg": rng.normal(0, 3, (n, t)).astype(np.float32),
        "game_id": np.array([3, 17, 17, 59] * ((n + 3) // 4))[:n, None].repeat(t, 1).astype(np.int64),
        "done": done,
    }


def make_noise(salt: str, n: int, tokens: int) -> np.ndarray:
    """Uniform noise float32 [n, tokens] whose argsort is the token shuffle of MAE and SiamMAE."""
    return _rng(f"{salt}noise/{n}/{tokens}").random((n, tokens), dtype=np.float32)
