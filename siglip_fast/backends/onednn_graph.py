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

# Of all threads together, 6 bytes each, in fp32 8: 729 tokens on 126 threads, 4096 on 64.
_MOST_SCORES = 64 << 20
# Of those with as many queries as keys, and of the others: oneDNN keeps what it compiled to the end, up to 3 MB each
_MOST_SHAPES = 64
_FLOAT32_TOKENS = range(65, 1297)  # with fewer and with more torch's kernel is as fast or faster
_TYPES = {torch.bfloat16: "BFloat16", torch.float32: "Float"}

_compiled: dict[tuple, Callable[[Tensor], Tensor] | None] = {}
_compiling = threading.Lock()


def attention_for(qkv: Tensor, keys: int | None = None) -> Callable[[Tensor], Tensor] | None:
    """What computes `Ops.attention` of contiguous tensors of this dtype and shape, of all queries and so many keys, the first
    ones (None: all), on as many threads as now; None where torch's kernel should."""
    B, n, _, H, d = qkv.shape
    N = n if keys is None else keys
    if qkv.dtype not in _TYPES or (qkv.dtype == torch.float32 and N not in _FLOAT32_TOKENS):
        return None
    # It looks at memory only, of which other kinds of tensors may have none, or another sign.
    if type(qkv) is not Tensor or qkv.is_neg():
        return None
    threads, blocks = torch.get_num_threads(), _blocks(N)
    if blocks > 1 and n != N:
        return None
    # With fewer heads oneDNN has another kernel, for all heads at once. That is its rule, and its number.
    if blocks * H <= 2 * threads:
        blocks = 1
    if B * blocks * H <= 2 * threads or threads * N * N > blocks * _MOST_SCORES:
        return None
    if not _is_usable(qkv.dtype, threads):
        return None
    images = B if blocks == 1 else 1  # in one call: with a stride of 0 only one
    compiled = _compiled_for(qkv.dtype, images, n, N, blocks, H, d, threads)
    if compiled is None or images == B:
        return compiled
    return lambda batch: torch.cat([compiled(image) for image in batch.split(1)])


def _blocks(N: int) -> int:
    """Into how many blocks of 128 to 256 queries an image is cut, where its scores are too many for the caches."""
    if N > 1024:
        for blocks in range(-(-N // 256), N // 128 + 1):
            if N % blocks == 0:
                return blocks
    return 1


@functools.cache
def _is_usable(dtype: torch.dtype, threads: int) -> bool:
    """Whether oneDNN computes what the graph says, in two blocks: bf16 has no 257, and rounded scores of 256 and 257
    would be equal."""
    qkv = torch.zeros(1, 4, 3, 2 * threads + 1, 64, dtype=dtype, device="cpu")
    queries, keys, values = qkv[0].unbind(1)
    queries[..., 0], queries[..., 1] = 64, 1
    keys[..., 0], keys[::2, :, 1] = 32, 8
    values[::2] = 1
    attention = _compiled_for(dtype, 1, 4, 4, 2, 2 * threads + 1, 64, threads)
    if attention is None:
        return False
    expected = torch.ones((), device="cpu").sigmoid()
    if not (attention(qkv) - expected).abs().max() < 0.01:
        logger.info("attention in %s is torch's: oneDNN Graph does not compute what it should", dtype)
        return False
    return True


def _compiled_for(dtype: torch.dtype, *shape: int) -> Callable[[Tensor], Tensor] | None:
    """Of B, queries, keys, blocks, H, d and the number of threads, which decides on oneDNN's kernel; None if there is to be none."""
    key = dtype, *shape
    if key not in _compiled:
        with _compiling:
            alike = [other for other in _compiled if _attends_to_all(*other) == _attends_to_all(*key)]
            if key not in _compiled and len(alike) < _MOST_SHAPES:
                _compiled[key] = _compile(dtype, *shape[:6])
    return _compiled.get(key)


def _attends_to_all(dtype: torch.dtype, images: int, queries: int, keys: int, *_: int) -> bool:
    return queries == keys


def _compile(
    dtype: torch.dtype, B: int, queries: int, keys: int, blocks: int, H: int, d: int
) -> Callable[[Tensor], Tensor] | None:
    n = queries // blocks
    running = threading.Lock()  # Static Runtime computes one call at a time, and holds the GIL meanwhile

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        k, v = k[:, :keys], v[:, :keys]
        q = q.view(B * blocks, n, H, d)  # blocks look like images, whose keys and values have a stride of 0
        q, k, v = (t.transpose(1, 2).expand(B * blocks, -1, -1, -1) for t in (q, k, v))
        with running:
            return run(q, k.mT, v, scale).transpose(1, 2).view(B, queries, H, d)

    try:
        scale = torch.full((1,), d**-0.5, dtype=torch.float32, device="cpu")
        run = torch._C._jit_to_static_module(_graph(_TYPES[dtype], B * blocks, n, keys, H, d))
        # The first call compiles, for tensors of its strides: oneDNN would not notice others.
        attention(torch.zeros(B, queries, 3, H, d, dtype=dtype, device="cpu"))
    except Exception as error:  # of any kind: torch calls all this internal
        logger.info("attention in %s is torch's: oneDNN Graph does not compile it: %s", dtype, error)
        return None
    return attention


def _graph(dtype: str, B: int, n: int, N: int, H: int, d: int) -> "torch._C.Graph":
    """Of n queries and N keys: one node, as TorchScript's fuser for oneDNN makes them. oneDNN knows the dtypes, and the
    output's strides, from these types only."""
    scores, probabilities = _type("Float", B, H, n, N), _type(dtype, B, H, n, N)
    strides = f"strides=[{n * H * d}, {d}, {H * d}, 1]"
    subgraph = torch._C.parse_ir(f"""
        graph(%q : {_type(dtype, B, H, n, d)}, %k : {_type(dtype, B, H, d, N)}, %v : {_type(dtype, B, H, N, d)},
              %scale : {_type("Float", 1)}):
            %axis : int = prim::Constant[value=-1]()
            %none : NoneType = prim::Constant()
            %products : {scores} = aten::matmul(%q, %k)
            %scores : {scores} = aten::mul(%products, %scale)
            %probabilities : {probabilities} = aten::softmax(%scores, %axis, %none)
            %out : {_type(dtype, B, H, n, d, strides)} = aten::matmul(%probabilities, %v)
            return (%out)
    """)
    graph = torch._C.Graph()
    group = graph.create("prim::oneDNNFusionGroup", [graph.addInput(name) for name in ("q", "k", "v", "scale")], 1)
    group.g_("Subgraph", subgraph)
    group.is_("output_layouts", [0])  # strided as its type says, not a layout of oneDNN's choice
    graph.insertNode(group)
    graph.registerOutput(group.output())
    return graph


def _type(dtype: str, *sizes: int | str) -> str:
    return f"{dtype}({', '.join(map(str, sizes))}, requires_grad=0, device=cpu)"
