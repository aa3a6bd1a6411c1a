"""Fast towers in models that somebody else builds: `apply_to`, `restore`, `register`, `unregister`.

A tower is swapped by its class. The module stays the same object, with its parameters, hooks and names, so whatever
holds it (a parent, an optimizer, accelerate) need not be told.
"""

import contextlib
import importlib
import logging
import sys
import threading
import types
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import AutoModel

from .base import Fused, checked_backend, checked_batch_invariant, stock_class
from .others import OTHERS
from .projectors import AllImagesAtOnce

logger = logging.getLogger("siglip_fast")

# Stock class → the module here that has the fast one, under the same name
_FAST = {
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "siglip",
    "transformers.models.siglip.modeling_siglip.SiglipVisionTransformer": "siglip",  # until transformers 5.6
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel": "siglip2",
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionTransformer": "siglip2",  # until transformers 5.6
    "transformers.models.idefics2.modeling_idefics2.Idefics2VisionTransformer": "idefics",
    "transformers.models.idefics3.modeling_idefics3.Idefics3VisionTransformer": "idefics",
    "transformers.models.smolvlm.modeling_smolvlm.SmolVLMVisionTransformer": "idefics",
    "transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel": "phi4",
    "transformers.models.granite_docling.modeling_granite_docling.GraniteDoclingVisionModel": "granite_docling",
    "transformers.models.janus.modeling_janus.JanusVisionModel": "janus",
    "transformers.models.minicpm_ocr.modeling_minicpm_ocr.MiniCPMOcrVisionModel": "minicpm",
    "transformers.models.minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6VisionModel": "minicpm",
    "transformers.models.minicpmv4_7.modeling_minicpmv4_7.MiniCPMV4_7VisionModel": "minicpm",
    "transformers.models.molmo2.modeling_molmo2.Molmo2VisionModel": "molmo2",
    "timm.models.vision_transformer.VisionTransformer": "timm",
    "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel": "qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel": "qwen3_vl",
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel": "qwen3_vl",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel": "qwen3_vl",
    "transformers.models.qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionModel": "qwen3_vl",
    "transformers.models.cohere_compass.modeling_cohere_compass.CohereCompassVisionModel": "qwen3_vl",
    "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder": "qwen3_vl",
    "transformers.models.paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionTransformer": "paddleocr_vl",
    "transformers.models.kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel": "kimi_k25",
    "transformers.models.video_llama_3.modeling_video_llama_3.VideoLlama3VisionModel": "video_llama_3",
    "transformers.models.cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeVisionModel": "cosmos3_edge",
    "transformers.models.glm_image.modeling_glm_image.GlmImageVisionModel": "glm_image",
    "transformers.models.hunyuan_vl.modeling_hunyuan_vl.HunYuanVLVisionTransformer": "hunyuan_vl",
    "transformers.models.hy_v4_vl.modeling_hy_v4_vl.HYV4VLVisionModel": "hunyuan_vl",
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel": "qwen2_vl",
    "transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel": "ernie4_5_vl",
    "sglang.srt.models.siglip.SiglipVisionTransformer": "sglang_siglip",
    "sglang.srt.models.siglip2.Siglip2VisionTransformer": "sglang_siglip2",
    "sglang.srt.models.qwen3_vl.Qwen3VLMoeVisionModel": "sglang_qwen3_vl",
}
# What is changed beside a tower: stock's projectors that run image by image
_BESIDE = {"transformers.models.paddleocr_vl.modeling_paddleocr_vl.PaddleOCRProjector": "projectors"}


class Tower(NamedTuple):
    """A vision tower that is SigLIP's, or close to it."""

    name: str  # in the model it was found in, "" for that model itself
    module: nn.Module
    fast: bool
    reason: str | None  # why `apply_to` leaves it alone

    def __repr__(self) -> str:
        state = f"left alone: {self.reason}" if self.reason else "fast" if self.fast else "stock"
        return f"{self.name or '(the model itself)'}: {type(self.module).__name__}, {state}"


