"""The file with stage 1's result for `--heads-from`: heads, queue, and the encoder, blocks and images they fit."""

from pathlib import Path

import torch

from mimref.distributed.group import own_rank
from mimref.distributed.sharding import gathered
from mimref.encoders.parameters import weights_hash
from mimref.errors import CheckpointError, ConfigError
from mimref.files import atomic_write
from mimref.progress import Listener
from mimref.refinement.method import Method
from mimref.refinement.plan import Plan, heads_file


def save_heads(path: Path, plan: Plan, method: Method) -> None:
    """Write heads and queue; the encoder must still be the base. Call this on all ranks if the heads are sharded."""
    fits = {
        "base": weights_hash(method.encoder),
        "blocks": plan.blocks,
        "pool": plan.config.heads.pool,
        "norm": plan.config.heads.norm,
        "images": plan.source.fingerprint,
    }
    heads = {name: gathered(tensor) for name, tensor in method.heads.state_dict().items()}
    if own_rank() == 0:
        with atomic_write(path) as stream:
            torch.save({**fits, "heads": heads, "queue": method.queue.state_dict()}, stream)


def load_heads(folder: Path, plan: Plan, method: Method, listener: Listener) -> None:
    """Load another run's heads and queue. Raises CheckpointError or ConfigError if they do not fit this run."""
    path = heads_file(str(folder))
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        base, blocks, pool, images = (saved[key] for key in ("base", "blocks", "pool", "images"))
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as the heads of a run; name another folder") from error
    if base != weights_hash(method.encoder):
        wrong = f"these heads were trained on another encoder than {plan.checkpoint.path}"
        raise CheckpointError(f"{path}: {wrong}; name that run's --weights, or omit --heads-from")
    if blocks != plan.blocks:
        numbers = ",".join(map(str, blocks))
        raise ConfigError(f"{path}: its heads read blocks {numbers}; set heads.blocks={numbers}")
    if pool != plan.config.heads.pool:
        raise ConfigError(f"{path}: its heads read {pool!r} tokens; set heads.pool={pool}")
    config, size = plan.config.heads, len(saved["queue"]["sample"])
    norm = saved.get("norm", "batch")  # missing in files of older versions
    if norm != config.norm:
        raise ConfigError(f"{path}: its heads use the {norm} norm; set heads.norm={norm}")
    if size != config.queue_size:
        raise ConfigError(f"{path}: its queue holds {size} rows; set heads.queue_size={size}")
    try:
        method.load_heads(saved["heads"])
        method.queue.load_state_dict(saved["queue"])
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: the widths of its heads differ from heads.projector_hidden {config.projector_hidden}, "
            f"heads.predictor_hidden {config.predictor_hidden} and heads.output {config.output}; set them as in that "
            "run's config.toml"
        ) from error
    if images != plan.source.fingerprint:
        method.queue.sample_Q.fill_(-1)
        listener.warn(f"{path}: its queue was filled from other images, or from files that have changed since")
