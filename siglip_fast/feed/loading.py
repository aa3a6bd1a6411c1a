"""From command-line arguments to a device, a model and its image processor; what is wrong is told in one line."""

import os
import sys
from argparse import Namespace
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import SiglipVisionConfig

from ..errors import UserError, first_line
from ..models.siglip import SiglipVisionModel
from ..models.variants import load_config


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the one that there is."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device


def load_model(args: Namespace, device: torch.device, dtype: torch.dtype) -> SiglipVisionModel:
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
            model = SiglipVisionModel(config, **settings)
        model.backend_for(device)
    except (ValueError, RuntimeError) as error:  # unknown backend; a backend that cannot run here
        raise UserError(first_line(error)) from error
    return model.eval().to(device, dtype)


def _from_pretrained(name: str, config: SiglipVisionConfig, **settings: Any) -> SiglipVisionModel:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the whole text tower as "unexpected"
    try:
        model, report = SiglipVisionModel.from_pretrained(
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


def load_processor(model: str | None, image_size: int) -> Any:
    """Hugging Face's image processor on Pillow, as the model's files configure it. Raises UserError where it cannot
    be loaded, is of another kind, or makes images of another size than the model's."""
    # Transformers 5 gave the plain name to the one that needs torchvision.
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    files = [os.path.join(model or "", f"{name}.json") for name in ("preprocessor_config", "processor_config")]
    if model and os.path.isdir(model) and not any(map(os.path.exists, files)):
        print(f"siglip-fast: {model} has no preprocessor_config.json: using SigLIP's defaults", file=sys.stderr)
        model = None
    if model is None:
        settings = {"size": {"height": image_size, "width": image_size}}
    else:
        try:
            settings, _ = kind.get_image_processor_dict(model)
        except Exception as error:
            raise UserError(f"cannot load the image processor of {model}: {first_line(error)}") from error
    name = settings.get("image_processor_type", "SiglipImageProcessor")
    if name.removesuffix("Fast").removesuffix("Pil") != "SiglipImageProcessor":
        raise UserError(f"{model} wants the image processor {name}, not SigLIP's")
    processor = kind.from_dict(settings)
    made = list(pixel_values(processor, Image.new("RGB", (8, 9))).shape[1:])
    if made != [image_size, image_size]:
        raise UserError(f"{model}: its image processor makes {made} pixels, the model takes {image_size}²")
    return processor


def pixel_values(processor: Any, image: Image.Image) -> torch.Tensor:
    """One RGB image as the model takes it, `[3, height, width]`."""
    # The format is told because an image 1 or 3 pixels high would be taken for one with its channels first.
    return processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]


def route(model: SiglipVisionModel, pixel_values: torch.Tensor) -> str:
    """Which code runs for `pixel_values`, and why if it is the stock code. Call it as the model is called."""
    if reason := model.why_not(pixel_values):
        return f"stock transformers, because {reason}"
    return f"backend {model.backend_for(pixel_values.device)}" + ", batch invariant" * model.batch_invariant
