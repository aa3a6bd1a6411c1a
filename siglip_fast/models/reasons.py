"""Why a forward has to run as stock's, beside what the tower is made of: the call, the circumstances, the attention."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backends.select import backend_for
from .anatomy import descendant
from .outputs import asked_for

GRADIENTS = "gradients are needed (use torch.no_grad or torch.inference_mode for inference)"
NOT_DERIVED = "a CUDA graph is being captured before the weights were derived (run one forward before)"
# Names of implementations of the same softmax attention, not of something that a caller could observe
_EXACT_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# What torch.autocast may compute in, on parameters in float32
_AUTOCAST = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """That of the torch.autocast region around this call, or None where there is none."""
    type = device.type
    is_on = torch.amp.is_autocast_available(type) and torch.is_autocast_enabled(type)
    return torch.get_autocast_dtype(type) if is_on else None


def circumstances(
    model: nn.Module, stock: type[nn.Module], weight: Tensor | None, pixel_values: Tensor
) -> Iterator[str | None]:
    """What speaks against the fused forward here and now, whatever the model computes; `weight` is of its patch embedding."""
    yield patched_reason(stock)
    if "_is_replica" in vars(model):
        yield "this is a replica of torch.nn.DataParallel"
    if type(pixel_values) not in (Tensor, nn.Parameter, nn.Buffer):
        yield f"pixel_values are a {type(pixel_values).__name__}, not a plain tensor"
    elif pixel_values.ndim > 0 and pixel_values.shape[0] == 0:
        yield "the batch is empty"
    yield mode_reason()
    dtype = None if weight is None else weight.dtype
    yield autocast_reason(pixel_values.device, dtype, torch.compiler.is_compiling())


# The next four ask what torch.compile cannot trace. It calls them as it traces; what they answer is part of the graph.
@torch.compiler.assume_constant_result
def autocast_reason(device: torch.device, parameters: torch.dtype | None, is_compiling: bool) -> str | None:
    """Why torch.autocast, if it is on, is left to stock's code; `parameters` is their dtype."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return None
    if is_compiling:
        return f"autocast to {dtype} is active under torch.compile"
    if dtype not in _AUTOCAST.get(device.type, ()):
        return f"autocast to {dtype} is active on {device.type}"
    return None if parameters == torch.float32 else f"autocast to {dtype} is active on {parameters} parameters"


@torch.compiler.assume_constant_result
def mode_reason() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if torch.jit.is_tracing() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return "the operations are traced or intercepted (torch.jit.trace, make_fx, a TorchDispatchMode)"
    return None


@torch.compiler.assume_constant_result
def patched_reason(stock: type[nn.Module]) -> str | None:
    if stock.forward.__module__ != stock.__module__:
        return f"the forward of {stock.__name__} is patched"
    return None


@torch.compiler.assume_constant_result
def backend_reason(backend: str, device: torch.device) -> str | None:
    return backend_for(backend, device)[1]


def keyword_reasons(config: Any, kwargs: dict[str, Any], ignored: tuple[str, ...] = ()) -> Iterator[str]:
    """Why a tower of transformers, called with `kwargs`, has to run as stock's. `output_hidden_states` is not looked at."""
    if asked_for("output_attentions", config, kwargs):
        yield "output_attentions was asked for"
    known = ("return_dict", "output_attentions", "output_hidden_states", *ignored)
    if extra := [name for name, value in kwargs.items() if name not in known and value is not None]:
        yield f"the stock code takes the keyword arguments {', '.join(extra)}"
    if kwargs.get("return_dict", True) is None and config.return_dict is False:
        yield "return_dict is None, which means different things to different versions of transformers"


def attention_reasons(
    tower: nn.Module, layers_at: tuple[str, ...] = ("encoder", "layers"), attention_name: str = "self_attn"
) -> Iterator[str]:
    """Why the attention of transformers' encoder layers has to run as stock's: its implementation, or dropout."""
    layers = descendant(tower, *layers_at)
    attentions = [layer._modules.get(attention_name) for layer in (() if layers is None else layers._modules.values())]
    configs: list[Any] = []
    for module in attentions:
        if hasattr(module, "config") and not (configs and module.config is configs[-1]):  # mostly they share one
            configs.append(module.config)
    for name in sorted({config._attn_implementation for config in configs}):
        if name not in _EXACT_ATTENTION:
            yield f"attention implementation {name!r} was asked for"
        elif not _is_transformers_own(ALL_ATTENTION_FUNCTIONS.get(name)):
            yield f"attention implementation {name!r} is not transformers' own"
    if any(m is not None and m.training and _dropout(m) for m in attentions):
        yield "attention dropout is active"


def _dropout(attention: nn.Module) -> float:
    return getattr(attention, "dropout", 0) or getattr(attention, "attention_dropout", 0)


def _is_transformers_own(attention: Callable | None) -> bool:
    return getattr(attention, "__module__", "").startswith("transformers.integrations.")
