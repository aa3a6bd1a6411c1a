"""The peers of the CPU benchmark: each a callable that runs one forward and returns `pooler_output`, in one dtype.

All have the same weights, drawn from one seed. torch.compile, onnxruntime and OpenVINO fold what they
can (freezing), as siglip_fast does.
"""

import copy
import os
import tempfile
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from siglip_fast import SiglipVisionModel

Forward = Callable[[], Tensor]


class NoSuchKernels(Exception):
    """The peer cannot compute in this dtype."""


def stock(config, attention: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    make = transformers.SiglipVisionModel._from_config
    return make(copy.deepcopy(config), attn_implementation=attention).to(dtype).eval()


def make_contiguous(model: nn.Module) -> nn.Module:
    """Stock's residual stream is a transposed convolution output; this is what a user who knows that would do."""
    embeddings = getattr(model, "vision_model", model).embeddings  # nested until transformers 5.6
    embeddings.register_forward_hook(lambda module, args, output: output.contiguous())
    return model


def _torch(model: nn.Module, pixels: Tensor) -> Forward:
    return lambda: model(pixels).pooler_output


def eager(config, dtype, pixels):
    return _torch(stock(config, "eager", dtype), pixels)


def sdpa(config, dtype, pixels):
    return _torch(stock(config, "sdpa", dtype), pixels)


def sdpa_contiguous(config, dtype, pixels):
    return _torch(make_contiguous(stock(config, "sdpa", dtype)), pixels)


def compiled(config, dtype, pixels):
    """torch.compile with freezing."""
    model = torch.compile(stock(config, "sdpa", dtype))
    with torch._inductor.config.patch(freezing=True):
        model(pixels)
    return _torch(model, pixels)


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).pooler_output


def onnxruntime(config, dtype, pixels):
    import onnxruntime as ort

    if dtype != torch.float32:
        raise NoSuchKernels("no bf16 kernels")
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


def siglip_fast(config, dtype, pixels):
    model = SiglipVisionModel(copy.deepcopy(config), strict=True)
    model.load_state_dict(stock(config, "sdpa", torch.float32).state_dict())
    return _torch(model.to(dtype).eval(), pixels)


PEERS = {
    "stock eager": eager,
    "stock sdpa": sdpa,
    "stock sdpa, contiguous": sdpa_contiguous,
    "torch.compile, freezing": compiled,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
}
