"""Photometric changes to images of any number of channels: against float64, channel by channel, and refusals."""

import pytest
import torch

from mimref.config.run import ViewsConfig
from mimref.data.views import Photometric, check_colors, gaussian_blur
from mimref.draws import Operation
from mimref.errors import ConfigError
from tests.test_data_photometric import ALWAYS, CPU, OFF, close, pin


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_brightness_and_contrast_of_any_channels(
    channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factor for all channels, and contrast around each channel's own mean, in float64."""
    generator = torch.Generator().manual_seed(channels)
    crops = torch.randint(0, 256, (3, 1, channels, 12, 12), generator=generator).to(dtype)
    before = crops.clone()
    mean, std = tuple(0.1 + 0.01 * n for n in range(channels)), tuple(0.2 + 0.01 * n for n in range(channels))
    config = OFF.model_copy(update={"jitter": (0.4, 0.4, 0.0, 0.0), "jitter_probability": 1.0})
    # The draws: whether to jitter, four strengths (brightness 1.2, contrast 0.7), and the order (brightness first).
    pin(monkeypatch, {Operation.JITTER: [ALWAYS, 0.75, 0.125, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4]})
    found = Photometric(config, 0, CPU, mean, std)(crops, 0, torch.arange(3), [0])[0]
    assert torch.equal(crops, before)
    image = (crops[:, 0].double() / 255 * 1.2).clamp(0, 1)
    own = image.mean(dim=(2, 3), keepdim=True)
    image = (own + 0.7 * (image - own)).clamp(0, 1)
    shape = (1, channels, 1, 1)
    wanted = (image - torch.tensor(mean, dtype=torch.float64).view(shape)) / torch.tensor(std).double().view(shape)
    close(found.double(), wanted)


def test_blur_and_flip_treat_channels_alike() -> None:
    images = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.7, 1.9])
    for channel in range(5):
        alone = gaussian_blur(images[:, channel : channel + 1], sigma)
        close(gaussian_blur(images, sigma)[:, channel : channel + 1], alone, atol=1e-6)
    crops = (images[:, None] * 255).byte()
    flipped = Photometric(OFF.model_copy(update={"flip": 1.0}), 0, CPU, (0.0,), (1.0,))(crops, 0, torch.arange(2), [0])
    close(flipped[0], crops[:, 0].flip(-1) / 255)


@pytest.mark.parametrize("name", ["jitter", "gray_probability", "solarize_probability"])
def test_colours_that_other_images_do_not_have_are_refused(name: str) -> None:
    config = ViewsConfig(jitter=(0.4, 0.4, 0, 0), gray_probability=0.0, solarize_probability=(0.0, 0.0, 0.0))
    check_colors(config, 4)
    asked = config.model_copy(update={name: getattr(ViewsConfig(), name)})
    check_colors(asked, 3)
    check_colors(asked.model_copy(update={"color": False}), 4)
    with pytest.raises(ConfigError, match=rf"views\.{name} .*4 channels"):
        check_colors(asked, 4)
