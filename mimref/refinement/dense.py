"""Dense features kept: an optional term of stage 2 that holds the patches' similarities to those of the base.

It needs no second set of activations: the base's tokens come from a pass without gradient, and are compared with the
refined encoder's within one image, so the term is a sum over images and can be computed part by part.

Shapes: N images (views), P patches, D and E widths of the two encoders' tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.encoders.backbones import TokenEncoder
from mimref.refinement.config import DenseKind


def gram_difference(student_NPD: Tensor, base_NPE: Tensor) -> Tensor:
    """Mean square difference of the patches' cosine similarities, (N,): Gram anchoring (DINOv3, Siméoni et al. 2025).

    Over all P * P pairs of an image's patches, negative similarities included, as in DINOv3's published settings.
    """
    student_NPP, base_NPP = (_kernel(F.normalize(tokens, dim=2)) for tokens in (student_NPD, base_NPE))
    return (student_NPP - base_NPP).square().mean(dim=(1, 2))


def cka_distance(student_NPD: Tensor, base_NPE: Tensor) -> Tensor:
    """1 - CKA of the patches' linear kernels, (N,), in 0..1 (Kornblith et al. 2019; of patches: Yeo et al. 2025).

    Neither rotations nor the scale of tokens change it, nor a vector that is added to all of them. An image whose
    patches are all the same has no kernel: it adds a constant, without a gradient of its own.
    """
    # The kernel of centred tokens is the centred kernel: no product with centring matrices.
    kernels = (_kernel(tokens - tokens.mean(dim=1, keepdim=True)) for tokens in (student_NPD, base_NPE))
    student_NPP, base_NPP = (F.normalize(kernel.flatten(1), dim=1).view_as(kernel) for kernel in kernels)
    # Of unit length, so half their squared distance is 1 - CKA, without the cancellation near equality.
    return 0.5 * (student_NPP - base_NPP).square().sum(dim=(1, 2))


def _kernel(tokens_NPD: Tensor) -> Tensor:
    return torch.bmm(tokens_NPD, tokens_NPD.transpose(1, 2))


class DenseTerm:
    """The distance of an encoder's patches to those of the frozen base, at one block."""

    def __init__(self, base: TokenEncoder, block: int, kind: DenseKind) -> None:
        """base: in evaluation mode, and never trained. block: 1-based."""
        self.base, self.block, self.kind = base, block, kind

    @torch.no_grad()
    def base_patches(self, images_N3SS: Tensor) -> Tensor:
        """The base's patch tokens at the block, (N, P, D)."""
        return read_patches(self.base, images_N3SS, self.block)

    def distance(self, student_NPD: Tensor, base_NPD: Tensor) -> Tensor:
        """Distance of every image, (N,), in float32 at least."""
        compare = gram_difference if self.kind == "gram" else cka_distance
        precise = torch.promote_types(student_NPD.dtype, torch.float32)
        return compare(student_NPD.to(precise), base_NPD.to(precise))


def patches_of(encoder: TokenEncoder, tokens_NLD: Tensor) -> Tensor:
    """Tokens without the prefix (CLS, registers), (N, P, D)."""
    return tokens_NLD[:, encoder.num_prefix_tokens :]


def read_patches(encoder: TokenEncoder, images_N3SS: Tensor, block: int) -> Tensor:
    """Patch tokens of a block (1-based), (N, P, D), read as heads read them."""
    final_norm = encoder.architecture.has_final_norm
    return patches_of(encoder, encoder.blocks(images_N3SS, [block], final_norm=final_norm)[0])
