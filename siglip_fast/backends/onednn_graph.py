"""Attention in bf16 on x86 CPUs: a partition of oneDNN Graph, in TorchScript's wrapping, kept by Static Runtime.

torch's own kernel multiplies with MKL, which has bf16 for Intel's CPUs only. oneDNN has it for all: a thread takes one
head of one image after the other, and computes both products and the softmax in a scratchpad. The scores are float32,
as in torch's kernel, because the graph below says so (docs/decisions.md).
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("siglip_fast")

_SCORES_BYTES = 256 << 20  # in the scratchpads of all threads: 729 tokens on 126 of them, 4096 on 4


def attention_for(qkv: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What computes `Ops.attention` of contiguous bf16 tensors of this shape; None where torch's kernel should."""
    B, N, _, H, d = qkv.shape
    threads = torch.get_num_threads()
    # With fewer heads oneDNN has another kernel, for all heads at once. That is its rule, and its number.
    if B * H <= 2 * threads or threads * N * N * 4 > _SCORES_BYTES:
        return None
    return _compiled(B, N, H, d, threads) if _is_usable(threads) else None


@functools.cache
def _is_usable(threads: int) -> bool:
    """Whether oneDNN computes what the graph says: bf16 has no 257, and scores of 256 and 257 would be equal."""
    qkv = torch.zeros(1, 2, 3, 2 * threads + 1, 64, dtype=torch.bfloat16, device="cpu")
    queries, keys, values = qkv[0].unbind(1)
    queries[..., 0], queries[..., 1] = 64, 1
    keys[..., 0], keys[1, :, 1] = 32, 8
    values[1] = 1
    attention = _compiled(1, 2, 2 * threads + 1, 64, threads)
    if attention is None:
        return False
    expected = torch.ones((), device="cpu").sigmoid()
    if not (attention(qkv) - expected).abs().max() < 0.01:
        logger.info("bf16 attention is torch's: oneDNN Graph rounds the scores")
        return False
    return True


@functools.lru_cache(maxsize=64)
def _compiled(B: int, N: int, H: int, d: int, threads: int) -> Callable[[Tensor], Tensor] | None:
    """For so many threads it is compiled. None if that is not possible: torch calls all this internal.

    Static Runtime computes one call at a time, and holds the GIL meanwhile.
    """
    scale = torch.full((1,), d**-0.5, dtype=torch.float32, device="cpu")

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return run(q, k.mT, v, scale).transpose(1, 2)

    try:
        run = torch._C._jit_to_static_module(_graph(B, N, H, d))
        attention(
            torch.zeros(B, N, 3, H, d, dtype=torch.bfloat16, device="cpu")
        )  # compiles at the first call
    except (AttributeError, RuntimeError) as error:
        logger.info("bf16 attention is torch's: oneDNN Graph does not compile it: %s", error)
        return None
    return attention


def _graph(B: int, N: int, H: int, d: int) -> "torch._C.Graph":
    """One node, as TorchScript's fuser for oneDNN makes them. oneDNN knows dtypes and layouts from these types only."""
    strides = 3 * N * H * d, d, 3 * H * d, 1
    queries = _type("BFloat16", (B, H, N, d), strides)
    keys = _type("BFloat16", (B, H, d, N), (*strides[:2], 1, strides[2]))
    pairs = (B, H, N, N), (H * N * N, N * N, N, 1)
    scores, probabilities = _type("Float", *pairs), _type("BFloat16", *pairs)
    subgraph = torch._C.parse_ir(f"""
        graph(%q : {queries}, %k : {keys}, %v : {queries}, %scale : {_type("Float", (1,), (1,))}):
            %axis : int = prim::Constant[value=-1]()
            %none : NoneType = prim::Constant()
            %products : {scores} = aten::matmul(%q, %k)
            %scores : {scores} = aten::mul(%products, %scale)
            %probabilities : {probabilities} = aten::softmax(%scores, %axis, %none)
            %out : {_type("BFloat16", (B, H, N, d), (N * H * d, d, H * d, 1))} = aten::matmul(%probabilities, %v)
            return (%out)
    """)
    graph = torch._C.Graph()
    group = graph.create(
        "prim::oneDNNFusionGroup", [graph.addInput(name) for name in ("q", "k", "v", "scale")], 1
    )
    group.g_("Subgraph", subgraph)
    group.is_("output_layouts", [0])  # strided as its type says, not a layout of oneDNN's choice
    graph.insertNode(group)
    graph.registerOutput(group.output())
    return graph


def _type(dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    sizes = ", ".join(map(str, shape))
    return f"{dtype}({sizes}, strides={list(strides)}, requires_grad=0, device=cpu)"
