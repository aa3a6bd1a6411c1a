"""From command-line arguments to a device, a model and its image processor; what is wrong is told in one line."""

import os
import sys
from argparse import Namespace
from typing import Any

import torch
import transformers

from ..errors import UserError, first_line
from ..models.base import Fused
from ..models.variants import VisionConfig, load_config
from .kinds import FixedSize, Inputs, NaFlex, kind_of


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the one that there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device


def pick_devices(names: str | None) -> list[torch.device]:
    """The devices of a list such as "cuda:0,cuda:1", or the one that there is."""
    devices = [pick_device(name) for name in (names or "").split(",")]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"--device {names}: expected devices of one kind")
    return devices


def load_model(args: Namespace, device: torch.device, dtype: torch.dtype) -> Fused:
    """The model of `args.model` or `args.random_weights`, for inference. Raises UserError where there is no such
    model, it is not whole, or the backend cannot run on the device."""
    config = load_config(args)
    settings = {"backend": args.backend, "batch_invariant": args.batch_invariant}
    try:
        if args.model:
            model = _from_pretrained(args.model, config, **settings)
        else:
            warn_of_random_weights(args.random_weights, args.seed)
            torch.manual_seed(args.seed)
            model = kind_of(config).model(config, **settings)
        model.backend_for(device)
    except (ValueError, RuntimeError) as error:  # unknown backend; a backend that cannot run here
        raise UserError(first_line(error)) from error
    return model.eval().to(device, dtype)


def _from_pretrained(name: str, config: VisionConfig, **settings: Any) -> Fused:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the whole text tower as "unexpected"
    try:
        model, report = kind_of(config).model.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their shapes
            **settings,
        )
    except Exception as error:  # a wrong name, no network, a broken file: a type each
        raise UserError(f"cannot load {name}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    for mismatch in sorted(report["mismatched_keys"], key=str):
        key, *shapes = [mismatch] if isinstance(mismatch, str) else mismatch  # transformers 4 tells no shapes
        what = f"{list(shapes[0])}, by the config {list(shapes[1])}" if shapes else "not of the config's shape"
        raise UserError(f"cannot load {name}: {key} is {what}")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name} is no SigLIP vision model: lacks {len(missing)} weights such as {missing[0]}")
    return model


def warn_of_random_weights(variant: str, seed: int) -> None:
    text = f"!!!  RANDOM WEIGHTS: {variant}, seed {seed}, not trained. Its embeddings mean nothing.  !!!"
    print("!" * len(text), text, "!" * len(text), sep="\n", file=sys.stderr)


def load_processor(model: str | None, kind: FixedSize | NaFlex) -> Any:
    """Hugging Face's image processor on Pillow, as the model's files configure it. Raises UserError where it cannot
    be loaded, is of another kind, or makes what the model does not take."""
    # Transformers 5 gave the plain name to the one that needs torchvision.
    on_pillow = getattr(transformers, f"{kind.processor}Pil", None) or getattr(transformers, kind.processor)
    files = [os.path.join(model or "", f"{name}.json") for name in ("preprocessor_config", "processor_config")]
    if model and os.path.isdir(model) and not any(map(os.path.exists, files)):
        print(f"siglip-fast: {model} has no preprocessor_config.json: using SigLIP's defaults", file=sys.stderr)
        model = None
    if model is None:
        settings = kind.settings()
    else:
        try:
            settings, _ = on_pillow.get_image_processor_dict(model)
        except Exception as error:
            raise UserError(f"cannot load the image processor of {model}: {first_line(error)}") from error
    name = settings.get("image_processor_type", kind.processor)
    if name.removesuffix("Fast").removesuffix("Pil") != kind.processor:
        raise UserError(f"{model} wants the image processor {name}, not {kind.processor}")
    processor = on_pillow.from_dict(settings)
    if misfit := kind.misfit(processor):
        raise UserError(f"{model}: its image processor {misfit}")
    return processor


def route(model: Fused, inputs: Inputs) -> str:
    """Which code runs for `inputs`, and why if it is the stock code. Call it as the model is called."""
    if reason := model.why_not(**inputs):
        return f"stock transformers, because {reason}"
    return f"backend {model.backend_for(inputs['pixel_values'].device)}" + ", batch invariant" * model.batch_invariant
