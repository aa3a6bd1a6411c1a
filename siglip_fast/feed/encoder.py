"""From images to embeddings: the model with its image processor, and batches through it."""

import contextlib
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import PIL
import torch
import transformers

import siglip_fast

from ..errors import UserError, first_line
from .images import decode_ahead
from .kinds import Inputs, batch_of, kind_of
from .loading import load_model, load_processor, pick_device, route
from .prepare import Prepare

Named = tuple[Any, str | bytes]  # an image's name, and its file or encoded bytes


class Encoder:
    """The model and image processor that the arguments ask for, from an image to its embedding."""

    def __init__(self, args: Namespace):
        self.device = pick_device(args.device)
        dtype = args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.model = load_model(args, self.device, getattr(torch, dtype))
        config = self.model.config
        if args.pool == "head" and not getattr(config, "vision_use_head", True):
            raise UserError(f"{args.model} has no pooling head: use --pool mean")
        self._prepare = Prepare(load_processor(args.model, kind_of(config)), args.decoder, args.draft)
        if measured := self._prepare.milliseconds:
            each = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in measured.items())
            print(f"siglip-fast: decoder {self._prepare.decoder}: of {each} ms a megapixel here", file=sys.stderr)
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
            "decoder": self._prepare.decoder + ", draft" * args.draft,
            "versions": json.dumps(versions),
        }

    def embeddings(
        self, images: Iterable[Named], batch_size: int, workers: int, skip: Callable[[Any, str], None]
    ) -> Iterator[tuple[list[Any], np.ndarray]]:
        """A batch at a time, the names of images and their embeddings, float32 [batch, hidden_size], in order.

        Those that have no embedding are told to `skip(name, reason)`.
        """

        def usable(decoded: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Inputs]]:
            for (name, _), result in decoded:
                if isinstance(result, Exception):
                    skip(name, first_line(result))
                else:
                    yield name, result

        def decode(image: Named) -> Inputs:
            return self._prepare(image[1])

        with contextlib.closing(decode_ahead(images, decode, workers, ahead=batch_size)) as decoded:
            good = usable(decoded)
            while batch := list(itertools.islice(good, batch_size)):
                names, inputs = zip(*batch, strict=True)
                rows = self(batch_of(inputs))
                finite = np.isfinite(rows).all(axis=1)
                for i in np.flatnonzero(~finite):
                    skip(names[i], "its embedding is not finite; try --dtype float32")
                yield [names[i] for i in np.flatnonzero(finite)], rows[finite]

    def __call__(self, inputs: Inputs) -> np.ndarray:
        with torch.inference_mode():
            recipe = self._prepare.recipe
            inputs = {name: values.to(self.device) for name, values in inputs.items()}
            inputs = recipe.ready(inputs) if recipe else inputs
            if not self.route:
                self.route = self.metadata["backend"] = route(self.model, inputs)
            try:
                output = recipe.run(self.model, inputs) if recipe else self.model(**inputs)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{first_line(error)} Try a smaller --batch-size.") from error
            states = output.pooler_output if self._pool == "head" else output.last_hidden_state
            at_once = 1 if self.model.batch_invariant else len(states)
            mask = inputs.get("pixel_attention_mask")
            masks = itertools.repeat(None) if mask is None else mask.split(at_once)
            parts = zip(states.split(at_once), masks, strict=False)
            return torch.cat([self._embedding(*part) for part in parts]).cpu().numpy()

    def _embedding(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Of pooled images `[B, D]`, or of their tokens `[B, N, D]`, of which those count where `mask [B, N]` is not zero."""
        embedding = states.float()
        if self._pool == "mean" and mask is None:
            embedding = embedding.mean(dim=1)
        elif self._pool == "mean":
            embedding = embedding.masked_fill(mask[..., None] == 0, 0).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(embedding, dim=-1) if self._normalize else embedding
