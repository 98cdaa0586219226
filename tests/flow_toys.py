"""Flows whose velocities are known: mixtures of Gaussians, where paths part, and a smooth one."""

import numpy as np


class Mixture:
    """The exact velocity of a flow from noise to a mixture of Gaussians in `size` dimensions.

    Sample n is of class n % classes: its conditional velocity sees the centres of that class, the unconditional all.
    """

    def __init__(
        self, count: int, size: int = 16, classes: int = 4, each: int = 3, spread: float = 0.25, seed: int = 0
    ):
        rng = np.random.default_rng(seed)
        self.centres = rng.standard_normal((classes, each, size)) * 1.3
        self.classes = np.arange(count) % classes
        self.spread = spread

    def noises(self, seed: int = 1) -> np.ndarray:
        size = self.centres.shape[-1]
        return np.random.default_rng(seed).standard_normal((len(self.classes), size)).astype(np.float32)

    def __call__(self, x, t, guided=True):
        own = self.centres[self.classes]
        every = np.broadcast_to(self.centres.reshape(1, -1, x.shape[1]), (len(x), own.shape[1] * 4, x.shape[1]))
        return self.velocity(x, t, own), self.velocity(x, t, every) if guided else None

    def velocity(self, x, t, centres):
        x = x.astype(np.float64)
        variance = (1 - t) ** 2 + (t * self.spread) ** 2
        away = x[:, None] - t * centres
        logits = -(away**2).sum(2) / (2 * variance)
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        data = centres + t * self.spread**2 / variance * away
        noise = (1 - t) / variance * away
        return (share[:, :, None] * (data - noise)).sum(1).astype(np.float32)


def smooth(x, t, guided=True):
    """A field without parting paths, with another one for the unconditional pass."""
    turn = np.roll(x, 1, 1)
    cond = np.tanh(turn * (0.5 + t)) - x * np.cos(3 * t) + 0.3 * t
    return cond.astype(np.float32), (0.7 * cond + 0.2 * np.sin(turn + t)).astype(np.float32) if guided else None
