"""Random factors of pauses, so that processes that failed together do not try again together."""

from __future__ import annotations

import random

_SYSTEM = random.SystemRandom()


def jittered(seconds: float) -> float:
    """Between half of ``seconds`` and all of it.

    Not drawn by the generator of the module :mod:`random`: an image's augmentation may draw from that one, in another
    thread and by a seed of its own.
    """
    return _SYSTEM.uniform(0.5 * seconds, seconds)
