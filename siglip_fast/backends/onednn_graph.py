"""Attention in bf16 on x86 CPUs: a partition of oneDNN Graph, in TorchScript's wrapping, kept by Static Runtime.

torch's own kernel multiplies with MKL, which has bf16 for Intel's CPUs only. oneDNN has it for all: a thread takes one
head of one image after the other, and computes both products and the softmax in a scratchpad. The scores are float32,
as in torch's kernel, because the graph below says so (docs/decisions.md).
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("siglip_fast")

_MOST_SCORES = 64 << 20  # of all threads together, 6 bytes each: 729 tokens on 126 threads, 4096 on 4
_MOST_SHAPES = 64  # oneDNN keeps what it compiled to the end, up to 3 MB each

_compiled: dict[tuple[int, ...], Callable[[Tensor], Tensor] | None] = {}
_compiling = threading.Lock()


def attention_for(qkv: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What computes `Ops.attention` of contiguous bf16 tensors of this shape; None where torch's kernel should."""
    B, N, _, H, d = qkv.shape
    threads = torch.get_num_threads()
    # With fewer heads oneDNN has another kernel, for all heads at once. That is its rule, and its number.
    if B * H <= 2 * threads or threads * N * N > _MOST_SCORES:
        return None
    # It looks at memory only, of which other kinds of tensors may have none, or another sign.
    if type(qkv) is not Tensor or qkv.is_neg():
        return None
    return _compiled_for(B, N, H, d, threads) if _is_usable(threads) else None


@functools.cache
def _is_usable(threads: int) -> bool:
    """Whether oneDNN computes what the graph says: bf16 has no 257, and scores of 256 and 257 would be equal."""
    qkv = torch.zeros(1, 2, 3, 2 * threads + 1, 64, dtype=torch.bfloat16, device="cpu")
    queries, keys, values = qkv[0].unbind(1)
    queries[..., 0], queries[..., 1] = 64, 1
    keys[..., 0], keys[1, :, 1] = 32, 8
    values[1] = 1
    attention = _compiled_for(1, 2, 2 * threads + 1, 64, threads)
    if attention is None:
        return False
    expected = torch.ones((), device="cpu").sigmoid()
    if not (attention(qkv) - expected).abs().max() < 0.01:
        logger.info("bf16 attention is torch's: oneDNN Graph rounds the scores")
        return False
    return True


def _compiled_for(*shape: int) -> Callable[[Tensor], Tensor] | None:
    """Of B, N, H, d and the number of threads, which decides on oneDNN's kernel; None if there is to be none."""
    if shape not in _compiled:
        with _compiling:
            if shape not in _compiled and len(_compiled) < _MOST_SHAPES:
                _compiled[shape] = _compile(*shape[:4])
    return _compiled.get(shape)


def _compile(B: int, N: int, H: int, d: int) -> Callable[[Tensor], Tensor] | None:
    scale = torch.full((1,), d**-0.5, dtype=torch.float32, device="cpu")
    running = threading.Lock()  # Static Runtime computes one call at a time, and holds the GIL meanwhile

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        with running:
            return run(q, k.mT, v, scale).transpose(1, 2)

    try:
        run = torch._C._jit_to_static_module(_graph(B, N, H, d))
        attention(torch.zeros(B, N, 3, H, d, dtype=torch.bfloat16, device="cpu"))  # the first call compiles
    except Exception as error:  # of any kind: torch calls all this internal
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
