"""What is tuned and checked: a model's operations, inputs that make mistakes visible, and the reference."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import SiglipVisionConfig

from ..backends import torch as plain
from ..backends.torch import ACTIVATIONS
from ..ops import Linear, Norm, NormedLinear, PatchEmbedding, Pool
from .cache import Operation, bucket

PLAIN, TANH = (ACTIVATIONS.index(activation) for activation in (None, "tanh"))


class Case(NamedTuple):
    """An operation on a number of rows: tokens of all images, or images for attention, attention_pool and the head."""

    operation: Operation
    rows: int

    def __str__(self) -> str:
        return f"{self.operation}, {self.rows} rows"


def cases(config: SiglipVisionConfig, tokens: int, dtype: torch.dtype, batch_sizes: Iterable[int]) -> list[Case]:
    """Those of a model's forwards on images of so many tokens, one a bucket of rows, in the order of the batch sizes."""
    D, F, H, p = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.patch_size
    N = tokens
    of_tokens = [
        ("layernorm_linear", (F, D, TANH)),
        ("linear_residual", (D, F, True)),
        ("layernorm_linear", (3 * D, D, PLAIN)),
        ("linear_residual", (D, D, True)),
        ("patch_embed", (D, config.num_channels * p * p, p, N)),
        ("layernorm", (D,)),
    ]
    of_images = [("attention", (N, H, D // H))]
    if getattr(config, "vision_use_head", True):
        of_images += [("attention_pool", (N, D, H)), *of_pooled(D, F)]
    found: dict[tuple[Operation, int], Case] = {}
    for B in batch_sizes:
        for rows, operations in ((B * N, of_tokens), (B, of_images)):
            for name, dims in operations:
                operation = Operation(name, dims, dtype)
                found.setdefault((operation, bucket(rows)), Case(operation, rows))
    return list(found.values())


def of_pooled(D: int, F: int) -> list[tuple[str, tuple[int, ...]]]:
    """The pooling head's, behind the pooling, on images."""
    return [("linear_residual", (D, D, False)), ("layernorm_linear", (F, D, TANH)), ("linear_residual", (D, F, True))]


def encode(case: Case) -> list:
    """As JSON holds it."""
    name, dims, dtype = case.operation
    return [name, dims, str(dtype).removeprefix("torch."), case.rows]


def decode(item: list) -> Case:
    name, dims, dtype, rows = item
    return Case(Operation(name, tuple(dims), getattr(torch, dtype)), rows)


def plain_result(case: Case, args: tuple) -> Tensor:
    """The operation in plain torch, in the arguments' dtype."""
    out = getattr(plain, case.operation.name)(*args)
    return out[0] if isinstance(out, tuple) else out


def upcast(args: tuple) -> tuple:
    """To what the reference is computed in: float32 for 16 bits, float64 for float32."""
    to = torch.float64 if args[0].dtype == torch.float32 else torch.float32
    return tree_map(lambda x: x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x, args)


def copied(args: tuple) -> tuple:
    """The same arguments in memory of their own."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def bytes_of(args: tuple) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))


def inputs(case: Case, device: torch.device) -> tuple:
    """Random arguments of `run` whose last row, channel and key would be missed, and whose masked ones would show."""
    (name, dims, dtype), rows = case
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

    def linear(out: int, K: int) -> tuple[Tensor, Tensor]:
        weight = randn(out, K, scale=K**-0.5)
        weight[:, -1] *= 4
        return weight, randn(out)

    if name == "patch_embed":
        D, K, p, N = dims
        side = math.isqrt(N)
        height, width = (side, N // side) if N % side == 0 else (1, N)
        pixels = randn(rows // N, K // (p * p), height * p, width * p)
        return pixels, PatchEmbedding(*linear(D, K), p), randn(N, D)
    if name == "layernorm_linear":
        out, K, activation = dims
        x = _outliers(randn(rows, K))
        weight, bias = linear(out, K)
        normed = NormedLinear(weight, weight.float().sum(1), bias.float(), 1e-6)
        return x, row_moments(x), normed, ACTIVATIONS[activation], None
    if name == "attention":
        N, H, d = dims
        qkv = randn(rows, N, 3, H, d)
        # Scores far below zero: a key beyond the end, which would read as zeros, would outweigh all others.
        qkv[:, :, 0] += 1
        qkv[:, :, 1] -= 1
        return (qkv,)
    if name == "linear_residual":
        out, K, with_residual = dims
        return randn(rows, K), Linear(*linear(out, K)), _outliers(randn(rows, out)) if with_residual else None
    if name == "layernorm":
        x = _outliers(randn(rows, *dims))
        return x, row_moments(x), Norm(randn(*dims), randn(*dims), 1e-6), None
    N, D, H = dims
    scores = torch.randn((H, D), device=device, generator=generator) * D**-0.5
    return randn(rows, N, D), Pool(scores, Linear(*linear(D, D)))


def _outliers(x: Tensor) -> Tensor:
    """Every channel off zero, and the last off the rest, but neither so far that nothing else would count."""
    x = x + 3
    x[:, -1] *= 4
    return x


def row_moments(x: Tensor) -> Tensor:
    """`[M, 2, ceil(D / 64)]` in plain torch: mean and sum of squared deviations of each block of 64 channels."""
    blocks = x.float().split(64, dim=-1)
    mean = torch.stack([block.mean(-1) for block in blocks], 1)
    m2 = torch.stack([(block - block.mean(-1, keepdim=True)).square().sum(-1) for block in blocks], 1)
    return torch.stack([mean, m2], 1)
