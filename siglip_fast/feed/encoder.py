"""From images to embeddings: the model with its image processor, and batches through it."""

import contextlib
import itertools
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import PIL
import torch
import transformers

import siglip_fast

from ..errors import UserError, first_line
from .images import decode_ahead, read_image
from .loading import load_model, load_processor, pick_device, pixel_values, route

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
        self._processor = load_processor(args.model, config.image_size)
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
            "versions": json.dumps(versions),
        }

    def embeddings(
        self, images: Iterable[Named], batch_size: int, workers: int, skip: Callable[[Any, str], None]
    ) -> Iterator[tuple[list[Any], np.ndarray]]:
        """A batch at a time, the names of images and their embeddings, float32 [batch, hidden_size], in order.

        Those that have no embedding are told to `skip(name, reason)`.
        """

        def usable(decoded: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, torch.Tensor]]:
            for (name, _), result in decoded:
                if isinstance(result, Exception):
                    skip(name, first_line(result))
                else:
                    yield name, result

        def decode(image: Named) -> torch.Tensor:
            return pixel_values(self._processor, read_image(image[1]))

        with contextlib.closing(decode_ahead(images, decode, workers, ahead=batch_size)) as decoded:
            good = usable(decoded)
            while batch := list(itertools.islice(good, batch_size)):
                names, pixels = zip(*batch, strict=True)
                rows = self(torch.stack(pixels))
                finite = np.isfinite(rows).all(axis=1)
                for i in np.flatnonzero(~finite):
                    skip(names[i], "its embedding is not finite; try --dtype float32")
                yield [names[i] for i in np.flatnonzero(finite)], rows[finite]

    def __call__(self, pixel_values: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            pixel_values = pixel_values.to(self.device)
            if not self.route:
                self.route = self.metadata["backend"] = route(self.model, pixel_values)
            try:
                output = self.model(pixel_values)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{first_line(error)} Try a smaller --batch-size.") from error
            states = output.pooler_output if self._pool == "head" else output.last_hidden_state
            parts = states.split(1) if self.model.batch_invariant else [states]
            return torch.cat([self._embedding(part) for part in parts]).cpu().numpy()

    def _embedding(self, states: torch.Tensor) -> torch.Tensor:
        """Of pooled images `[B, D]`, or of their tokens `[B, N, D]`."""
        embedding = states.float() if self._pool == "head" else states.float().mean(dim=1)
        return torch.nn.functional.normalize(embedding, dim=-1) if self._normalize else embedding
