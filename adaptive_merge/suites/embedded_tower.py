"""The small vision transformer of the embedded suite, built in code."""

from typing import Final

from open_clip.transformer import VisionTransformer
from torch import nn

__all__ = ["EMBEDDED_FEATURES", "EMBEDDED_IMAGE_SIZE", "build_encoder"]

EMBEDDED_IMAGE_SIZE: Final = 32
EMBEDDED_FEATURES: Final = 128
_WIDTH, _LAYERS, _HEADS, _PATCH = 128, 4, 4, 8


def build_encoder() -> nn.Module:
    """Build the encoder θ of the embedded suite: images [B, 3, 32, 32] → features [B, 128].

    It is open_clip's `VisionTransformer` with a stem of three stride-2 convolutions in place of
    the patch embedding; 0.91 M parameters, no buffer, no normalisation over the batch. Images come
    normalised, features leave without L2 normalisation. The weights are random until the suite's
    `pretrained.safetensors` or an expert is loaded.

    Example:
        >>> import torch
        >>> build_encoder().eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """
    encoder = VisionTransformer(
        image_size=EMBEDDED_IMAGE_SIZE,
        patch_size=_PATCH,
        width=_WIDTH,
        layers=_LAYERS,
        heads=_HEADS,
        mlp_ratio=4.0,
        output_dim=EMBEDDED_FEATURES,
        output_tokens=False,
    )
    # A plain patch embedding learns letters several times slower than convolutions do.
    encoder.conv1 = nn.Sequential(
        nn.Conv2d(3, _WIDTH // 4, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(_WIDTH // 4, _WIDTH // 2, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(_WIDTH // 2, _WIDTH, 3, stride=2, padding=1),
    )
    return encoder
