"""Towers whose images may have any size: their rows are packed, and the forward goes by a plan of the call.

A class of this kind reads the sizes of a call's images, which may be on the device, once (`_read`), and makes of them the
plan (`_pack`), by which the fused forward runs (`siglip_fast.forward.forward_packed`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.select import is_capturing
from ..forward import Packing
from ..ops import Position
from ..running.packing import tile_rows
from .base import Fused
from .outputs import HiddenStates, asked_for
from .reasons import attention_reasons, autocast_dtype, keyword_reasons
from .traced import Traced
from .weights import Derived


class Sized(Fused):
    """What towers have in common, beside what all have, whose forward goes by sizes that it reads from its arguments."""

    returns_hidden_states = True  # whether stock's forward does, when asked
    layers_at: ClassVar[tuple[str, ...]] = ("encoder", "layers")  # the names that lead to the layers, from the tower on
    attention_name: ClassVar[str] = "self_attn"  # in a layer

    def why_not(self, pixel_values: Tensor, *args, **kwargs) -> str | None:
        """As of all towers; also what the sizes of the images speak against, which are read for it."""
        reason = super().why_not(pixel_values, *args, **kwargs)
        sizes = None if reason else self._read(pixel_values, *args, **kwargs)
        return sizes if isinstance(sizes, str) else reason

    def _read(self, pixel_values: Tensor, *args, **kwargs) -> Any:
        """The sizes of the images, or the reason why stock's code has to run on such. It may wait for the device."""
        raise NotImplementedError

    def _route_sizes(self, pixel_values: Tensor, *args, **kwargs) -> tuple[Derived | None, str | None, Any]:
        """As `_route`, and the sizes."""
        derived, reason = self._route(pixel_values, *args, **kwargs)
        sizes = self._read(pixel_values, *args, **kwargs) if reason is None else None
        return (derived, sizes, None) if isinstance(sizes, str) else (derived, reason, sizes)

    def _setting_reasons(self, kwargs: dict[str, Any], known: tuple[str, ...] = ()) -> Iterator[str]:
        """Those that lie in keyword arguments and in the config."""
        yield from keyword_reasons(self.config, kwargs, ignored=known)
        if asked_for("output_hidden_states", self.config, kwargs):
            if not self.returns_hidden_states or torch.compiler.is_compiling():
                yield "output_hidden_states was asked for"
            elif getattr(self.config, "tie_last_hidden_states", None):
                yield "the config ties the last of the hidden states to last_hidden_state"
        yield from attention_reasons(self._tower, self.layers_at, self.attention_name)

    def _tile_rows(self, derived: Derived) -> tuple[int, ...]:
        """Of the tiles that attention's schedule is for."""
        return tile_rows(derived.ops.backend)

    def _hidden_states(self, kwargs: dict[str, Any], layers: int) -> HiddenStates | None:
        """What collects them, where they were asked for."""
        asked = asked_for("output_hidden_states", self.config, kwargs)
        return HiddenStates.asked_for(asked, layers + 1) if asked else None


class Packed(Sized):
    """Those that read the sizes in every call."""

    autocasts: ClassVar[bool] = False  # whether stock's dtypes under torch.autocast are those of the fused forward

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, *args, **kwargs)
        if torch.compiler.is_compiling():
            if not isinstance(self, Traced):
                yield "torch.compile traces"
            return  # what follows it cannot trace; autocast has been looked at
        if is_capturing(pixel_values):
            yield "the sizes of images cannot be read inside a CUDA graph"
        if not self.autocasts and (dtype := autocast_dtype(pixel_values.device)):
            yield f"autocast to {dtype} is active, of which this tower's fused forward has not stock's dtypes"


def together(lengths: Sequence[int], most: int | None) -> list[slice]:
    """Images that are to run together, one after the other: of at most `most` rows, unless one has more; None: all."""
    ends, rows = [0], 0
    for i, length in enumerate(lengths):
        if most and i and rows + length > most:
            ends.append(i)
            rows = 0
        rows += length
    return [slice(*ends) for ends in zip(ends, [*ends[1:], len(lengths)], strict=True)]


def joined(parts: Sequence[Any]) -> Any:
    """What some images gave and what the next ones did, as one: tensors one behind the other, in tuples or lists; or None."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    entries = map(joined, zip(*parts, strict=True))
    return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)


def with_own_positions(packing: Packing) -> Packing:
    """The same, whose table has a row for each row of the call: what a CUDA graph is given, which knows addresses only,
    where the table moves as it gets more sizes."""
    table, index, _ = packing.position
    taken = table.index_select(0, index.view(-1))
    index = torch.arange(len(taken), dtype=torch.int32, device=taken.device)[:, None]
    return packing._replace(position=Position(taken, index))