class Towers(list[Tower]):
    """Prints a line a tower."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no SigLIP vision tower"


def towers(model: nn.Module) -> Towers:
    """The SigLIP vision towers in `model`: fast ones, stock ones, and those that `apply_to` leaves alone, with the
    reason. Raises TypeError where model is no torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return Towers(_find(model, "", set()))


def apply_to(
    model: nn.Module, *, backend: str | None = None, strict: bool = False, batch_invariant: bool | None = None
) -> nn.Module:
    """Makes the SigLIP vision towers in `model` fast, in place, and returns `model`.

    The parameters stay the very same objects, names in the state dict do not change. What a tower's fused forward does
    not compute it delegates to stock's, as `siglip_fast.SiglipVisionModel` does; its `why_not` tells. Towers that
    cannot be made fast are left alone and named in a log line; `towers` lists them. PaddleOCR-VL's projector, which stock
    runs image by image, takes all images at once from then on (not with `batch_invariant`).

    Args:
        model: a vision tower, or any module around some: of transformers (SiglipModel, PaliGemma, Gemma 3, LLaVA, …),
            timm or open_clip, or one that SGLang has loaded.
        backend, strict, batch_invariant: as in the constructor of `siglip_fast.SiglipVisionModel`; for towers made fast by this call.

    Raises:
        TypeError: model is no torch.nn.Module, or batch_invariant no bool.
        ValueError: there is no such tower in it, or the backend's name is unknown.
    """
    checked_backend(backend)
    checked_batch_invariant(batch_invariant)
    found = towers(model)
    if not found:
        raise ValueError(f"model: expected a SigLIP vision tower in it, found none in this {type(model).__name__}")
    for tower in found:
        if tower.reason and not tower.fast:
            name = f"{tower.name} ({type(tower.module).__name__})" if tower.name else type(tower.module).__name__
            logger.warning("left alone: %s: %s", name, tower.reason)
        elif not tower.fast:
            _set_class(tower.module, _fast_class(type(tower.module)))
            tower.module.become_fast(backend, strict, batch_invariant)
    for module in () if checked_batch_invariant(batch_invariant) else model.modules():
        if home := _BESIDE.get(_path(type(module))):
            _set_class(module, _class_in(home, type(module)))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives the fast towers in `model` their stock classes back, in place, and returns `model`. Raises TypeError
    where model is no torch.nn.Module."""
    for tower in towers(model):
        if tower.fast and not tower.reason:
            tower.module.forget_fast()
            _set_class(tower.module, stock_class(type(tower.module)))
    for module in model.modules():
        if isinstance(module, AllImagesAtOnce):
            _set_class(module, type(module).__bases__[-1])
    return model


def register() -> None:
    """From now on, transformers builds fast towers where it looks a tower's class up.

    That is `AutoModel.from_config` with a SiglipVisionConfig or Siglip2VisionConfig, by which PaliGemma, Gemma 3, the LLaVAs,
    LFM2-VL and others build theirs, with Idefics3's, by which Aria does, or with that of a tower like Qwen3-VL's (transformers
    ≥ 5.6) or VideoLLaMA 3's; and, by its own patch mapping (≥ 5.3), `from_pretrained` and `from_config` of models that name
    the class, such as SiglipModel (≥ 5.6), Kimi K2.5, PaddleOCR-VL, and Qwen3-VL's and Qwen3-Omni's (before). Models built
    before, or by calling a class, stay as they are.

    The patch mapping knows names only: remote code's own class called SiglipVisionModel is replaced, too. And it puts
    classes into transformers' modules while a model is built, so models should be built one after the other.
    """
    from . import paddleocr_vl
    from .siglip import SiglipVisionModel
    from .siglip2 import Siglip2VisionModel

    modules = {home for stock, home in _FAST.items() if stock.startswith("transformers.")}
    modules -= {"siglip", "siglip2", "paddleocr_vl"}
    families = [importlib.import_module(f".{home}", __package__) for home in sorted(modules)]
    by_auto_model = [SiglipVisionModel, Siglip2VisionModel, *(cls for family in families for cls in family.installed())]
    fast = [*by_auto_model, *paddleocr_vl.installed()]  # of which AutoModel builds the module around it
    # Anchored, because the names are taken for patterns: SiglipVisionModelOutput begins so, too.
    patches = {f"^{cls.__name__}$": cls for cls in fast}
    with _lock:
        unregister()
        patching = _monkey_patching()
        by_config = AutoModel._model_mapping._extra_content
        for ours in by_auto_model:
            if ours.config_class in AutoModel._model_mapping:
                before = by_config.get(ours.config_class)
                AutoModel.register(ours.config_class, ours, exist_ok=True)
                _undo.callback(_unmap, by_config, ours, before)
        if patching:
            earlier = patching.get_patch_mapping()
            patching.register_patch_mapping(patches, overwrite=True)
            _undo.callback(_unpatch, patching, patches, earlier)


def unregister() -> None:
    """Undoes `register`, but for what somebody else registered since; without a `register` before, does nothing."""
    with _lock:
        _undo.close()


_undo = contextlib.ExitStack()
_lock = threading.RLock()


def _unmap(by_config: dict[type, type], ours: type, before: type | None) -> None:
    config = ours.config_class
    if by_config.get(config) is not ours:
        return
    if before is None:
        del by_config[config]
    else:
        by_config[config] = before


def _unpatch(patching: types.ModuleType, patches: dict[str, type], earlier: dict[str, type]) -> None:
    now = patching.get_patch_mapping()
    for name in [name for name, fast in patches.items() if now.get(name) is fast]:
        patching.unregister_patch_mapping([name])
        if name in earlier:
            patching.register_patch_mapping({name: earlier[name]})
    # What transformers' patching leaves behind where building a model failed
    stock = {fast: stock_class(fast) for fast in patches.values()}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "transformers"]:
        for name, value in [*vars(module).items()]:
            if isinstance(value, type) and value in stock:
                setattr(module, name, stock[value])


def _monkey_patching() -> types.ModuleType | None:
    """transformers' patch mapping, where it has one that works."""
    try:
        patching = importlib.import_module("transformers.monkey_patching")
    except ImportError:  # transformers before 5.3
        return None
    try:
        patching.register_patch_mapping({"^$": nn.Module}, overwrite=True)  # a pattern without matches
        with patching.apply_patches():
            return patching
    except ImportError as error:  # 5.5 imports torchvision there: each from_pretrained would fail
        logger.warning("register: only for what AutoModel builds; transformers' patch mapping fails: %s", error)
        return None
    finally:
        patching.unregister_patch_mapping(["^$"])


