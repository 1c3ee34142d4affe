"""Blocks and heads compile as whole graphs, in few versions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture, new_encoder
from mimref.encoders.vit import Architecture
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.method import compile_blocks
from mimref.refinement.norms import NORMS, Norm

VIT = Architecture("custom", 32, width=32, depth=3, num_heads=2, patch_size=8)
POST_NORM = Architecture("custom", 32, width=32, depth=3, num_heads=2, patch_size=8, post_norm=True)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that torch.compile makes: whole ones, or it raises. They run as they are, without a C++ compiler."""
    found: list[Any] = []
    compile_any = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_any(f, backend=backend, fullgraph=True, **kwargs))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", [VIT, POST_NORM, BackboneArchitecture("eva02_tiny_patch14_224", 56)])
def test_one_graph_with_and_one_without_gradient_serve_all_blocks(
    architecture: EncoderArchitecture, checkpointing: bool, graphs: list[Any]
) -> None:
    """For plain and for rotary vision transformers, and for both view sizes."""
    encoder = new_encoder(architecture).train()
    encoder.checkpointing = checkpointing
    compile_blocks(encoder)
    side = architecture.image_size
    for size in (side, side // 2, side):
        tokens = encoder.blocks(torch.randn(2, 3, size, size), [3])[0]
        tokens.sum().backward()
        with torch.no_grad():
            encoder.blocks(torch.randn(3, 3, size, size), [3])
    assert len(graphs) == 2


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.14", reason="torch 2.6 does not compile ConvNeXt's stage")
@pytest.mark.parametrize(
    "name", [pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow), "convnextv2_atto"]
)
def test_a_stage_of_windows_or_convolutions_is_one_graph(name: str, graphs: list[Any]) -> None:
    backbone = new_encoder(BackboneArchitecture(name, 224)).train()
    inputs: list[torch.Tensor] = []
    stage = backbone.block_modules[0]
    with torch.no_grad():
        handle = stage.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
        for size in (224, 96):
            backbone.blocks(torch.randn(2, 3, size, size), [1])
        handle.remove()
    holder = nn.Module()
    holder.block_modules = [stage]
    compile_blocks(holder)  # type: ignore[arg-type]
    for x in inputs:
        stage(x).sum().backward()
    assert 1 <= len(graphs) <= 2  # each size may have its own


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", [[32, 32], [32, 64]])
def test_heads_are_one_graph(norm: Norm, widths: list[int], graphs: list[Any]) -> None:
    config = HeadsConfig(projector_hidden=16, predictor_hidden=16, output=8, norm=norm)
    heads = Heads(config, widths)
    heads.compile(dynamic=True)
    for rows in (12, 36, 24):
        features = heads.stacked([torch.randn(rows, width, requires_grad=True) for width in widths])
        heads(*features)[1].sum().backward()
    assert len(graphs) == 1
