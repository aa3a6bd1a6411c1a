"""patch_embed against a convolution in float64, and the moments that it leaves."""

import numpy
import pytest
import reference
import torch
from torch.nn import functional as F

from siglip_fast.ops import Ops, PatchEmbedding

SHAPES = [  # B, C, height, width, p, D
    pytest.param(1, 3, 224, 224, 16, 768, id="base-patch16"),
    pytest.param(1, 3, 64, 96, 32, 768, id="base-patch32"),
    pytest.param(1, 3, 160, 48, 16, 1024, id="large-patch16"),
    pytest.param(1, 3, 196, 84, 14, 1152, id="so400m-patch14"),
    pytest.param(1, 3, 48, 160, 16, 1536, id="giant-patch16"),
    pytest.param(3, 3, 57, 43, 14, 72, id="dropped-pixels"),
    pytest.param(2, 1, 24, 16, 8, 40, id="one-channel"),
    pytest.param(1, 3, 16, 16, 16, 64, id="one-patch"),
]


def make(B, C, height, width, p, D, dtype, device):
    torch.manual_seed(height + D)
    pixel_values = torch.randn(B, C, height, width).to(device)
    weight = (torch.randn(D, C, p, p) * (C * p * p) ** -0.5).to(device, dtype)
    weight[:, -1, -1, -1] *= 20  # the last of K must not be dropped
    bias = torch.randn(D).to(device, dtype)
    position = reference.outliers((height // p) * (width // p), D).to(device, dtype)
    return pixel_values, weight, bias, position


def check(backend, pixel_values, weight, bias, position):
    patch = PatchEmbedding(weight.flatten(1), bias, weight.shape[-1])
    patch = Ops(backend).pack(patch, tokens=len(position))
    out, moments = Ops(backend).patch_embed(pixel_values, patch, position)
    cast = pixel_values.to(weight.dtype)
    expected = reference.patch_embed(cast, weight, bias, position)
    same_dtype = F.conv2d(cast, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + position
    reference.assert_accurate(out, expected, same_dtype)
    if backend == "triton":
        assert reference.relative_error(moments, reference.moments(out)) < 1e-6


@pytest.mark.parametrize("B, C, height, width, p, D", SHAPES)
def test_accuracy(B, C, height, width, p, D, dtype, backend, device):
    check(backend, *make(B, C, height, width, p, D, dtype, device))


@pytest.mark.parametrize("layout", ["channels_last", "cropped", "flipped_axes", "same_dtype"])
def test_layouts_of_the_pixels(layout, dtype, backend, device):
    pixel_values, *rest = make(2, 3, 57, 43, 14, 72, dtype, device)
    if layout == "channels_last":
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        pixel_values = torch.nn.functional.pad(pixel_values, (3, 2, 1, 5), value=1e4)[:, :, 1:58, 3:46]
    elif layout == "flipped_axes":
        pixel_values = pixel_values.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        pixel_values = pixel_values.to(dtype)
    check(backend, pixel_values, *rest)


@pytest.mark.parametrize("strides", [(1_200_000_000, 64), (64, 1_200_000_000)], ids=["batch", "channel"])
def test_offsets_beyond_32_bits(strides, device):
    """The third image, or channel, begins 2.4·10⁹ elements after the first: in 32 bits, before it."""
    if torch.empty(0).is_cuda and not torch.cuda.is_available():
        pytest.skip("ttsem copies the whole of the memory that a view points into")
    # calloc: pages that nobody touches take no memory
    memory = torch.from_numpy(numpy.zeros(2 * max(strides) + 8 * 8 * 3, dtype=numpy.float16)).to(device)
    pixel_values = memory.as_strided((3, 3, 8, 8), (*strides, 8, 1))
    torch.manual_seed(0)
    pixel_values.copy_(torch.randn(3, 3, 8, 8))
    weight, bias = torch.randn(40, 3, 8, 8).half().to(device), torch.randn(40).half().to(device)
    check("triton", pixel_values, weight, bias, torch.randn(1, 40).half().to(device))
