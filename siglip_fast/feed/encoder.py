"""From images to embeddings: the model with its image processor, and batches through it."""

import copy
import functools
import itertools
import json
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import PIL
import torch
import transformers

import siglip_fast

from ..errors import UserError, first_line
from ..models.base import Fused
from ..models.variants import VisionConfig
from .kinds import Inputs, kind_of
from .loading import load_model, load_processor, pick_devices, route
from .meter import Meter
from .prepare import Prepare
from .transfer import Finish, OnCpu, OnCuda
from .workers import Prepared


def prepare_of(args: Namespace, config: VisionConfig) -> Prepare:
    """What makes the model's inputs of an image. Raises UserError as `load_processor` and `Prepare` do."""
    prepare = Prepare(load_processor(args.model, kind_of(config)), args.decoder, args.draft)
    if measured := prepare.milliseconds:
        each = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in measured.items())
        print(f"siglip-fast: decoder {prepare.decoder}: of {each} ms a megapixel here", file=sys.stderr)
    return prepare


class Encoder:
    """The model and image processor that the arguments ask for, from an image to its embedding; on several devices batches
    take turns."""

    def __init__(self, args: Namespace):
        self.devices = pick_devices(args.device)
        dtype = args.dtype or ("bfloat16" if self.devices[0].type == "cuda" else "float32")
        self.model = load_model(args, self.devices[0], getattr(torch, dtype))
        self._models = [self.model, *(copy.deepcopy(self.model).to(device) for device in self.devices[1:])]
        config = self.model.config
        if args.pool == "head" and not getattr(config, "vision_use_head", True):
            raise UserError(f"{args.model} has no pooling head: use --pool mean")
        self.prepare = prepare_of(args, config)
        self._pool, self._normalize = args.pool, args.normalize
        self.route = ""  # known from the first batch on
        versions = {module.__name__: module.__version__ for module in (siglip_fast, torch, transformers, PIL)}
        self.metadata = {
            "model": args.model or args.random_weights,
            "random_weights": f"seed {args.seed}" if args.random_weights else "no",
            "revision": getattr(config, "_commit_hash", None) or "",
            "dtype": dtype,
            "pool": args.pool,
            "normalized": "yes" if args.normalize else "no",
            "decoder": self.prepare.decoder + ", draft" * args.draft,
            "versions": json.dumps(versions),
        }

    def embeddings(
        self,
        prepared: Iterable[Prepared],
        batch_size: int,
        skip: Callable[[Any, str], None],
        meter: Meter | None = None,
    ) -> Iterator[tuple[list[Any], np.ndarray]]:
        """A batch at a time, the names of images and their embeddings, float32 [batch, hidden_size], in order.

        `prepared` are names and what `self.prepare` made of the images, or why it made nothing. Those that have no embedding
        are told to `skip(name, reason)`. A batch is given out when each device has begun another. `meter` is told the work.
        """

        def usable() -> Iterator[tuple[Any, Inputs]]:
            for name, result in prepared:
                if isinstance(result, str):
                    skip(name, result)
                else:
                    yield name, result

        meter = meter or Meter()
        way = OnCuda if self.devices[0].type == "cuda" else OnCpu
        meter.devices = len(self.devices) if way is OnCuda else 1
        turns = itertools.cycle(
            (way(device, meter), functools.partial(self, model=model))
            for device, model in zip(self.devices, self._models, strict=True)
        )

        def finished(names: list[Any], finish: Finish) -> tuple[list[Any], np.ndarray]:
            rows = finish().numpy()
            meter.embedded += len(names)
            finite = np.isfinite(rows).all(axis=1)
            for i in np.flatnonzero(~finite):
                skip(names[i], "its embedding is not finite; try --dtype float32")
            return [names[i] for i in np.flatnonzero(finite)], rows[finite]

        begun, good = deque(), usable()
        while batch := list(itertools.islice(good, batch_size)):
            names, images = zip(*batch, strict=True)
            device, model = next(turns)
            begun.append((names, device.start(images, model)))
            if len(begun) > len(self.devices):
                yield finished(*begun.popleft())
        while begun:
            yield finished(*begun.popleft())

    def __call__(self, inputs: Inputs, model: Fused | None = None) -> torch.Tensor:
        """Of a batch, float32 [batch, hidden_size] on the model's device; the first's, if none is given."""
        model = model or self.model
        with torch.inference_mode():
            recipe = self.prepare.recipe
            inputs = {name: values.to(model.device) for name, values in inputs.items()}
            inputs = recipe.ready(inputs) if recipe else inputs
            if not self.route:
                self.route = self.metadata["backend"] = route(model, inputs)
            try:
                output = recipe.run(model, inputs) if recipe else model(**inputs)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{first_line(error)} Try a smaller --batch-size.") from error
            states = output.pooler_output if self._pool == "head" else output.last_hidden_state
            at_once = 1 if model.batch_invariant else len(states)
            mask = inputs.get("pixel_attention_mask")
            masks = itertools.repeat(None) if mask is None else mask.split(at_once)
            parts = zip(states.split(at_once), masks, strict=False)
            return torch.cat([self._embedding(*part) for part in parts])

    def _embedding(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Of pooled images `[B, D]`, or of their tokens `[B, N, D]`, of which those count where `mask [B, N]` is not zero."""
        embedding = states.float()
        if self._pool == "mean" and mask is None:
            embedding = embedding.mean(dim=1)
        elif self._pool == "mean":
            embedding = embedding.masked_fill(mask[..., None] == 0, 0).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(embedding, dim=-1) if self._normalize else embedding
