"""SimMIM (Xie et al. 2022): the encoder sees mask tokens in place of hidden patches; a linear layer predicts pixels.

The encoder's last blocks act like a masked autoencoder's decoder, so the best features come from earlier blocks.

Shapes: B images, N patches, D encoder width.
"""

from torch import Tensor, nn

from mimref.encoders.masking import (
    LinearDecoder,
    count_patches,
    count_visible,
    draw_mask,
    hidden_error,
    in_squares,
    init_masked_model,
    normalize_patches,
    patchify,
)
from mimref.encoders.vit import Encoder


class SimMIM(nn.Module):
    """Encoder and linear decoder with MAE's initialisation and loss on normalised pixels of hidden patches.

    Hidden patches form squares of `mask_size` patches a side. The authors' code hides whole squares only, and its loss
    is the mean absolute error of pixels that are not normalised by patch. At least one patch stays visible and at least
    one is hidden. Raises ConfigError for images of a single patch.
    """

    def __init__(self, encoder: Encoder, mask_ratio: float, mask_size: int = 1) -> None:
        super().__init__()
        architecture, size = encoder.architecture, encoder.patch_size
        self.encoder = encoder
        self.decoder = LinearDecoder(encoder.embed_dim, architecture.channels * size**2)
        self.num_patches = count_patches(encoder)
        self.mask_size = mask_size
        self.num_visible = count_visible(self.num_patches, mask_ratio)
        init_masked_model(self, encoder, self.decoder.mask_token)

    def forward(self, images: Tensor, noise_BN: Tensor) -> Tensor:
        """Return the mean squared error over hidden patches, each normalised by its own mean and variance.

        images: (B, C, S, S), normalised. noise_BN: one random number per patch, from 0 to 1. The squares whose first
        patches have the smallest stay visible.
        """
        hidden_BN = draw_mask(in_squares(noise_BN, self.mask_size), self.num_visible).hidden_BN
        pixels: Tensor = self.decoder(self.encode_masked(images, hidden_BN))
        return hidden_error(pixels, normalize_patches(patchify(images, self.encoder.patch_size)), hidden_BN)

    def encode_masked(self, images: Tensor, hidden_BN: Tensor) -> Tensor:
        """Return the tokens of all patches after the final norm, with the hidden ones masked: (B, N, D)."""
        masked = hidden_BN.bool(), self.decoder.mask_token
        tokens = self.encoder.blocks(images, [self.encoder.depth], final_norm=True, masked=masked)[0]
        return tokens[:, self.encoder.num_prefix_tokens :]
