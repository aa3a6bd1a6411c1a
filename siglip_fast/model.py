"""The drop-in: `transformers.SiglipVisionModel` with a fused inference forward."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import utils
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from . import selection, traced
from .anatomy import of_transformers
from .backends.select import is_capturing
from .forward import forward
from .fused import Fused, asked_for, attention_reasons, in_asked_form, keyword_reasons
from .graphs import RECORDING, Graphs
from .ops import DTYPES
from .uint8 import Normalization, check_images, normalization
from .weights import Derived

if TYPE_CHECKING:  # tuning imports the kernels, and they Triton
    from .tuning import Report

logger = logging.getLogger("siglip_fast")

# Newer versions of transformers take indices too, of the only hidden states to return.
_SELECTS_HIDDEN_STATES = hasattr(getattr(utils, "output_capturing", None), "selected_hidden_states")


class SiglipTower(Fused):
    """What makes a SigLIP vision tower of transformers fast: mixed into the stock class, before it."""

    # Of the class, for models that were pickled before there were any
    _to_capture: tuple[tuple[int, ...], int] | None = None  # batch sizes, image size
    _graphs: tuple[Derived, Graphs] | None = None  # made from those derived weights
    returns_hidden_states = True  # whether stock's forward does, when asked

    def become_fast(self, backend: str | None = None, strict: bool = False) -> None:
        super().become_fast(backend, strict)
        self._handle = traced.Handle(self, SiglipTower.forward)

    def forget_fast(self) -> None:
        super().forget_fast()
        for name in ("_to_capture", "_graphs", "_handle"):
            vars(self).pop(name, None)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, C, H, W]` → `last_hidden_state [B, N, D]` and `pooler_output [B, D]` (None without head).

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and
        after each, before the last LayerNorm. Keyword arguments, dtypes and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            ValueError: pixel_values have the wrong rank or channels, or a size that the position embedding does not
                fit and `interpolate_pos_encoding` was not asked for.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        derived, reason = self._route(pixel_values, interpolate_pos_encoding, **kwargs)
        if reason is not None:
            self._delegate(reason)
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        if compiling:
            return self._output(*traced.forward(self, pixel_values, interpolate_pos_encoding), None, kwargs)
        return self._fused(derived, pixel_values, interpolate_pos_encoding, kwargs)

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
        hooked = hooked or type(self).forward is not SiglipTower.forward
        if torch.compiler.is_compiling() or hooked:
            return self(normalize(images), interpolate_pos_encoding, **kwargs)
        derived, reason = self._route(images, interpolate_pos_encoding, **kwargs)
        if reason is not None or not self._folds(derived, normalize):
            return self(normalize(images), interpolate_pos_encoding, **kwargs)
        return self._fused(derived, images, interpolate_pos_encoding, kwargs, normalize)

    def _route(self, pixel_values: Tensor, *args, **kwargs) -> tuple[Derived | None, str | None]:
        """As of all towers; where torch.compile traces, no weights are derived."""
        if not torch.compiler.is_compiling():
            return super()._route(pixel_values, *args, **kwargs)
        reason = next(self._call_reasons(pixel_values, *args, **kwargs), None)
        return None, reason or traced.tower_reason(self._handle.tensor)

    def _output(
        self,
        last_hidden_state: Tensor,
        pooler_output: Tensor | None,
        hidden_states: tuple[Tensor | None, ...] | None,
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        output = BaseModelOutputWithPooling(last_hidden_state, pooler_output, hidden_states)
        return in_asked_form(output, self.config, kwargs)

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
            self.forget_derived()  # the next forward reads the cache

    @property
    def _tower(self) -> nn.Module:
        return getattr(self, "vision_model", self)  # nested until transformers 5.6

    def _fused(
        self,
        derived: Derived,
        pixel_values: Tensor,
        interpolate: bool,
        kwargs: dict[str, Any],
        normalize: Normalization | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """The output, on the operations; pixel_values are uint8 where they have yet to be normalised."""
        hidden_states = None
        if asked := asked_for("output_hidden_states", self.config, kwargs):
            hidden_states = HiddenStates(asked, self.config.num_hidden_layers + 1)
        with torch.no_grad():
            outputs = self._run(derived, pixel_values, interpolate, hidden_states, normalize)
        return self._output(*outputs, hidden_states and tuple(hidden_states.kept), kwargs)

    def _run(
        self,
        derived: Derived,
        pixel_values: Tensor,
        interpolate: bool,
        hidden_states: "HiddenStates | None",
        normalize: Normalization | None,
    ) -> tuple[Tensor, Tensor | None]:
        collect = hidden_states and hidden_states.collect
        if derived.is_new:
            self._first_contact(derived, pixel_values)
        if normalize:
            position = self._position(pixel_values, interpolate)
            return forward(derived.ops, derived.for_uint8(normalize), pixel_values, position, collect)
        graphs = self._graphs_or_none(derived) if hidden_states is None else None
        size = graphs and graphs.batch_size_for(pixel_values)
        if size and (interpolate or not self._must_interpolate(*pixel_values.shape[2:])):
            return graphs.replay(size, pixel_values)
        position = self._position(pixel_values, interpolate)
        if pixel_values.dtype not in DTYPES:
            pixel_values = pixel_values.to(position.dtype)
        return forward(derived.ops, derived.weights, pixel_values, position, collect)

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

    def _request_reasons(self, interpolate_pos_encoding: bool = False, **kwargs) -> Iterator[str]:
        # ModernVBERT passes a patch_attention_mask, which no attention of transformers reads
        yield from keyword_reasons(self.config, kwargs, ignored=("patch_attention_mask",))
        if asked_for("output_hidden_states", self.config, kwargs):
            if not self.returns_hidden_states or torch.compiler.is_compiling():
                yield "output_hidden_states was asked for"
            elif getattr(self.config, "tie_last_hidden_states", None):
                yield "the config ties the last of the hidden states to last_hidden_state"
        yield from attention_reasons(self._tower)

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

    def _apply(self, fn: Callable, *args, **kwargs) -> "SiglipTower":
        self._to_capture = None
        return super()._apply(fn, *args, **kwargs)

    def forget_derived(self) -> None:
        super().forget_derived()
        self._graphs = None
        self._handle.forget()

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles make their own
        return super().__getstate__() | dict.fromkeys(("_graphs", "_to_capture", "_handle"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = traced.Handle(self, SiglipTower.forward)


class SiglipVisionModel(SiglipTower, transformers.SiglipVisionModel):
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

    anatomy = of_transformers(
        modeling_siglip, "Siglip", tower_class=getattr(modeling_siglip, "SiglipVisionTransformer", None)
    )

    def __init__(self, config: SiglipVisionConfig, *, backend: str | None = None, strict: bool = False):
        super().__init__(config)
        self.become_fast(backend, strict)


if hasattr(modeling_siglip, "SiglipVisionTransformer"):

    class SiglipVisionTransformer(SiglipTower, modeling_siglip.SiglipVisionTransformer):
        """The tower of SiglipModel and SiglipForImageClassification until transformers 5.6; see `siglip_fast.swap`."""

        anatomy = of_transformers(modeling_siglip, "Siglip")
        returns_hidden_states = False  # the model around it collects them


class HiddenStates:
    """The residual stream as a forward hands it out: `kept` has L + 1 entries, None where it was not asked for."""

    def __init__(self, asked: bool | int | Sequence[int], count: int):
        """`asked` as output_hidden_states; from `count` negative indices are counted."""
        self.kept: list[Tensor | None] = []
        self._indices: set[int] | None = None  # all
        if _SELECTS_HIDDEN_STATES and not isinstance(asked, bool):
            indices = [asked] if isinstance(asked, int) else asked
            self._indices = {i % count for i in indices if -count <= i < count}

    def collect(self, hidden_states: Tensor) -> None:
        is_kept = self._indices is None or len(self.kept) in self._indices
        self.kept.append(hidden_states if is_kept else None)
