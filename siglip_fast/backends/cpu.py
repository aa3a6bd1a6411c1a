"""The operations on x86 CPUs through oneDNN. Their contracts are in `siglip_fast.ops`.

With AVX-512 weights are reordered once into the blocked layout that oneDNN's linear kernel reads; bias, GELU-tanh and
the residual are part of that kernel. With AVX2 alone torch's own GEMM is the faster one, except for a single image:
there oneDNN's convolution kernel is (docs/decisions.md), on a second, reordered copy of the weights; GELU is our own.
Attention is oneDNN's on AMD's CPUs with AVX-512 BF16. All else, and weights that `pack` leaves as they are, run as in
plain torch.
"""

import functools
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import onednn_graph
from . import torch as plain
from .torch import attention_pool as attention_pool
from .torch import attention_pool_segments as attention_pool_segments
from .torch import cast as cast
from .torch import layernorm as layernorm

_mkldnn = torch.ops.mkldnn
# Of its linear kernel, which has none for x·σ(1.702x)
_EPILOGUES = {"tanh": ("gelu", [], "tanh"), "erf": ("gelu", [], "none")}


class PackedForImage(NamedTuple):
    """A weight in the layout of the convolution of one image of so many tokens, on so many threads.

    Another number of either may need another layout, and oneDNN would reorder all weights in each call, slower than
    stock. Then, and for batches, torch's GEMM runs on the weights beside these.
    """

    weight: Tensor
    tokens: int
    threads: int


def rows_at_once():
    """Of so many a thread, buffers stay in malloc's hands and partly in the caches. Those of larger batches are new
    pages each time: 32 images of base-patch16-224 in fp32 took 6 % longer in one piece."""
    return 1024 * torch.get_num_threads()


def pack(linear, tokens):
    weight = linear.weight
    isa = _isa(weight)
    if isa == "AVX512":
        return linear._replace(weight=_mkldnn._reorder_linear_weight(weight))
    if isa == "AVX2" and tokens > 1 and (width := _width(*weight.shape)):
        return linear._replace(packed=_pack_for_image(weight, width, tokens))
    return linear


def _isa(weight: Tensor) -> str | None:
    """The instruction set of this CPU, if oneDNN has fast kernels for it in the weight's dtype."""
    dtype = weight.dtype
    if weight.device.type != "cpu":
        return None
    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere these operators are untried
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        has_kernel = dtype == torch.float32 or (dtype == torch.bfloat16 and _mkldnn._is_mkldnn_bf16_supported())
        return "AVX512" if has_kernel else None
    return "AVX2" if capability == "AVX2" and dtype == torch.float32 else None