def _find(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[Tower]:
    if module in seen:
        return
    seen.add(module)
    tower = _as_tower(module, name)
    if tower is not None:
        yield tower
        return
    for child_name, child in module.named_children():
        yield from _find(child, f"{name}.{child_name}" if name else child_name, seen)


def _as_tower(module: nn.Module, name: str) -> Tower | None:
    cls = type(module)
    if isinstance(module, Fused):
        is_ours = cls.__module__.startswith(f"{__package__}.")
        return Tower(name, module, True, None if is_ours else f"{cls.__name__} is somebody's subclass of a fast class")
    if fast := _fast_class(cls):
        return Tower(name, module, False, fast.declines(module))
    if reason := OTHERS.get(_path(cls)):
        return Tower(name, module, False, reason)
    for base in cls.__mro__[1:]:
        if _fast_class(base):
            return Tower(name, module, False, f"{cls.__name__} is a subclass of {_path(base)}")
    return None


def _fast_class(stock: type) -> type[Fused] | None:
    home = _FAST.get(_path(stock))
    return home and _class_in(home, stock)


def _class_in(home: str, stock: type) -> type:
    """Ours of that name, of a module here."""
    return getattr(importlib.import_module(f".{home}", __package__), stock.__name__)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _set_class(tower: nn.Module, new: type) -> None:
    old = type(tower)
    tower.__class__ = new
    for name, value in [*vars(tower).items()]:
        # what accelerate's hooks call, or transformers 4.57 left behind: the method of the class that it was; not
        # what somebody wrapped around it
        if isinstance(value, types.MethodType) and value.__self__ is tower and value.__func__ is old.forward:
            setattr(tower, name, types.MethodType(new.forward, tower))
