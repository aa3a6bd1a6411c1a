"""The peers of the model benchmark: each a callable that runs one forward and returns `pooler_output`.

A peer is made from a config, a dtype and pixels, whose device it takes. All have the same weights, drawn from one
seed. What cannot be made raises `Missing` or ImportError; the benchmark then names it as missing, with the reason.
"""

import contextlib
import copy
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from siglip_fast import SiglipVisionModel
from siglip_fast.tuning import cache
from siglip_fast.tuning.cases import Case, cases

Forward = Callable[[], Tensor]


class Missing(Exception):
    """Why the peer cannot be had here."""


def stock(
    config,
    attention: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    architecture: type[transformers.PreTrainedModel] = transformers.SiglipVisionModel,
) -> nn.Module:
    torch.manual_seed(0)
    make = architecture._from_config
    with device or contextlib.nullcontext():  # drawn there: on a CPU it takes seconds a peer
        return make(copy.deepcopy(config), attn_implementation=attention).to(dtype).eval()


def make_contiguous(model: nn.Module) -> nn.Module:
    """Stock's residual stream is a transposed convolution output; this is what a user who knows that would do."""
    embeddings = getattr(model, "vision_model", model).embeddings  # nested until transformers 5.6
    embeddings.register_forward_hook(lambda module, args, output: output.contiguous())
    return model


def _pooled(model: nn.Module, pixels: Tensor) -> Forward:
    return lambda: model(pixels).pooler_output


def stock_peer(config, dtype, pixels, attention):
    return _pooled(stock(config, attention, dtype, pixels.device), pixels)


def sdpa_contiguous(config, dtype, pixels):
    return _pooled(make_contiguous(stock(config, "sdpa", dtype, pixels.device)), pixels)


def flash_attention_2(config, dtype, pixels):
    if not importlib.util.find_spec("flash_attn"):  # before transformers looks for a kernel on the Hub instead
        raise Missing("flash_attn is not installed")
    return stock_peer(config, dtype, pixels, "flash_attention_2")


def compiled(config, dtype, pixels, mode):
    # Not dynamic: a second batch size of the same code would otherwise be compiled for every size.
    model = torch.compile(stock(config, "sdpa", dtype, pixels.device), mode=mode, dynamic=False)
    return _pooled(model, pixels)


def compiled_freezing(config, dtype, pixels):
    run = compiled(config, dtype, pixels, "default")
    with torch._inductor.config.patch(freezing=True):
        run()
    return run


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).pooler_output


def onnxruntime(config, dtype, pixels):
    import onnxruntime as ort

    if dtype != torch.float32:
        raise Missing("no bf16 kernels")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(_Pooled(stock(config, "sdpa", dtype)), (pixels,), path, dynamo=True, verbose=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, pixels.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: array})[0])


def openvino(config, dtype, pixels):
    import openvino as ov

    pixels = pixels.float()
    model = ov.convert_model(_Pooled(stock(config, "sdpa", torch.float32)), example_input=pixels)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.compile_model(model, "CPU", options).create_infer_request()
    array = pixels.numpy()
    return lambda: torch.from_numpy(request.infer([array])[0])


def timm(config, dtype, pixels):
    """timm's SigLIP is its VisionTransformer with these arguments (`vit_base_patch16_siglip_224` and the like)."""
    if not importlib.util.find_spec("timm"):
        raise Missing("timm is not installed")
    from timm.models.vision_transformer import VisionTransformer

    with pixels.device:
        model = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the product down
            class_token=False,
            global_pool="map",
            num_classes=0,
            act_layer="gelu_tanh",
        )
    model.load_state_dict(timm_state(stock(config, "sdpa", torch.float32, pixels.device).state_dict()))
    model = model.to(dtype).eval()
    return lambda: model(pixels)


