"""The operations of a forward at a model's shapes: random inputs, FLOPs, what to compare, and what is right."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import Case
from environment import DEVICE
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from siglip_fast.backends import torch as plain
from siglip_fast.ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool
from siglip_fast.variants import config_for

BACKEND = {"cuda": "triton", "cpu": "cpu"}[DEVICE]


class Inputs:
    """Random inputs of each operation in a forward: its arguments, and the FLOPs that it needs."""

    def __init__(self, case: Case, ops: Ops):
        c = config_for(case.variant)
        self.config, self.ops, self.B = c, ops, case.batch_size
        self.N, self.p = (c.image_size // c.patch_size) ** 2, c.patch_size
        self.D, self.F, self.H = c.hidden_size, c.intermediate_size, c.num_attention_heads
        self._make = {"device": DEVICE, "dtype": getattr(torch, case.dtype)}
        torch.manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, **self._make)

    def tokens(self, width: int) -> Tensor:
        return self.random(self.B, self.N, width)

    def weight(self, out: int, width: int) -> Tensor:
        return self.random(out, width) * width**-0.5

    def linear(self, out: int, width: int) -> Linear:
        return Linear(self.ops.pack_weight(self.weight(out, width)), self.random(out))

    def normed(self, out: int, gelu: bool) -> tuple[tuple, int]:
        x, weight = self.tokens(self.D), self.weight(out, self.D)
        linear = NormedLinear(
            self.ops.pack_weight(weight),
            weight.float().sum(1),
            self.random(out).float(),
            self.config.layer_norm_eps,
        )
        return (x, moments(x), linear, gelu), 2 * self.B * self.N * self.D * out

    def residual(self, width: int) -> tuple[tuple, int]:
        arguments = self.tokens(width), self.linear(self.D, width), self.tokens(self.D)
        return arguments, 2 * self.B * self.N * self.D * width

    def patch_embed(self):
        K, size = 3 * self.p**2, self.config.image_size
        patch = PatchEmbedding(*self.linear(self.D, K), self.p)
        arguments = self.random(self.B, 3, size, size), patch, self.random(self.N, self.D)
        return "patch_embed", arguments, 2 * self.B * self.N * K * self.D

    def qkv(self):
        return "layernorm_linear", *self.normed(3 * self.D, gelu=False)

    def attention(self):
        qkv = self.random(self.B, self.N, 3, self.H, self.D // self.H)
        return "attention", (qkv,), 4 * self.B * self.N**2 * self.D

    def out_proj(self):
        return "linear_residual", *self.residual(self.D)

    def fc1(self):
        return "layernorm_linear", *self.normed(self.F, gelu=True)

    def fc2(self):
        return "linear_residual", *self.residual(self.F)

    def layernorm(self):
        x = self.tokens(self.D)
        norm = Norm(self.random(self.D), self.random(self.D), self.config.layer_norm_eps)
        return "layernorm", (x, moments(x), norm), 0

    def attention_pool(self):
        scores = self.weight(self.H, self.D).float()
        pool = Pool(scores, Linear(self.weight(self.D, self.D), self.random(self.D)))
        flops = 4 * self.B * self.H * self.N * self.D + 2 * self.B * self.D**2
        return "attention_pool", (self.tokens(self.D), pool), flops


OPERATIONS = ("patch_embed", "qkv", "attention", "out_proj", "fc1", "fc2", "layernorm", "attention_pool")


def moments(x: Tensor) -> Tensor:
    """What the Triton kernels need to know of each row; the other backends do not look at it."""
    means, m2s = [], []
    for block in x.flatten(0, 1).float().split(64, dim=1):
        means.append(block.mean(1))
        m2s.append((block - means[-1][:, None]).square().sum(1))
    return torch.stack([torch.stack(means, 1), torch.stack(m2s, 1)], 1)


def gelu_in_the_gemm(x, _, linear, gelu):
    """cuBLASLt's epilogue, which torch reaches only by this name."""
    normed = nn.functional.layer_norm(x, x.shape[-1:], eps=linear.eps).flatten(0, 1)
    bias = linear.bias.to(x.dtype)
    return torch._addmm_activation(bias, normed, linear.weight.T, use_gelu=True).view(*x.shape[:2], -1)


class Call(NamedTuple):
    function: Callable
    arguments: tuple

    def __call__(self) -> Tensor:
        out = self.function(*self.arguments)
        return out[0] if isinstance(out, tuple) else out  # without the moments


def candidates(case: Case, operation: str) -> tuple[dict[str, Call], int]:
    """By name, and the FLOPs that the operation needs."""
    found = {}
    for name, backend in (("siglip_fast", BACKEND), ("torch", "torch")):
        ops = Ops(backend)
        contract, arguments, flops = getattr(Inputs(case, ops), operation)()
        found[name] = Call(getattr(ops, contract), arguments)
    if operation == "fc1" and DEVICE == "cuda":  # on a CPU it has the other GELU
        found["torch, GELU in the GEMM"] = Call(gelu_in_the_gemm, found["torch"].arguments)
    return found, flops


def ends(tensor: Tensor) -> Tensor:
    """The first and the last image."""
    return tensor[:: max(1, len(tensor) - 1)]


def float64(case: Case, operation: str) -> Tensor:
    """What is right for the first and the last image."""
    contract, arguments, _ = getattr(Inputs(case, Ops("torch")), operation)()

    def cut(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return (ends(leaf) if leaf.ndim > 2 and len(leaf) == case.batch_size else leaf).double()

    arguments = tree_map(cut, arguments)
    if operation == "attention_pool":  # whose scores are float32 by contract
        tokens, pool = arguments
        arguments = tokens, pool._replace(scores=pool.scores.float())
    return Call(getattr(plain, contract), arguments)()
