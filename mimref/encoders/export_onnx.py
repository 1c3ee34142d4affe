"""Export to ONNX: a graph that returns the tokens of chosen blocks."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimref.encoders.export import ENDINGS, Export, comparison_images, data_file, features_by_name, write_verified
from mimref.encoders.tokens import check_blocks
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf holds up to 2 GiB, and torch itself splits files somewhat below; larger weights go to a second file.
_LARGEST_BYTES = 1_500_000_000


def export_onnx(
    encoder: Encoder,
    out: Path,
    facts: Mapping[str, Any],
    blocks: Sequence[int],
    *,
    force: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write an ONNX graph that returns the tokens of `blocks` (1-based), for batches of any size.

    out: ends in .onnx. Input: normalised `images` (B, C, S, S) with the encoder's number of channels C. Outputs:
    `block_N` (B, L, D), prefix tokens first, and `normed` (B, L, D) if the last block is among them and the encoder has
    a final norm. The metadata holds `facts` and the architecture. Weights above 1.5 GB go to a second file, `out` with
    `.data` added.
    Raises ConfigError for missing packages and for blocks outside 1..depth, OutputError as in `export_timm`.
    """
    check_new_file(out, ENDINGS["onnx"], force)
    check_packages()
    check_blocks(blocks, encoder.depth)
    external = 4 * sum(tensor.numel() for tensor in encoder.vit.state_dict().values()) > _LARGEST_BYTES
    if external:
        check_new_file(data_file(out), (".data",), force)
    graph = _Graph(encoder, blocks).eval()

    def write(file: Path) -> None:
        """Trace the encoder and save the graph with a dynamic batch size."""
        program = torch.onnx.export(
            graph,
            (comparison_images(encoder)[:2],),
            input_names=["images"],
            output_names=graph.names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # The tracer's notes on nodes contain folder names.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        metadata = {"architecture": encoder.architecture.to_dict(), **facts, "blocks": list(blocks)}
        for key, value in metadata.items():
            program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
        program.save(file, external_data=external)

    difference = write_verified(
        out, partial(features_by_name, encoder), write, lambda file: _read_onnx(file, encoder), listener
    )
    return Export(out, difference, f"onnxruntime.InferenceSession({str(out)!r})")


def check_packages() -> None:
    """Raise ConfigError if a package that writes or reads ONNX is not installed."""
    if any(find_spec(package) is None for package in _PACKAGES):
        raise ConfigError(f"--to onnx needs {', '.join(_PACKAGES)}: pip install 'mimref[onnx]'")


class _Graph(nn.Module):
    """The module to trace: an encoder's chosen blocks, and the last one's tokens after the final norm."""

    def __init__(self, encoder: Encoder, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        chosen = list(dict.fromkeys(blocks))
        normed = [encoder.depth] if encoder.depth in chosen and not isinstance(encoder.vit.norm, nn.Identity) else []
        self.indices = chosen + normed
        self.final_norm = [False for _ in chosen] + [True for _ in normed]
        self.names = [f"block_{block}" for block in chosen] + ["normed" for _ in normed]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.encoder.blocks(images, self.indices, final_norm=self.final_norm)


def _read_onnx(file: Path, encoder: Encoder) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": comparison_images(encoder).numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