def _width(out: int, K: int) -> int | None:
    """Into how many pixels a row of K channels is cut, if the kernel suits: in eights, outputs as well as channels.

    It is fast up to 1536 channels a pixel, slow from somewhere between 2048 and 3072 on, and below 256 untried.
    """
    if out % 8 == 0:
        for width in range(1, max(K // 256, 1) + 1):
            if K % (8 * width) == 0 and K // width <= 1536:
                return width
    return None


def _pack_for_image(weight: Tensor, width: int, tokens: int) -> PackedForImage:
    kernel = weight.unflatten(1, (width, -1)).transpose(1, 2)[:, :, None]  # [out, K / width, 1, width]
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    image = [1, kernel.shape[1], 1, tokens * width]
    packed = _mkldnn._reorder_convolution_weight(kernel, *_geometry(width), image)
    return PackedForImage(packed, tokens, torch.get_num_threads())


def _is_plain(linear) -> bool:
    return not (linear.weight.is_mkldnn or linear.packed)


def patch_embed(pixel_values, patch, position):
    if _is_plain(patch):
        return plain.patch_embed(pixel_values, patch, position)
    patches = plain.flat_patches(pixel_values.to(patch.weight.dtype), patch.patch_size)
    tokens = _linear(patches, patch)
    return (tokens.add_ if tokens.dtype == position.dtype else tokens.add)(position), None


def patch_embed_rows(pixel_rows, patch, position, rows):
    if _is_plain(patch):
        return plain.patch_embed_rows(pixel_rows, patch, position, rows)
    patches = pixel_rows if rows is None else pixel_rows.index_select(0, rows)
    tokens = _linear(patches.to(patch.weight.dtype), patch)
    return tokens + plain.gathered(position), None


def layernorm_linear(hidden_states, moments, linear, activation, rotation):
    if _is_plain(linear):
        return plain.layernorm_linear(hidden_states, moments, linear, activation, rotation)
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=linear.eps).to(linear.weight.dtype)
    out = _linear(normed, linear._replace(bias=linear.bias.to(normed.dtype)), activation)
    return out if rotation is None else plain.rotated(out, rotation)


def linear(x, linear, activation):
    return plain.linear(x, linear, activation) if _is_plain(linear) else _linear(x, linear, activation)


def attention(qkv, keys=None):
    if _isa(qkv) == "AVX512" and _is_slow_in_mkl():
        if fused := onednn_graph.attention_for(qkv, keys):
            return fused(qkv)
    return plain.attention(qkv, keys)


def attention_segments(qkv, segments):
    return plain.attention_segments(qkv, segments, attention)


def _is_slow_in_mkl() -> bool:
    """Whether torch's attention, which multiplies by MKL, has to do without this CPU's AVX-512 and bf16: AMD's."""
    return torch.cpu._is_avx512_bf16_supported() and _is_amd()


@functools.cache
def _is_amd() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        cpuinfo = platform.processor()
    return "AuthenticAMD" in cpuinfo


def linear_residual(x, linear, residual):
    if _is_plain(linear):
        return plain.linear_residual(x, linear, residual)
    if residual is not None and residual.dtype != x.dtype:
        return _linear(x, linear) + residual, None
    return _linear(x, linear, residual=residual), None


def _linear(x, linear, activation=None, residual=None):
    weight, bias = linear.weight, linear.bias
    if weight.is_mkldnn:
        if residual is not None:
            return _mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        out = _mkldnn._linear_pointwise(x, weight, bias, *_EPILOGUES.get(activation, ("none", [], "")))
        return _quick_gelu_(out) if activation == "quick" else out
    packed, tokens, threads = linear.packed
    if x.shape[:-1].numel() == tokens and torch.get_num_threads() == threads:
        out = _convolution(x, packed, bias, residual)
    elif residual is not None:
        out = residual + bias  # first, so that the GEMM makes the only other pass over the output
        _rows(out).addmm_(_rows(x), weight.T)
    else:
        out = F.linear(x, weight, bias)
    if activation == "tanh":
        return _gelu_tanh_(out)
    return _quick_gelu_(out) if activation == "quick" else plain.activated(out, activation)


def _convolution(x, weight, bias, residual):
    """Tokens are pixels side by side, `[1, K, 1, N]` with channels last, or of K / width channels `width` pixels."""
    width = weight.shape[3]
    geometry = _geometry(width)
    if residual is None:
        out = _mkldnn._convolution_pointwise(_pixels(x, width), weight, bias, *geometry, "none", [], "")
    else:
        add = ("add", 1.0, None, [], None)
        out = _mkldnn._convolution_pointwise.binary(
            _pixels(x, width), _pixels(residual, 1), weight, bias, *geometry, *add
        )
    return out.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)


def _geometry(width: int) -> tuple:
    """Padding, stride, dilation and groups."""
    return [0, 0], [1, width], [1, 1], 1


def _pixels(x: Tensor, width: int) -> Tensor:
    return x.reshape(1, 1, -1, x.shape[-1] // width).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _gelu_tanh_(x: Tensor) -> Tensor:
    """x·σ(y) with y = 2·√(2/π)·(x + 0.044715·x³), which is x·(1 + tanh(y / 2)) / 2, in place.

    torch's tanh is slow with AVX2: this takes half the time of its GELU. In blocks of rows, because the pages of
    another buffer as large can cost as much time as the arithmetic.
    """
    scale = 2 * (2 / torch.pi) ** 0.5
    scale_tensor = x.new_tensor(scale)  # addcmul takes no number here
    for rows in _rows(x).split(256):
        y = torch.addcmul(scale_tensor, rows, rows, value=scale * 0.044715).mul_(rows)
        rows.mul_(y.sigmoid_())
    return x


def _quick_gelu_(x: Tensor) -> Tensor:
    """x·σ(1.702x) in place; in blocks of rows for the same reason."""
    for rows in _rows(x).split(256):
        rows.mul_(torch.mul(rows, 1.702).sigmoid_())
    return x
