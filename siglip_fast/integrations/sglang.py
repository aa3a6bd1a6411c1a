"""SGLang: the plugin that makes every stock SigLIP tower of a loaded model fast (entry point sglang.srt.plugins).

Written against SGLang 0.5.23. It hooks the two functions that return a loaded model, whatever the architecture, and
does not replace the class in the modules that name it: a REPLACE hook follows the class into every loaded module,
transformers' own included, and imports each of those models in every process of the server.

SGLang's own tower (sglang.srt.models.siglip: gemma3_mm, pi0.5) is another class, on its own parallel layers, and is
left alone.
"""

import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import siglip_fast

from ..errors import typed_line
from .plugin import plugin

logger = logging.getLogger("siglip_fast")

LOADERS = (
    "sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver",
    "sglang.srt.model_loader.get_model",  # the encoder of a disaggregated server
)
# They write through `Tensor.data`, which torch does not count as an edit.
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
UPDATES = (
    f"{_UPDATER}.update_weights_from_disk",
    f"{_UPDATER}.load_weights_from_distributed",
    f"{_UPDATER}.update_weights_from_tensor",
    f"{_UPDATER}.update_weights_from_ipc",
)


@plugin("SGLang")
def register() -> None:
    """Registers the hooks; SGLang applies them when all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in LOADERS + UPDATES:  # all are there, or nothing is registered
        if not callable(pkgutil.resolve_name(target)):
            raise TypeError(f"{target} is not callable")
    pkgutil.resolve_name(f"{_UPDATER}.get_model")
    for target in LOADERS:
        HookRegistry.register(target, after_load, HookType.AFTER)
    for target in UPDATES:
        HookRegistry.register(target, around_update, HookType.AROUND)


def after_load(loaded: Any, *args, **kwargs) -> None:
    """`loaded` is the model, or what holds it as `.model`. Its towers change in place, so nothing is returned."""
    try:
        model = loaded if hasattr(loaded, "modules") else loaded.model
        if siglip_fast.towers(model):
            siglip_fast.apply_to(model)
            logger.warning(
                "SGLang: %s", "; ".join(map(repr, siglip_fast.towers(model)))
            )  # it shows no other logger's info
    except Exception as error:
        logger.warning("SGLang's model stays as it is: %s", typed_line(error))


def around_update(update: Callable, updater: Any, *args, **kwargs) -> Any:
    """Lets the fast towers forget what they derived from the old weights, also where the update failed half-way."""
    try:
        return update(updater, *args, **kwargs)
    finally:
        for tower in siglip_fast.towers(updater.get_model()):
            if tower.fast:
                tower.module.forget_derived()
