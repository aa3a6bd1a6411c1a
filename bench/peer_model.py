"""The same forward by the vendor's libraries, with the constants of the model of our kernels. No GPU is involved.

Without machine code, so by what the libraries have to do. A GEMM is the best of eight tiles from 64×64 to 256×128 with
or without split-K, persistent, with four instructions an element in its epilogue (bias, GELU where asked), and clusters of two
that share one operand's loads. SDPA is the best of its backends, whose softmax hides behind their products as that of two
CTAs of ours does: 80 % of TENSOR, of rows padded to 64, keys and head_dim to 16; special functions or memory if they take longer. Everything else is a kernel that streams its inputs and outputs through memory.

- **vendor**: `siglip_fast.backends.vendor`: LayerNorm, GEMM, SDPA, GEMM, and the kernel that adds the residual.
- **stock sdpa**: Hugging Face's model: three GEMMs for q, k and v, copies before LayerNorm (its residual stream is not
  contiguous), GELU and each addition kernels of their own; nn.MultiheadAttention projects keys and values of all tokens.
- **torch.compile, max-autotune**: the same without copies, additions fused into LayerNorm, and GELU into its GEMM, which
  Inductor does where its own template wins: in doubt the count favours the peer.

Time on the GPU, as in a graph: that an eager small batch waits for its host is not in it.
"""

from collections import Counter

from gpu_model import DRAIN, FILL, HZ, L2, L2_PORT, LAUNCH, MEMORY, SMS, TENSOR

TILES = [(256, 128), (128, 256), (128, 192), (192, 128), (128, 128), (128, 64), (64, 128), (64, 64)]
FLASH, EXPONENTIALS = 0.8 * TENSOR, 16 * HZ * SMS  # a second
EPILOGUE = 4  # instructions an element


def stream(*elements: int) -> float:
    """Seconds of a kernel that reads and writes so many 16-bit elements."""
    return LAUNCH + max(FILL + DRAIN, 2 * sum(elements) / MEMORY)


def gemm(M: int, N: int, K: int) -> float:
    return min(_gemm(M, N, K, m, n, splits) for m, n in TILES for splits in (1, 2, 4, 8))


def _gemm(M: int, N: int, K: int, m: int, n: int, splits: int) -> float:
    tiles = -(-M // m) * -(-N // n) * splits
    loaded = 2 * (max(m, n) / 2 + min(m, n)) * K / splits
    main_loop = max(2 * m * n * K / splits / (TENSOR / SMS), loaded / L2_PORT)
    chain = FILL + -(-tiles // SMS) * (main_loop + EPILOGUE * m * n / 128 / HZ + DRAIN)
    time = LAUNCH + max(chain, tiles * loaded / L2, 2 * (M * K + N * K + M * N) / MEMORY)
    return time + (stream(4 * splits * M * N) if splits > 1 else 0)


def sdpa(B: int, N: int, H: int, d: int) -> float:
    scores = B * H * (-(-N // 64) * 64) * (-(-N // 16) * 16)
    products = 4 * scores * (-(-d // 16) * 16) / FLASH
    return LAUNCH + FILL + DRAIN + max(products, scores / EXPONENTIALS, 8 * B * N * H * d / MEMORY)


def routes(config, B: int) -> dict[str, tuple[Counter, int]]:
    """Route: microseconds of all calls of an operation in a forward, and how many launches there are."""
    built = {"vendor": _vendor, "stock sdpa": _stock, "torch.compile, max-autotune": _compiled}
    return {route: _total(build(config, B), config.num_hidden_layers) for route, build in built.items()}


Times = dict[str, list[float]]  # operation: seconds of its launches, in a layer or around the layers


def _total(times: tuple[Times, Times], layers: int) -> tuple[Counter, int]:
    total, launches = Counter(), 0
    for part, repeats in zip(times, (layers, 1), strict=True):
        for name, seconds in part.items():
            total[name] += 1e6 * repeats * sum(seconds)
            launches += repeats * len(seconds)
    return total, launches


def _sizes(config, B: int) -> tuple[int, int, int, int, int]:
    N, D, F = (config.image_size // config.patch_size) ** 2, config.hidden_size, config.intermediate_size
    return B * N, N, D, F, 3 * config.patch_size**2


def _vendor(config, B: int) -> tuple[Times, Times]:
    M, N, D, F, K = _sizes(config, B)
    heads = config.num_attention_heads
    layer = {
        "qkv": [stream(M * D, M * D), gemm(M, 3 * D, D)],
        "attention": [sdpa(B, N, heads, D // heads)],
        "out_proj": [gemm(M, D, D), stream(3 * M * D)],
        "fc1": [stream(M * D, M * D), gemm(M, F, D)],
        "fc2": [gemm(M, D, F), stream(3 * M * D)],
    }
    # scores, softmax, weighted sum, value projection, each a small kernel or two, with casts to fp32
    pool = [stream(3 * M * D), stream(M * heads), stream(M * heads), stream(M * D), stream(B * heads * D, D * D)]
    head = [gemm(B, D, D), stream(B * D), gemm(B, F, D), gemm(B, D, F), stream(3 * B * D)]
    ends = {
        "patch_embed": [stream(M * K, M * K), gemm(M, D, K), stream(2 * M * D), stream(M * D)],
        "layernorm": [stream(2 * M * D)],
        "attention_pool": pool,
        "head": head,
    }
    return layer, ends


def _stock(config, B: int) -> tuple[Times, Times]:
    M, N, D, F, K = _sizes(config, B)
    heads = config.num_attention_heads
    copy_and_norm = [stream(2 * M * D), stream(2 * M * D)]
    layer = {
        "qkv": [*copy_and_norm, *3 * [gemm(M, D, D)]],
        "attention": [sdpa(B, N, heads, D // heads)],
        "out_proj": [gemm(M, D, D), stream(3 * M * D)],
        "fc1": [*copy_and_norm, gemm(M, F, D), stream(2 * M * F)],
        "fc2": [gemm(M, D, F), stream(3 * M * D)],
    }
    return layer, _stock_ends(config, B, copies=True)


def _compiled(config, B: int) -> tuple[Times, Times]:
    M, N, D, F, K = _sizes(config, B)
    heads = config.num_attention_heads
    layer = {
        "qkv": [*3 * [gemm(M, D, D)]],
        "attention": [sdpa(B, N, heads, D // heads)],
        "out_proj": [gemm(M, D, D), stream(4 * M * D)],  # with the addition and the LayerNorm that follows
        "fc1": [gemm(M, F, D)],
        "fc2": [gemm(M, D, F), stream(4 * M * D)],
    }
    return layer, _stock_ends(config, B, copies=False)


def _stock_ends(config, B: int, copies: bool) -> Times:
    M, N, D, F, K = _sizes(config, B)
    heads = config.num_attention_heads
    pool = [gemm(M, 2 * D, D), sdpa(B, N, heads, D // heads) / 4, stream(B * D), gemm(B, D, D)]
    head = [stream(2 * B * D), gemm(B, F, D), stream(2 * B * F), gemm(B, D, F), stream(3 * B * D)]
    copy = [stream(2 * M * D)] if copies else []
    return {
        "patch_embed": [stream(2 * M * K), gemm(M, D, K), stream(2 * M * D)],
        "layernorm": [*copy, stream(2 * M * D)],
        "attention_pool": pool,
        "head": head,
    }
