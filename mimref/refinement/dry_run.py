"""`mimref refine --dry-run`: what a plan would do."""

import torch

from mimref.encoders.checkpoints import encoder_from
from mimref.refinement.heads import Heads
from mimref.refinement.memory import state_bytes
from mimref.refinement.plan import Plan


def describe(plan: Plan) -> dict[str, str]:
    """Label to text: sizes, parameters, steps, and memory without activations.

    Raises CheckpointError when the weights do not fit.
    """
    config, architecture = plan.config, plan.architecture
    encoder = encoder_from(plan.checkpoint, architecture)
    with torch.device("meta"):
        heads = Heads(config.heads, len(plan.blocks), encoder.embed_dim)
    encoder_count = sum(parameter.numel() for parameter in encoder.parameters())
    heads_count = sum(parameter.numel() for parameter in heads.parameters())
    state = state_bytes(config, architecture, plan.blocks, "encoder" if plan.encoder_steps else "heads")
    mebibytes = state.total / 2**20
    memory = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    views = 2 + config.views.local_views
    facts = {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, "
        f"{'post' if architecture.post_norm else 'pre'}-norm, {encoder_count:,} parameters",
        "weights": str(plan.checkpoint.path),
        "heads": f"{len(plan.blocks)} at blocks {', '.join(map(str, plan.blocks))}, {heads_count:,} parameters",
        "images": f"{len(plan.source):,} of {plan.source.name}, {views} views each, batches of {config.batch_size}",
        "steps": f"{plan.heads_steps:,} (heads), then {plan.encoder_steps:,} (encoder and heads)",
        "memory": f"{memory} in float32 for weights, optimizer, average and queue, without activations",
    }
    notices = plan.checkpoint.notices(architecture)
    if notices:
        facts["notice"] = "; ".join(notices)
    warnings = [*plan.warnings, *plan.source.notices]
    return facts | ({"warning": "; ".join(warnings)} if warnings else {})