_TIMM_NAMES = (
    ("vision_model.", ""),  # nested until transformers 5.6
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("post_layernorm.", "norm."),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.layernorm.", "attn_pool.norm."),
    ("head.mlp.", "attn_pool.mlp."),
    ("encoder.layers.", "blocks."),
    ("layer_norm", "norm"),
    ("self_attn.out_proj.", "attn.proj."),
)


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict under timm's names: Q, K and V in one matrix, those of the pooling head in two."""
    state, renamed = dict(state), {}
    for kind in ("weight", "bias"):
        for q_name in [name for name in state if name.endswith(f"q_proj.{kind}")]:
            parts = [state.pop(q_name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            state[q_name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        for packed in [name for name in state if name.endswith(f"in_proj_{kind}")]:
            query, key, value = state.pop(packed).chunk(3)
            renamed |= {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": torch.cat([key, value])}
    for name, tensor in state.items():
        for old, new in _TIMM_NAMES:
            name = name.replace(old, new)
        renamed[name] = tensor[None] if name == "pos_embed" else tensor
    return renamed


def siglip_fast(config, dtype, pixels, choices="built-in", graph=False):
    """Ours. Which configurations it runs is settled when it derives its weights, at the first forward or capture."""
    if choices == "raced" and not pixels.is_cuda:
        raise Missing("races are for GPUs")
    if choices == "tuned" and not is_tuned(tuning_cases(config, dtype, len(pixels)), pixels.device):
        raise Missing(NOT_TUNED)
    with pixels.device:
        model = SiglipVisionModel(copy.deepcopy(config), strict=True)
    model.load_state_dict(stock(config, "sdpa", torch.float32, pixels.device).state_dict())
    model = model.to(dtype).eval()
    with configurations(choices):
        if graph:
            _capture(model, pixels)
        model(pixels)
    return _pooled(model, pixels)


def _capture(model, pixels) -> None:
    try:
        model.capture([len(pixels)])
    except RuntimeError as reason:
        if pixels.is_cuda:  # there it has to work
            raise
        raise Missing(str(reason)) from reason


@contextlib.contextmanager
def configurations(choices: str) -> Iterator[None]:
    """For what runs for the first time in here: "built-in" ones, those of a race as it is without a cache, which is what
    users have who did nothing ("raced"), or "tuned" ones."""
    with mock.patch.dict(os.environ), tempfile.TemporaryDirectory() as empty:
        os.environ.pop("SIGLIP_FAST_TUNE", None)
        if choices == "built-in":
            os.environ["SIGLIP_FAST_TUNE"] = "off"
        if choices == "raced":
            os.environ["SIGLIP_FAST_CACHE_DIR"] = empty
        yield


NOT_TUNED = "not tuned for this batch size on this device (siglip-fast tune)"


def tuning_cases(config, dtype: torch.dtype, batch_size: int) -> list[Case]:
    """The operations of a model's forward, as tuning measures them."""
    return cases(config, (config.image_size // config.patch_size) ** 2, dtype, [batch_size])


def is_tuned(wanted: list[Case], device: torch.device) -> bool:
    """Whether each was measured on this device, for this number of rows."""
    if device.type != "cuda":
        return False
    entries = cache.read(cache.Key.of(device))
    found = (entries.get(str(case.operation), {}).get(str(cache.bucket(case.rows))) for case in wanted)
    return all(map(cache.is_tuned, found))


_STOCK = {
    "stock eager": functools.partial(stock_peer, attention="eager"),
    "stock sdpa": functools.partial(stock_peer, attention="sdpa"),
    "stock sdpa, contiguous": sdpa_contiguous,
}
_OURS = {
    "siglip_fast": siglip_fast,
    "siglip_fast, graph": functools.partial(siglip_fast, graph=True),
    "siglip_fast, raced": functools.partial(siglip_fast, choices="raced"),
    "siglip_fast, tuned": functools.partial(siglip_fast, choices="tuned"),
    "siglip_fast, tuned, graph": functools.partial(siglip_fast, choices="tuned", graph=True),
}
_COMPILED = {
    f"torch.compile, {mode}": functools.partial(compiled, mode=mode)
    for mode in ("default", "reduce-overhead", "max-autotune")
}
# By device. Ours come first: what does not fit into memory beside them is the peer, not we.
PEERS = {
    "cpu": _OURS
    | _STOCK
    | {"torch.compile, freezing": compiled_freezing, "timm": timm, "onnxruntime": onnxruntime, "OpenVINO": openvino},
    "cuda": _OURS | _STOCK | {"flash_attention_2": flash_attention_2, "timm": timm} | _COMPILED,
}
