"""The six operations of the SigLIP vision tower: their contracts, checked here once for every backend.

B images, N tokens each, D hidden_size, H heads of head_dim d = D / H, p patch size. Every tensor of a call is on one
device and of one dtype out of bfloat16, float16 and float32, except where float32 is stated. The residual stream
(`hidden_states`, `residual`, and `position`, which begins it) may be float32 beside 16 bits, as torch.autocast has it. Activations that are
not contiguous are copied, weights have to be contiguous. Outputs are contiguous. There are no gradients. A contract
that is not met raises ValueError (shape) or TypeError (dtype, device), naming the argument, what it is and what was
expected.

`moments` are what LayerNorm needs to know of each row of the residual stream: for the triton backend float32
`[B·N, 2, ceil(D / 64)]`, mean and M2 of each block of 64 channels (`siglip_fast.kernels.moments`); None for backends
whose LayerNorm reads the rows. They belong to the hidden_states that they were returned with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .backends.select import load

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PatchEmbedding(NamedTuple):
    """`weight [D, C·p·p]` (a Conv2d's, flattened), `bias [D]`; for uint8 pixels the bias is float32 and the products
    are multiplied by `scale` (`siglip_fast.running.uint8`). `packed` is the backend's own (`Ops.pack`), here and below."""

    weight: Tensor
    bias: Tensor
    patch_size: int
    scale: float = 1.0
    packed: Any = None


class Linear(NamedTuple):
    """`weight [out, in]`, `bias [out]`."""

    weight: Tensor
    bias: Tensor
    packed: Any = None


class NormedLinear(NamedTuple):
    """LayerNorm folded into a Linear: `weight = round(W·diag(γ)) [out, in]`, and in float32
    `colsum = rowsum(weight) [out]` and `bias = W·β + b [out]`."""

    weight: Tensor
    colsum: Tensor
    bias: Tensor
    eps: float
    packed: Any = None


class Norm(NamedTuple):
    """LayerNorm's `weight [D]` and `bias [D]`."""

    weight: Tensor
    bias: Tensor
    eps: float


class Pool(NamedTuple):
    """Attention pooling with a constant query: `scores = W_kᵀ q / √d` float32 `[H, D]`, value projection `[D, D]`."""

    scores: Tensor
    value: Linear


AnyLinear = TypeVar("AnyLinear", PatchEmbedding, Linear, NormedLinear)


class Ops:
    """The operations on one backend: `Ops("torch")`, `Ops("cpu")` or `Ops("triton")`.

    `selection_on` gives the choices for a device (`siglip_fast.tuning.race.selection_on`): the triton backend follows
    them; without, every operation runs on its default. `batch_invariant`: an image's bits are to depend on nothing but
    the image. The triton backend's operations see to it themselves and follow no choices; others' libraries choose by
    shape, so a forward has to hand them as few images as `images_at_once` says.
    """

    def __init__(
        self, backend: str, selection_on: Callable[[torch.device], Any] | None = None, batch_invariant: bool = False
    ):
        self.backend = backend
        self.batch_invariant = batch_invariant
        self._module = load(backend, selection_on, batch_invariant)
        self._carries_moments = backend == "triton"
        self.reads_uint8 = backend == "triton"

    def images_at_once(self, device: torch.device, tokens: int) -> int | None:
        """How many images of so many tokens a forward should take together; None: all of them."""
        if self.batch_invariant and self.backend != "triton":
            return 1
        if self.backend == "cpu" and device.type == "cpu":  # which is slower with more
            return max(1, self._module.rows_at_once() // tokens)
        return None

    def pack(self, linear: AnyLinear, tokens: int) -> AnyLinear:
        """The same with its weight, `[out, in]` and contiguous, as the backend's operations read it best: maybe in an
        opaque tensor of the same shape and dtype, maybe once more in `packed`, for images of so many tokens."""
        return self._module.pack(linear, tokens)

    def patch_embed(
        self, pixel_values: Tensor, patch: PatchEmbedding, position: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of whole patches, row-major: `scale·W·patch + bias + position`, and their moments.

        pixel_values `[B, C, H, W]`, any floating dtype and strides, or, where the backend reads_uint8, uint8, which
        stand for their value − 128 (only then is scale other than 1, and bias float32); position `[N, D]` with
        N = (H // p)·(W // p). Returns `[B, N, D]` in position's dtype. Dosovitskiy et al. 2021, eq. 1.
        """
        D, K = patch.weight.shape
        p = patch.patch_size
        check_shape("pixel_values", pixel_values, (None, K // (p * p), None, None))
        is_uint8 = self.reads_uint8 and pixel_values.dtype == torch.uint8
        if not (is_uint8 or pixel_values.is_floating_point()):
            raise TypeError(f"pixel_values: expected a floating dtype, got {pixel_values.dtype}")
        tokens = (pixel_values.shape[2] // p) * (pixel_values.shape[3] // p)
        position = position.contiguous()
        check_shape("position", position, (tokens, D))
        if is_uint8:
            _check_float32("bias", patch.bias, (D,))
        else:
            check_shape("bias", patch.bias, (D,))
            _check_like("bias", patch.bias, weight=patch.weight)
        _check_stream("position", position, patch.weight)
        return self._module.patch_embed(pixel_values.resolve_neg(), patch, position)

    def layernorm_linear(
        self, hidden_states: Tensor, moments: Tensor | None, linear: NormedLinear, gelu: bool = False
    ) -> Tensor:
        """`LayerNorm(x)·Wᵀ + b`, then GELU-tanh if asked: `[..., in]` → `[..., out]` in the weights' dtype.

        Ba, Kiros & Hinton 2016 (LayerNorm); Hendrycks & Gimpel 2016 (GELU, tanh form).
        """
        check_shape("hidden_states", hidden_states, (..., linear.weight.shape[1]))
        _check_stream("hidden_states", hidden_states, linear.weight)
        for name in ("colsum", "bias"):
            _check_float32(name, getattr(linear, name), (linear.weight.shape[0],))
        self._check_moments(moments, hidden_states)
        return self._module.layernorm_linear(hidden_states.contiguous(), moments, linear, gelu)

    def attention(self, qkv: Tensor) -> Tensor:
        """`softmax(q kᵀ / √d) v` per head: `[B, N, 3, H, d]` → `[B, N, H, d]`. Vaswani et al. 2017, eq. 1."""
        check_shape("qkv", qkv, (None, None, 3, None, None))
        _check_like("qkv", qkv)
        return self._module.attention(qkv.contiguous())

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`x·Wᵀ + b + residual` and the moments of the result: `[..., in]`, `[..., out]` → `[..., out]` in residual's dtype."""
        check_shape("x", x, (..., linear.weight.shape[1]))
        check_shape("bias", linear.bias, (linear.weight.shape[0],))
        _check_like("x", x, weight=linear.weight, bias=linear.bias)
        if residual is not None:
            residual = residual.contiguous()
            check_shape("residual", residual, (*x.shape[:-1], linear.weight.shape[0]))
            _check_stream("residual", residual, x)
        return self._module.linear_residual(x.contiguous(), linear, residual)

    def layernorm(self, hidden_states: Tensor, moments: Tensor | None, norm: Norm) -> Tensor:
        """`(x − mean) / √(variance + eps) · γ + β`: `[..., D]` → `[..., D]`. Ba, Kiros & Hinton 2016."""
        check_shape("hidden_states", hidden_states, (..., norm.weight.shape[0]))
        check_shape("bias", norm.bias, (norm.weight.shape[0],))
        _check_like("hidden_states", hidden_states, weight=norm.weight, bias=norm.bias)
        self._check_moments(moments, hidden_states)
        return self._module.layernorm(hidden_states.contiguous(), moments, norm)

    def attention_pool(self, hidden_states: Tensor, pool: Pool) -> Tensor:
        """Each head's value projection of the tokens, averaged with softmax weights of its scores.

        `[B, N, D]` → `[B, D]`, heads side by side, before the output projection. Zhai et al. 2022 (MAP head),
        with the constant query multiplied into the key projection.
        """
        D = pool.value.weight.shape[1]
        check_shape("hidden_states", hidden_states, (None, None, D))
        _check_float32("pool.scores", pool.scores, (None, D))
        check_shape("value.bias", pool.value.bias, (D,))
        _check_like("hidden_states", hidden_states, weight=pool.value.weight, bias=pool.value.bias)
        return self._module.attention_pool(hidden_states.contiguous(), pool)

    def _check_moments(self, moments: Tensor | None, hidden_states: Tensor) -> None:
        if self._carries_moments:
            if moments is None:
                raise TypeError("moments: expected those returned with hidden_states, got None")
            D = hidden_states.shape[-1]
            _check_float32("moments", moments, (hidden_states.numel() // D, 2, -(-D // 64)))


def check_shape(name: str, tensor: Tensor, expected: tuple) -> None:
    """`expected` holds sizes, None for any size, and possibly a leading `...` for any dimensions."""
    shape, sizes = tensor.shape, expected
    if sizes[0] is ...:
        sizes = sizes[1:]
        shape = shape[-len(sizes) :]
    if shape == sizes:  # mostly, and much faster than what follows
        return
    if len(shape) != len(sizes) or any(e is not None and s != e for s, e in zip(shape, sizes, strict=True)):
        wanted = ", ".join("..." if e is ... else "any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def _check_float32(name: str, tensor: Tensor, shape: tuple) -> None:
    check_shape(name, tensor, shape)
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise TypeError(f"{name}: expected contiguous float32, got {tensor.dtype}, strides {tensor.stride()}")


def _check_stream(name: str, stream: Tensor, weight: Tensor) -> None:
    """The residual stream has the dtype of the weights beside it, or float32."""
    _check_like("weight", weight)
    if stream.dtype not in (weight.dtype, torch.float32) or stream.device != weight.device:
        dtypes = " or ".join({str(weight.dtype): 0, "torch.float32": 0})
        raise TypeError(
            f"{name}: expected {dtypes} on {weight.device} as weight is, got {stream.dtype} on {stream.device}"
        )


def _check_like(name: str, tensor: Tensor, **others: Tensor) -> None:
    """All of a supported dtype, the same one, on the same device, and the others contiguous."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {tensor.dtype}")
    for other_name, other in others.items():
        if other.dtype != tensor.dtype or other.device != tensor.device:
            raise TypeError(
                f"{other_name}: expected {tensor.dtype} on {tensor.device} as {name} is, "
                f"got {other.dtype} on {other.device}"
            )
        if not other.is_contiguous():
            raise ValueError(f"{other_name}: expected a contiguous tensor, got strides {other.stride()}")
