"""The drop-in: `transformers.SiglipVisionModel` with a fused inference forward."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from . import selection, traced
from .backends.select import NAMES, backend_for, is_capturing
from .forward import forward
from .graphs import RECORDING, Graphs
from .ops import DTYPES
from .uint8 import Normalization, check_images, normalization
from .weights import Derived

if TYPE_CHECKING:  # tuning imports the kernels, and they Triton
    from .tuning import Report

logger = logging.getLogger("siglip_fast")


class SiglipVisionModel(transformers.SiglipVisionModel):
    """`transformers.SiglipVisionModel` (same constructor, parameters, state dict and outputs), made fast.

    A forward that needs no gradients runs on the fused operations of `siglip_fast.ops`. Where they do not apply, the
    stock forward runs and the reason is logged once; `why_not` tells it beforehand.

    Args:
        config: as for the stock class.
        backend: "auto", "triton", "cpu" or "torch" (`siglip_fast.backends`). Default: the environment variable
            SIGLIP_FAST_BACKEND, else "auto".
        strict: raise RuntimeError with the reason instead of running the stock forward (not under torch.export,
            where the stock forward is always the one that is traced).

    Raises:
        ValueError: the backend's name is unknown.
    """

    # Of the class, for models that were pickled before there were any
    _to_capture: tuple[tuple[int, ...], int] | None = None  # batch sizes, image size
    _graphs: tuple[Derived, Graphs] | None = None  # made from those derived weights

    def __init__(self, config: SiglipVisionConfig, *, backend: str | None = None, strict: bool = False):
        super().__init__(config)
        self.backend = backend or os.environ.get("SIGLIP_FAST_BACKEND", "auto")
        self.strict = strict
        if self.backend not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {self.backend!r}")
        self._derived: Derived | None = None
        self._handle = traced.Handle(self, SiglipVisionModel.forward)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, C, H, W]` → `last_hidden_state [B, N, D]` and `pooler_output [B, D]` (None without head).

        Keyword arguments, dtypes and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            ValueError: pixel_values have the wrong rank or channels, or a size that the position embedding does not
                fit and `interpolate_pos_encoding` was not asked for.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        derived, reason = self._route(pixel_values, kwargs)
        if reason is _GRADIENTS:
            self._drop()  # the weights are about to change, perhaps in ways that torch does not count
        if reason is not None:
            if self.strict:
                raise RuntimeError(f"the fused forward does not apply: {reason}")
            _log_once(reason)
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        if compiling:
            return self._output(*traced.forward(self, pixel_values, interpolate_pos_encoding), kwargs)
        with torch.no_grad():
            outputs = self._fused(derived, pixel_values, interpolate_pos_encoding)
        return self._output(*outputs, kwargs)

    def forward_uint8(
        self,
        images: Tensor,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        rescale_factor: float = 1 / 255,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`model((images * rescale_factor - mean) / std)`, where Triton runs without making those pixels in memory.

        images uint8 `[B, C, H, W]` of any strides, resized already; a batch with its channels last is passed as
        `images.permute(0, 3, 1, 2)`. The other names are those of Hugging Face's image processors, the defaults
        SigLIP's. Outputs and keyword arguments as `forward`.

        Raises:
            TypeError: images are no uint8 tensor.
            ValueError: images have the wrong rank, channels or size; image_mean or image_std not one finite value a
                channel; a zero in image_std or rescale_factor. And what `forward` raises.
        """
        channels = self.config.num_channels
        check_images(images, channels)
        normalize = normalization(image_mean, image_std, rescale_factor, channels)
        # torch and oneDNN round their products to 16 bits before a bias could be added in float32; so these backends
        # normalise first, as does whatever is not fused (hooks on this very model included) or folded too coarsely.
        hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self)
        hooked = hooked or type(self).forward is not SiglipVisionModel.forward
        if torch.compiler.is_compiling() or hooked:
            return self(normalize(images), interpolate_pos_encoding, **kwargs)
        derived, reason = self._route(images, kwargs)
        if reason is not None or not self._folds(derived, normalize):
            return self(normalize(images), interpolate_pos_encoding, **kwargs)
        with torch.no_grad():
            outputs = self._fused(derived, images, interpolate_pos_encoding, normalize)
        return self._output(*outputs, kwargs)

    def _route(self, pixel_values: Tensor, kwargs: dict) -> tuple[Derived | None, str | None]:
        """The derived weights to run on (None where torch.compile traces), or the reason for running stock's code."""
        derived, reason = None, next(self._call_reasons(pixel_values, kwargs), None)
        if reason is None and torch.compiler.is_compiling():
            reason = traced.tower_reason(self._handle.tensor)
        elif reason is None:
            derived = self._current()
            reason = derived.reason(owner=self)
        return derived, reason

    def _output(
        self, last_hidden_state: Tensor, pooler_output: Tensor | None, kwargs: dict
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        output = BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooler_output)
        return_dict = kwargs.get("return_dict", getattr(self.config, "return_dict", True))
        return output.to_tuple() if return_dict is False else output

    def capture(self, batch_sizes: Sequence[int], image_size: int | None = None) -> None:
        """Record CUDA graphs of the fused forward, which later calls replay: no launch costs, the same results.

        A batch runs on the graph of the smallest captured size that holds it and is less than twice as large; other
        batches, images of another size and `forward_uint8` are launched kernel by kernel as before. Graphs are recorded
        again when weights were edited, dropped for training, and released, for good, when the model is moved or cast
        (`.to()`), copied or pickled, or by `capture([])`. Inside a CUDA graph that somebody else captures the kernels
        are launched into that one, which does not see later edits of weights.

        Args:
            batch_sizes: one graph each; they share their memory.
            image_size: height and width of the images, in pixels. Default: the config's; others are for calls with
                `interpolate_pos_encoding=True`.

        Raises:
            ValueError: a batch size or the image size is not a positive integer.
            RuntimeError: the model is not on a CUDA device, or its fused forward does not apply.
        """
        image_size = self.config.image_size if image_size is None else image_size
        for name, value in (("image_size", image_size), *(("batch_sizes", size) for size in batch_sizes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected positive integers, got {value!r}")
        self._to_capture = self._graphs = None
        if not batch_sizes:
            return
        with torch.no_grad():
            if reason := self.why_not(self._example(image_size)[None]):
                raise RuntimeError(f"capture: the fused forward does not apply: {reason}")
            derived = self._current()
            self._first_contact(derived, self._example(image_size).expand(max(batch_sizes), -1, -1, -1))
            self._record(derived, tuple(batch_sizes), image_size)
            self._to_capture = tuple(batch_sizes), image_size

    def tune(
        self, batch_sizes: Sequence[int] = (1, 8, 64), *, budget: float = 900.0, force: bool = False
    ) -> "Report":
        """Measure on this GPU how each of the model's operations runs fastest, and use that from now on.

        Every kernel configuration and every vendor route is verified and timed in a process of its own; the results
        stay in a cache file (`siglip_fast.selection`) that later processes read. What it holds already is not measured
        again unless `force`. The same as `siglip-fast tune`.

        Args:
            batch_sizes: images a forward. Batches up to four times larger or smaller run as the nearest of these.
            budget: seconds; what is not measured by then stays as it was.

        Raises:
            ValueError: a batch size is not a positive integer.
            RuntimeError: the Triton kernels do not run on the model's device.
        """
        from .tuning import tune

        weight = self._tower.embeddings.patch_embedding.weight
        try:
            return tune(self.config, weight.dtype, batch_sizes, weight.device, budget=budget, force=force)
        finally:
            self._drop()  # the next forward reads the cache

    def why_not(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs) -> str | None:
        """Every reason, joined by "; ", for which `forward(...)` would run the stock code here and now, or None.

        It reads the weights as the fused forward would, so the first call takes that forward's time to derive them.
        Under torch.export the stock code is traced in any case.
        """
        reasons = [*self._call_reasons(pixel_values, kwargs)]
        if _NOT_DERIVED not in reasons:
            reasons.append(self._current().reason(owner=self))
        return "; ".join(filter(None, reasons)) or None

    def backend_for(self, device: torch.device | str) -> str | None:
        """The backend that runs for tensors on `device`: "triton", "cpu", "torch", or None where there is none."""
        return backend_for(self.backend, torch.device(device))[0]

    def derived_bytes(self) -> int:
        """Memory that the derived weights take beside the parameters, in bytes; 0 before the first fused forward."""
        return self._derived.memory() if self._derived else 0

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers 5 renames the keys of older checkpoints only for classes that it takes for its own; without
        # that, a composite model around this tower loads them as random weights.
        return cls is not SiglipVisionModel and super().is_custom_code()

    @property
    def _tower(self) -> nn.Module:
        return getattr(self, "vision_model", self)  # nested until transformers 5.6

    def _patch_weight(self) -> Tensor | None:
        # None where the module was replaced by one that has no such parameter
        return self._tower.embeddings.patch_embedding._parameters.get("weight")

    def _current(self) -> Derived:
        derived = self._derived  # once: another thread may drop it
        weight = self._patch_weight()
        backend = (self.backend_for(weight.device) if weight is not None else None) or "torch"
        if derived is None or derived.ops.backend != backend or not derived.source.is_unchanged():
            derived = self._derived = None  # the old copies go before the new ones are made
            derived = self._derived = Derived(self._tower, backend)
        return derived

    def _fused(
        self,
        derived: Derived,
        pixel_values: Tensor,
        interpolate: bool,
        normalize: Normalization | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs, on the operations; pixel_values are uint8 where they have yet to be normalised."""
        if derived.is_new:
            self._first_contact(derived, pixel_values)
        if normalize:
            position = self._position(pixel_values, interpolate)
            return forward(derived.ops, derived.for_uint8(normalize), pixel_values, position)
        graphs = self._graphs_or_none(derived)
        size = graphs and graphs.batch_size_for(pixel_values)
        if size and (interpolate or not self._must_interpolate(*pixel_values.shape[2:])):
            return graphs.replay(size, pixel_values)
        position = self._position(pixel_values, interpolate)
        if pixel_values.dtype not in DTYPES:
            pixel_values = pixel_values.to(position.dtype)
        return forward(derived.ops, derived.weights, pixel_values, position)

    def _first_contact(self, derived: Derived, pixel_values: Tensor) -> None:
        if derived.ops.backend != "triton" or is_capturing(pixel_values):
            return
        derived.is_new = False
        if selection.mode() == "auto":
            from .tuning import first_contact

            weight = self._patch_weight()
            tokens = math.prod(size // weight.shape[-1] for size in pixel_values.shape[2:])
            first_contact(self.config, weight.dtype, len(pixel_values), tokens, weight.device)

    def _folds(self, derived: Derived, normalize: Normalization) -> bool:
        weight = self._patch_weight()
        if not derived.ops.reads_uint8 or not normalize.folds(weight.dtype):
            return False
        return derived.has_uint8(normalize) or not is_capturing(weight)  # nothing is folded inside a capture

    def _graphs_or_none(self, derived: Derived) -> Graphs | None:
        """Those made from `derived`, recorded again if need be; None if there are to be none, or no longer can."""
        recorded, to_capture = self._graphs, self._to_capture
        if to_capture is None or is_capturing(derived.weights.patch.weight):
            return None
        if recorded is not None and recorded[0] is derived:
            return recorded[1]
        try:
            return self._record(derived, *to_capture)
        except RuntimeError as error:  # out of memory, say: launched kernel by kernel it may do
            self._to_capture = self._graphs = None
            logger.warning("recording CUDA graphs again failed, there are none any more: %s", error)
            return None

    def _record(self, derived: Derived, batch_sizes: tuple[int, ...], image_size: int) -> Graphs:
        with RECORDING:
            recorded = self._graphs
            if recorded is None or recorded[0] is not derived:  # else another thread was faster
                recorded = self._graphs = None  # their memory goes before new ones are made
                image = self._example(image_size)
                position = self._position(image[None], self._must_interpolate(image_size, image_size))
                graphs = Graphs(
                    lambda pixels: forward(derived.ops, derived.weights, pixels, position), batch_sizes, image
                )
                recorded = self._graphs = derived, graphs
            return recorded[1]

    def _example(self, image_size: int) -> Tensor:
        """An image `[C, H, W]` as the model takes it."""
        weight = self._tower.embeddings.patch_embedding.weight
        return weight.new_zeros((weight.shape[1], image_size, image_size))

    def _must_interpolate(self, height: int, width: int) -> bool:
        embeddings = self._tower.embeddings
        p = embeddings.patch_embedding.weight.shape[-1]
        return (height // p) * (width // p) != len(embeddings.position_embedding.weight)

    def _is_derived(self) -> bool:
        derived = self._derived
        return derived is not None and derived.weights is not None and derived.source.is_unchanged()

    def _call_reasons(self, pixel_values: Tensor, kwargs: dict) -> Iterator[str]:
        """The reasons that lie in the call and its circumstances, not in the tower."""
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: expected a torch.Tensor, got {type(pixel_values).__name__}")
        if torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            yield _GRADIENTS
        if getattr(self, "_is_replica", False):
            yield "this is a replica of torch.nn.DataParallel"
        if type(pixel_values) not in (Tensor, nn.Parameter, nn.Buffer):
            yield f"pixel_values are a {type(pixel_values).__name__}, not a plain tensor"
        elif pixel_values.ndim > 0 and pixel_values.shape[0] == 0:
            yield "the batch is empty"
        if reason := _mode_reason(pixel_values.device):
            yield reason
        yield from self._request_reasons(kwargs)
        weight = self._patch_weight()
        if weight is not None and pixel_values.device != weight.device:
            yield f"pixel_values are on {pixel_values.device}, the parameters on {weight.device}"
        elif reason := _backend_reason(self.backend, pixel_values.device):
            yield reason
        elif is_capturing(pixel_values) and not self._is_derived():
            yield _NOT_DERIVED

    def _request_reasons(self, kwargs: dict) -> Iterator[str]:
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                yield f"{name} was asked for"
        extra = [name for name, value in kwargs.items() if name not in _OWN_KWARGS and value is not None]
        if extra:
            yield f"the stock attention takes the keyword arguments {', '.join(extra)}"
        if kwargs.get("return_dict", True) is None and self.config.return_dict is False:
            yield "return_dict is None, which means different things to different versions of transformers"
        attentions = [layer._modules.get("self_attn") for layer in self._tower.encoder.layers]
        for name in sorted({m.config._attn_implementation for m in attentions if hasattr(m, "config")}):
            if name not in _EXACT_ATTENTION:
                yield f"attention implementation {name!r} was asked for"
            elif not _is_transformers_own(ALL_ATTENTION_FUNCTIONS.get(name)):
                yield f"attention implementation {name!r} is not transformers' own"
        if any(m is not None and m.training and getattr(m, "dropout", 0) for m in attentions):
            yield "attention dropout is active"

    def _position(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        """The position embedding `[N, D]` for these images, whose shape it checks."""
        embeddings = self._tower.embeddings
        D, C, p, _ = embeddings.patch_embedding.weight.shape
        if pixel_values.ndim != 4 or pixel_values.shape[1] != C:
            raise ValueError(
                f"pixel_values: expected shape [batch, {C}, height, width], got {list(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        tokens = (height // p) * (width // p)
        position = embeddings.position_embedding.weight
        if tokens == 0:
            raise ValueError(
                f"pixel_values: expected at least one patch of {p}×{p} pixels, got {height}×{width}"
            )
        if interpolate:
            return embeddings.interpolate_pos_encoding(
                position.new_empty(()).expand(1, tokens, D), height, width
            )[0]
        if tokens != len(position):
            raise ValueError(
                f"pixel_values: {height}×{width} pixels are {tokens} patches of {p}×{p}, but the model has "
                f"{len(position)} positions; expected images of {self.config.image_size}×{self.config.image_size} "
                "or interpolate_pos_encoding=True"
            )
        return position

    def train(self, mode: bool = True) -> "SiglipVisionModel":
        if mode != self.training:
            self._drop()  # training needs the memory, and is about to change the weights
        return super().train(mode)

    def _apply(self, fn: Callable, *args, **kwargs) -> "SiglipVisionModel":
        self._drop()  # moved or cast: do not keep the old copies until the next forward
        self._to_capture = None
        return super()._apply(fn, *args, **kwargs)

    def _drop(self) -> None:
        self._derived = self._graphs = None
        self._handle.forget()

    def __getstate__(self) -> dict:
        # copies and pickles make their own
        return self.__dict__ | dict.fromkeys(("_derived", "_graphs", "_to_capture", "_handle"))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._handle = traced.Handle(self, SiglipVisionModel.forward)


_GRADIENTS = "gradients are needed (use torch.no_grad or torch.inference_mode for inference)"
_NOT_DERIVED = "a CUDA graph is being captured before the weights were derived (run one forward before)"
_OWN_KWARGS = ("return_dict", "output_attentions", "output_hidden_states")
# Names of implementations of the same softmax attention, not of something that a caller could observe
_EXACT_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


# These three ask what torch.compile cannot trace. It calls them as it traces, and what they answer is part of the graph.
@torch.compiler.assume_constant_result
def _mode_reason(device: torch.device) -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return "autocast is active"
    if torch.jit.is_tracing() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return "the operations are traced or intercepted (torch.jit.trace, make_fx, a TorchDispatchMode)"
    return None


@torch.compiler.assume_constant_result
def _backend_reason(backend: str, device: torch.device) -> str | None:
    return backend_for(backend, device)[1]


@torch.compiler.assume_constant_result
def _log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("running the stock SiglipVisionModel forward: %s", reason)


_logged: set[str] = set()


def _is_transformers_own(attention: Callable | None) -> bool:
    return getattr(attention, "__module__", "").startswith("transformers.integrations.")
