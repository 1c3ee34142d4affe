"""The dense term: an optional term of stage 2 that keeps the similarities between patches close to the base's.

It needs no second set of activations: the base's tokens come from a pass without gradient. Tokens are compared with the
refined encoder's within one image, so the term is a sum over images and can be computed part by part.

Shapes: N images (views), P patches, D and E widths of the two encoders' tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.encoders.backbones import TokenEncoder
from mimref.refinement.config import DenseKind


def gram_difference(student_NPD: Tensor, base_NPE: Tensor) -> Tensor:
    """Return the mean squared difference of the patches' cosine similarities, (N,).

    This is Gram anchoring (DINOv3, Siméoni et al. 2025), over all P * P pairs of an image's patches and with negative
    similarities included, as in DINOv3's published settings.
    """
    student_NPP, base_NPP = (_kernel(F.normalize(tokens, dim=2)) for tokens in (student_NPD, base_NPE))
    return (student_NPP - base_NPP).square().mean(dim=(1, 2))


def cka_distance(student_NPD: Tensor, base_NPE: Tensor) -> Tensor:
    """Return 1 - CKA of the patches' linear kernels, (N,), in 0..1 (Kornblith et al. 2019; patches: Yeo et al. 2025).

    It is invariant to rotating or scaling all tokens and to adding a vector to all of them. An image whose patches are
    all equal has a zero kernel: it adds a constant, without a gradient.
    """
    # The kernel of centred tokens is the centred kernel, so no centring matrices are needed.
    kernels = (_kernel(tokens - tokens.mean(dim=1, keepdim=True)) for tokens in (student_NPD, base_NPE))
    student_NPP, base_NPP = (F.normalize(kernel.flatten(1), dim=1).view_as(kernel) for kernel in kernels)
    # Both have unit length, so half their squared distance is 1 - CKA, without cancellation near equality.
    return 0.5 * (student_NPP - base_NPP).square().sum(dim=(1, 2))


def _kernel(tokens_NPD: Tensor) -> Tensor:
    return torch.bmm(tokens_NPD, tokens_NPD.transpose(1, 2))


class DenseTerm:
    """The distance between an encoder's patches and those of the frozen base, at one block."""

    def __init__(self, base: TokenEncoder, block: int, kind: DenseKind) -> None:
        """base: in evaluation mode and never trained. block: 1-based."""
        self.base, self.block, self.kind = base, block, kind

    @torch.no_grad()
    def base_patches(self, images_N3SS: Tensor) -> Tensor:
        """Return the base's patch tokens at the block, (N, P, D)."""
        return read_patches(self.base, images_N3SS, self.block)

    def distance(self, student_NPD: Tensor, base_NPD: Tensor) -> Tensor:
        """Return the distance of every image, (N,), in float32 or float64."""
        compare = gram_difference if self.kind == "gram" else cka_distance
        precise = torch.promote_types(student_NPD.dtype, torch.float32)
        return compare(student_NPD.to(precise), base_NPD.to(precise))


def patches_of(encoder: TokenEncoder, tokens_NLD: Tensor) -> Tensor:
    """Return the tokens without the prefix (CLS, registers), (N, P, D)."""
    return tokens_NLD[:, encoder.num_prefix_tokens :]


def read_patches(encoder: TokenEncoder, images_N3SS: Tensor, block: int) -> Tensor:
    """Return the patch tokens of a block (1-based), (N, P, D), as heads at this block read them."""
    final_norm = encoder.architecture.has_final_norm
    return patches_of(encoder, encoder.blocks(images_N3SS, [block], final_norm=final_norm)[0])
