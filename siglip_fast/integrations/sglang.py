"""SGLang: the plugin that makes every SigLIP tower of a loaded model fast, transformers' and SGLang's own (entry point
sglang.srt.plugins).

Written against SGLang 0.5.23. It hooks the two functions that return a loaded model, whatever the architecture, and changes
the towers in it by `apply_to`. It does not replace classes: a REPLACE hook follows a class into every loaded module,
transformers' own included, and imports the models that are named in every process of the server. A loaded tower, moreover,
has its weights as they are going to be (whole or sharded, quantized, packed for AMX), so that one which cannot run fused
never changes its class.
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
    from ..models.server_tower import ServerTower  # it imports torch

    try:
        model = loaded if hasattr(loaded, "modules") else loaded.model
        if siglip_fast.towers(model):
            siglip_fast.apply_to(model)  # which logs what it leaves alone
            # SGLang's own towers say themselves that they run fused, once they did.
            made = [t for t in siglip_fast.towers(model) if t.fast and not isinstance(t.module, ServerTower)]
            if made:
                logger.warning("SGLang: %s", "; ".join(map(repr, made)))  # it shows no other logger's info
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
