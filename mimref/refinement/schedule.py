"""Names of the stages, and the heads' loss weights over stage 2 (Table 1c, Fig. 7)."""

import math
from typing import Literal

StageName = Literal["heads", "encoder"]


def head_weights(schedule: str, progress: float, num_heads: int) -> list[float]:
    """Return each head's loss weight, earliest head first; the last head always has weight 1.

    schedule: `constant`, `uniform_decay`, `staggered_decay`, `staggered_step` or `one_hot`, see LossConfig. progress:
    completed share of stage 2, 0..1.
    """
    intermediate = num_heads - 1
    return [_weight(schedule, progress, head, intermediate) for head in range(intermediate)] + [1.0]


def turning_point(head: int, intermediate: int) -> float:
    """Return the share of stage 2 after which an intermediate head's weight falls: evenly spread from 0.2 to 0.8."""
    return 0.2 + 0.6 * head / (intermediate - 1) if intermediate > 1 else 0.2


def _weight(schedule: str, progress: float, head: int, intermediate: int) -> float:
    turn = turning_point(head, intermediate)
    if schedule == "constant":
        return 1.0
    if schedule == "uniform_decay":
        return _cosine_from(0.2, progress)
    if schedule == "staggered_decay":
        return _cosine_from(turn, progress)
    if schedule == "staggered_step":
        return 1.0 if progress < turn else 0.0
    start = turning_point(head - 1, intermediate) if head else 0.0
    if progress < start:
        return 0.1
    return 1.0 if progress < turn else 0.0


def _cosine_from(turn: float, progress: float) -> float:
    if progress <= turn:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - turn) / (1 - turn)))
