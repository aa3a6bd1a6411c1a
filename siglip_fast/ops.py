"""The operations of SigLIP's vision tower and of its descendants: their contracts, checked here once for every backend.

B images, N tokens each, D hidden_size, H heads of head_dim d = D / H, p patch size. Images of any size are packed: M rows,
those of one image after those of another, and `Segments` say which belong together. Every tensor of a call is on one
device and of one dtype out of bfloat16, float16 and float32, except where float32 is stated. The residual stream
(`hidden_states`, `residual`, and `position`, which begins it) may be float32 beside 16 bits, as torch.autocast has it. Activations that are
not contiguous are copied, weights have to be contiguous. Outputs are contiguous. There are no gradients. A contract
that is not met raises ValueError (shape) or TypeError (dtype, device), naming the argument, what it is and what was
expected.

`moments` are what LayerNorm needs to know of each row of the residual stream: for the triton backend float32
`[B·N, 2, ceil(D / 64)]`, mean and M2 of each block of 64 channels (`siglip_fast.kernels.moments`); None for backends
whose LayerNorm reads the rows. They belong to the hidden_states that they were returned with.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .backends.select import load
from .backends.torch import ACTIVATIONS

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


class Segments(NamedTuple):
    """Rows that belong together, of a packed call: of segment s those from `first[s]` on, `queries[s]` of them, the first
    `keys[s]` of which are keys and values too. Rows behind these only look at the others: what padding sees.

    On the device `table` int32 `[S, 3]` has the same columns. `schedule` has what the triton backend's attention goes by:
    for each number of rows that a tile may have (BLOCK_M) an int32 `[tiles, 4]` of a segment's first row, the tile's first
    query in the segment, queries and keys of the segment, whose tiles are one behind the other.
    `siglip_fast.running.packing` makes them. `length` is that of all segments where they are images of one size, one behind
    the other, without padding.
    """

    first: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    table: Tensor
    schedule: Mapping[int, Tensor]
    length: int | None = None


class Position(NamedTuple):
    """Of M rows: row m has the sum over t of `weight[m, t] · table[index[m, t]]`; `table [P, D]`, `index` int32 `[M, T]`,
    `weight` float32 `[M, T]`, or None for ones where T = 1."""

    table: Tensor
    index: Tensor
    weight: Tensor | None = None


class Rotation(NamedTuple):
    """2-D rotary position embedding (Su et al. 2021, an axis each half): `table` float32 `[side, d / 4, 2]`, cosine and
    sine of position · frequency; `place` int32 `[M, 2]`, each row's position on either axis."""

    table: Tensor
    place: Tensor


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

    def patch_embed_rows(
        self, pixel_rows: Tensor, patch: PatchEmbedding, position: Position, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `patch_embed`, of patches that are rows already: `W·pixel_rows[rows] + bias + position`, and the moments.

        pixel_rows `[R, K]` of any floating dtype, K in the order of the weight's; rows int32 `[M]`, None for all R in
        their order. Returns `[M, D]` in the position table's dtype.
        """
        D, K = patch.weight.shape
        check_shape("pixel_rows", pixel_rows, (None, K))
        if not pixel_rows.is_floating_point():
            raise TypeError(f"pixel_rows: expected a floating dtype, got {pixel_rows.dtype}")
        if rows is not None:
            _check_int32("rows", rows, (None,))
        M = len(pixel_rows) if rows is None else len(rows)
        check_shape("position.table", position.table, (None, D))
        _check_int32("position.index", position.index, (M, None))
        if position.weight is not None:
            _check_float32("position.weight", position.weight, tuple(position.index.shape))
        check_shape("bias", patch.bias, (D,))
        _check_like("bias", patch.bias, weight=patch.weight)
        _check_stream("position.table", position.table, patch.weight)
        return self._module.patch_embed_rows(pixel_rows.resolve_neg().contiguous(), patch, position, rows)

    def layernorm_linear(
        self,
        hidden_states: Tensor,
        moments: Tensor | None,
        linear: NormedLinear,
        activation: str | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """`LayerNorm(x)·Wᵀ + b`, then GELU if asked ("tanh", "erf" or "quick"): `[..., in]` → `[..., out]` in
        the weights' dtype.

        hidden_states may be r rows of the stream side by side, `[M / r, r·D]`, r > 1 only where D is a multiple of 64; the
        moments are those of the M rows. With rotation, which takes no activation, out is 3·H·d: the d channels of each
        head of the first two thirds, Q and K, are d / 2 pairs side by side (x₀, x₁), of which pair i becomes
        (x₀·cos − x₁·sin, x₁·cos + x₀·sin) by entry i of the row's d / 4 on the first axis and then d / 4 on the second.
        Ba, Kiros & Hinton 2016 (LayerNorm); Hendrycks & Gimpel 2016 (GELU); Su et al. 2021 (rotation).
        """
        check_shape("hidden_states", hidden_states, (..., linear.weight.shape[1]))
        _check_stream("hidden_states", hidden_states, linear.weight)
        for name in ("colsum", "bias"):
            _check_float32(name, getattr(linear, name), (linear.weight.shape[0],))
        self._check_moments(moments, hidden_states, may_be_merged=True)
        _check_activation(activation)
        if rotation is not None:
            self._check_rotation(rotation, hidden_states, linear.weight, activation)
        return self._module.layernorm_linear(hidden_states.contiguous(), moments, linear, activation, rotation)

    def linear(self, x: Tensor, linear: Linear, activation: str | None = None) -> Tensor:
        """`x·Wᵀ + b`, then GELU if asked: `[..., in]` → `[..., out]`."""
        check_shape("x", x, (..., linear.weight.shape[1]))
        check_shape("bias", linear.bias, (linear.weight.shape[0],))
        _check_like("x", x, weight=linear.weight, bias=linear.bias)
        _check_activation(activation)
        return self._module.linear(x.contiguous(), linear, activation)

    def attention(self, qkv: Tensor, segments: Segments | None = None) -> Tensor:
        """`softmax(q kᵀ / √d) v` per head: `[B, N, 3, H, d]` → `[B, N, H, d]`. Vaswani et al. 2017, eq. 1.

        With segments, inside of each: `[M, 3, H, d]` → `[M, H, d]`; they hold every row once.
        """
        if segments is None:
            check_shape("qkv", qkv, (None, None, 3, None, None))
            _check_like("qkv", qkv)
            return self._module.attention(qkv.contiguous())
        check_shape("qkv", qkv, (None, 3, None, None))
        _check_like("qkv", qkv)
        if sum(segments.queries) != len(qkv):
            raise ValueError(f"segments: expected {len(qkv)} rows in all, as qkv has, got {sum(segments.queries)}")
        if N := self._length(segments):
            return self._module.attention(qkv.contiguous().unflatten(0, (-1, N))).flatten(0, 1)
        return self._module.attention_segments(qkv.contiguous(), segments)

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

    def layernorm(
        self, hidden_states: Tensor, moments: Tensor | None, norm: Norm, rows: Tensor | None = None
    ) -> Tensor:
        """`(x − mean) / √(variance + eps) · γ + β`: `[..., D]` → `[..., D]`. Ba, Kiros & Hinton 2016.

        With rows, int32 `[R]`, of `hidden_states [M, D]` these: `[R, D]`.
        """
        D = norm.weight.shape[0]
        check_shape("hidden_states", hidden_states, (..., D) if rows is None else (None, D))
        check_shape("bias", norm.bias, (D,))
        _check_like("hidden_states", hidden_states, weight=norm.weight, bias=norm.bias)
        self._check_moments(moments, hidden_states)
        if rows is not None:
            _check_int32("rows", rows, (None,))
        return self._module.layernorm(hidden_states.contiguous(), moments, norm, rows)

    def attention_pool(self, hidden_states: Tensor, pool: Pool, segments: Segments | None = None) -> Tensor:
        """Each head's value projection of the tokens, averaged with softmax weights of its scores.

        `[B, N, D]` → `[B, D]`, heads side by side, before the output projection. Zhai et al. 2022 (MAP head),
        with the constant query multiplied into the key projection. With segments, over the keys of each:
        `[R, D]` → `[S, D]`. Tokens in float32 beside weights in 16 bits are rounded first.
        """
        D = pool.value.weight.shape[1]
        check_shape("hidden_states", hidden_states, (None, None, D) if segments is None else (None, D))
        _check_float32("pool.scores", pool.scores, (None, D))
        check_shape("value.bias", pool.value.bias, (D,))
        _check_like("value.weight", pool.value.weight, bias=pool.value.bias)
        _check_stream("hidden_states", hidden_states, pool.value.weight)
        tokens = self._module.cast(hidden_states.contiguous(), pool.value.weight.dtype)
        if segments is None:
            return self._module.attention_pool(tokens, pool)
        _check_int32("segments.table", segments.table, (len(segments.keys), 3))
        if N := self._length(segments):
            return self._module.attention_pool(tokens.unflatten(0, (-1, N)), pool)
        return self._module.attention_pool_segments(tokens, pool, segments)

    def _length(self, segments: Segments) -> int | None:
        """`Segments.length`, where equal ones may take a way of their own: batch invariant, an image's bits must not depend
        on the sizes of the others."""
        return None if self.batch_invariant else segments.length

    def _check_moments(self, moments: Tensor | None, hidden_states: Tensor, may_be_merged: bool = False) -> None:
        if self._carries_moments:
            if moments is None:
                raise TypeError("moments: expected those returned with hidden_states, got None")
            D = hidden_states.shape[-1]
            rows, merged = hidden_states.numel() // D, 1
            if may_be_merged and rows and len(moments) > rows and len(moments) % rows == 0:
                merged = len(moments) // rows
                if D % (64 * merged):
                    raise ValueError(
                        f"hidden_states: expected {merged} rows of a multiple of 64 channels each, got {D} channels"
                    )
            _check_float32("moments", moments, (rows * merged, 2, -(-D // merged // 64)))

    def _check_rotation(
        self, rotation: Rotation, hidden_states: Tensor, weight: Tensor, activation: str | None
    ) -> None:
        if activation is not None:
            raise ValueError(f"activation: expected None beside rotation, got {activation!r}")
        _check_float32("rotation.table", rotation.table, (None, None, 2))
        _check_int32("rotation.place", rotation.place, (hidden_states.shape[:-1].numel(), 2))
        out, head_dim = weight.shape[0], 4 * rotation.table.shape[1]
        if out % (3 * head_dim):
            raise ValueError(
                f"rotation.table: expected a quarter of head_dim, of Q, K and V of {out}, got {head_dim // 4}"
            )


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


def _check_int32(name: str, tensor: Tensor, shape: tuple) -> None:
    check_shape(name, tensor, shape)
    if tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise TypeError(f"{name}: expected contiguous int32, got {tensor.dtype}, strides {tensor.stride()}")


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


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
