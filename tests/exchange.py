"""Print what processes exchange per update, for both directions of the loss: `python tests/exchange.py` (table rows).

Counts what the loopback device carries, so nothing else may use it meanwhile. On Linux, as root, run
`unshare -n sh -c "ip link set lo up; python tests/exchange.py"`. Heads are replaced by random projections and
predictions, so norms have no influence, and the time is that of lookup, loss and exchange.
"""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mimref.distributed.group import own_rank, world_size
from mimref.refinement.alignment import Queue
from tests.ranks import run_ranks
from tests.steps import BLOCKS, CPU, make_batch, make_step

HEADS, IMAGES, LOCAL_VIEWS, OUTPUT, UPDATES = len(BLOCKS), 128, 4, 128, 20
VIEWS = 2 + LOCAL_VIEWS
FLOAT_BYTES = 4


def expected_bytes(direction: str, world: int) -> int:
    """Return bytes received per update and rank: all-gather, R - 1 parts; ring all-reduce, 2 (R - 1) of R parts."""
    view = HEADS * (IMAGES // world) * OUTPUT * FLOAT_BYTES
    gathered = (world - 1) * view
    return 2 * gathered if direction == "projection" else (2 + VIEWS + 2 * VIEWS) * gathered


def received() -> int:
    """Return the number of bytes that the loopback device has carried."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def exchange(direction: str) -> tuple[float, float]:
    """Return bytes per update and rank, and seconds per update."""
    step, generator = make_step(direction=direction, norm="layer"), torch.Generator().manual_seed(own_rank())
    images = IMAGES // world_size()
    step.queue, step.most_images = Queue(HEADS, 1024, OUTPUT, generator=generator, device=CPU), images
    step.temperature_H = step.temperature_H.float()
    rows_2HNO = torch.randn(2, HEADS, VIEWS * images, OUTPUT, generator=generator)
    projection_HNO, prediction_HNO = F.normalize(rows_2HNO, dim=3)
    prediction_HNO.requires_grad_()

    def heads(*_: Tensor) -> tuple[Tensor, Tensor]:
        return projection_HNO, prediction_HNO

    step.trained_heads = heads  # type: ignore[assignment]
    first = own_rank() * images
    batch = make_batch(range(first, first + images), local_views=LOCAL_VIEWS)
    features = step.features(batch, train_encoder=False)

    def update() -> None:
        step._align(features, batch, torch.ones(HEADS), 1).loss.backward()

    update()
    dist.barrier()
    time.sleep(0.5)  # lets the others receive what is still on its way
    before, started = received(), time.perf_counter()
    for _ in range(UPDATES):
        update()
    seconds = time.perf_counter() - started
    time.sleep(0.5)
    return (received() - before) / UPDATES / world_size(), seconds / UPDATES


def main() -> None:
    for world in (2, 4):
        for direction in ("projection", "prediction"):
            with tempfile.TemporaryDirectory() as folder:
                bytes_, seconds = run_ranks(exchange, world, Path(folder), direction)[0]
            expected = expected_bytes(direction, world)
            print(f"| {world} | {direction} | {expected:,} | {bytes_:,.0f} | {1e3 * seconds:.0f} |")


if __name__ == "__main__":
    main()
