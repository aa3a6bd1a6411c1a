"""Towers that take images as bytes: `forward_uint8`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..running.uint8 import check_images, normalization
from .base import Fused


class TakesUint8(Fused):
    def forward_uint8(
        self,
        images: Tensor,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        rescale_factor: float = 1 / 255,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`model((images * rescale_factor - mean) / std)`, where Triton runs without making those pixels in memory.

        images uint8 `[B, C, H, W]` of any strides, resized already; a batch with its channels last is passed as
        `images.permute(0, 3, 1, 2)`. The other names are those of Hugging Face's image processors, the defaults
        SigLIP's. Outputs and keyword arguments as `forward`.

        Raises:
            TypeError: images are no uint8 tensor, image_mean or image_std no numbers, one a channel.
            ValueError: images have the wrong rank, channels or size; image_mean or image_std not one finite value a
                channel; a zero in image_std or rescale_factor. And what `forward` raises.
        """
        channels = self.config.num_channels
        check_images(images, channels)
        normalize = normalization(image_mean, image_std, rescale_factor, channels)
        # What wraps this very model's forward is to see the normalised pixels.
        hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self)
        hooked = hooked or type(self).forward is not type(self)._own_forward
        if not (hooked or torch.compiler.is_compiling()):
            derived, reason = self._route(images, interpolate_pos_encoding, **kwargs)
            if reason is None and derived.folds(normalize):
                return self._fused(derived, images, interpolate_pos_encoding, kwargs, normalize)
        return self(normalize(images), interpolate_pos_encoding, **kwargs)
