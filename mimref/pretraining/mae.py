"""A masked autoencoder (He et al. 2022): the encoder sees a quarter of the patches, a light decoder predicts the rest.

Shapes: B images, N patches, K visible patches, D encoder width.
"""

from torch import Tensor, nn

from mimref.config.run import DecoderConfig
from mimref.encoders.masking import (
    MAEDecoder,
    count_patches,
    count_visible,
    draw_mask,
    hidden_error,
    init_masked_model,
    normalize_patches,
    patchify,
)
from mimref.encoders.vit import Encoder


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder with MAE's initialisation and its loss on normalised pixels of hidden patches.

    At least one patch stays visible and at least one is hidden. Raises ConfigError for images of a single patch.
    """

    def __init__(self, encoder: Encoder, decoder: DecoderConfig, mask_ratio: float) -> None:
        super().__init__()
        architecture, size = encoder.architecture, encoder.patch_size
        grid = architecture.image_size // size
        self.encoder = encoder
        self.decoder = MAEDecoder(decoder, encoder.embed_dim, grid, architecture.channels * size**2)
        self.num_patches = count_patches(encoder)
        self.num_visible = count_visible(self.num_patches, mask_ratio)
        init_masked_model(self, encoder, self.decoder.mask_token)

    def forward(self, images: Tensor, noise_BN: Tensor) -> Tensor:
        """Return the mean squared error over hidden patches, each normalised by its own mean and variance.

        images: (B, C, S, S), normalised. noise_BN: one random number per patch; those with the smallest stay visible.
        """
        mask = draw_mask(noise_BN, self.num_visible)
        visible = self.encode_visible(images, mask.visible_BK)
        pixels: Tensor = self.decoder(visible, mask.restore_BN)
        return hidden_error(pixels, normalize_patches(patchify(images, self.encoder.patch_size)), mask.hidden_BN)

    def encode_visible(self, images: Tensor, visible_BK: Tensor) -> Tensor:
        """Return the tokens of the visible patches only, after the final norm, CLS first: (B, 1 + K, D)."""
        return self.encoder.blocks(images, [self.encoder.depth], final_norm=True, visible_BK=visible_BK)[0]
