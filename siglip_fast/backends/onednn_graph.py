"""Attention on x86 CPUs: a partition of oneDNN Graph, in TorchScript's wrapping, kept by Static Runtime.

torch's own kernel multiplies with MKL, which has bf16 and AVX-512 for Intel's CPUs only. oneDNN has them for all: a
thread takes one head of one image after the other, and computes both products and the softmax in a scratchpad. The
scores are float32, as in torch's kernel, because the graph below says so (docs/decisions.md).
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("siglip_fast")

_MOST_SCORES = 64 << 20  # of all threads together, 6 bytes each: 729 tokens on 126 threads, 4096 on 64
_MOST_SHAPES = 64  # oneDNN keeps what it compiled to the end, up to 3 MB each
_FLOAT32_TOKENS = range(65, 1297)  # with fewer and with more torch's kernel is as fast or faster
_TYPES = {torch.bfloat16: "BFloat16", torch.float32: "Float"}

_compiled: dict[tuple, Callable[[Tensor], Tensor] | None] = {}
_compiling = threading.Lock()


def attention_for(qkv: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What computes `Ops.attention` of contiguous tensors like this one; None where torch's kernel should."""
    B, N, _, H, d = qkv.shape
    if qkv.dtype not in _TYPES or (qkv.dtype == torch.float32 and N not in _FLOAT32_TOKENS):
        return None
    # It looks at memory only, of which other kinds of tensors may have none, or another sign.
    if type(qkv) is not Tensor or qkv.is_neg():
        return None
    threads, blocks = torch.get_num_threads(), _blocks(N)
    images = B if blocks == 1 else min(B, 1)  # at once
    # With fewer heads oneDNN has another kernel, for all heads at once. That is its rule, and its number.
    if images * blocks * H <= 2 * threads or threads * N * N > blocks * _MOST_SCORES:
        return None
    if not _is_usable(qkv.dtype, threads):
        return None
    attention = _compiled_for(qkv.dtype, images, N, H, d, threads)
    if attention is None or images == B:
        return attention
    return lambda qkv: torch.cat([attention(image) for image in qkv.split(1)])


def _blocks(N: int) -> int:
    """Into how many blocks of 128 to 256 queries an image is cut, where its scores are too many for the caches."""
    if N > 1024:
        for blocks in range(-(-N // 256), N // 128 + 1):
            if N % blocks == 0:
                return blocks
    return 1


@functools.cache
def _is_usable(dtype: torch.dtype, threads: int) -> bool:
    """Whether oneDNN computes what the graph says: bf16 has no 257, and scores of 256 and 257 would be equal."""
    qkv = torch.zeros(1, 2, 3, 2 * threads + 1, 64, dtype=dtype, device="cpu")
    queries, keys, values = qkv[0].unbind(1)
    queries[..., 0], queries[..., 1] = 64, 1
    keys[..., 0], keys[1, :, 1] = 32, 8
    values[1] = 1
    attention = _compiled_for(dtype, 1, 2, 2 * threads + 1, 64, threads)
    if attention is None:
        return False
    expected = torch.ones((), device="cpu").sigmoid()
    if not (attention(qkv) - expected).abs().max() < 0.01:
        logger.info("attention in %s is torch's: oneDNN Graph rounds the scores", dtype)
        return False
    return True


def _compiled_for(dtype: torch.dtype, *shape: int) -> Callable[[Tensor], Tensor] | None:
    """Of B, N, H, d and the number of threads, which decides on oneDNN's kernel; None if there is to be none."""
    key = dtype, *shape
    if key not in _compiled:
        with _compiling:
            if key not in _compiled and len(_compiled) < _MOST_SHAPES:
                _compiled[key] = _compile(dtype, *shape[:4])
    return _compiled.get(key)


def _compile(dtype: torch.dtype, B: int, N: int, H: int, d: int) -> Callable[[Tensor], Tensor] | None:
    scale = torch.full((1,), d**-0.5, dtype=torch.float32, device="cpu")
    n = N // _blocks(N)
    running = threading.Lock()  # Static Runtime computes one call at a time, and holds the GIL meanwhile

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        q = q.view(-1, n, H, d).transpose(1, 2)
        k, v = (t.transpose(1, 2).expand(len(q), -1, -1, -1) for t in (k, v))
        with running:
            return run(q, k.mT, v, scale).transpose(1, 2).view(B, N, H, d)

    try:
        run = torch._C._jit_to_static_module(_graph(_TYPES[dtype], B, N, H, d))
        attention(torch.zeros(B, N, 3, H, d, dtype=dtype, device="cpu"))  # the first call compiles
    except Exception as error:  # of any kind: torch calls all this internal
        logger.info("attention in %s is torch's: oneDNN Graph does not compile it: %s", dtype, error)
        return None
    return attention


def _graph(dtype: str, B: int, N: int, H: int, d: int) -> "torch._C.Graph":
    """One node, as TorchScript's fuser for oneDNN makes them. oneDNN knows dtypes and layouts from these types only.

    Blocks of queries look like images that share their keys and values: these have stride 0.
    """
    blocks = _blocks(N)
    B, n, row = B * blocks, N // blocks, 3 * H * d
    per_image = N * row if blocks == 1 else 0
    queries = _type(dtype, (B, H, n, d), (n * row, d, row, 1))
    keys = _type(dtype, (B, H, d, N), (per_image, d, 1, row))
    values = _type(dtype, (B, H, N, d), (per_image, d, row, 1))
    pairs = (B, H, n, N), (H * n * N, n * N, N, 1)
    scores, probabilities = _type("Float", *pairs), _type(dtype, *pairs)
    subgraph = torch._C.parse_ir(f"""
        graph(%q : {queries}, %k : {keys}, %v : {values}, %scale : {_type("Float", (1,), (1,))}):
            %axis : int = prim::Constant[value=-1]()
            %none : NoneType = prim::Constant()
            %products : {scores} = aten::matmul(%q, %k)
            %scores : {scores} = aten::mul(%products, %scale)
            %probabilities : {probabilities} = aten::softmax(%scores, %axis, %none)
            %out : {_type(dtype, (B, H, n, d), (n * H * d, d, H * d, 1))} = aten::matmul(%probabilities, %v)
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
