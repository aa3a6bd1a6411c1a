"""What a call to a tower of transformers asked for, and its output in that form."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import utils

# Newer versions of transformers take indices too, of the only hidden states to return.
_SELECTS_HIDDEN_STATES = hasattr(getattr(utils, "output_capturing", None), "selected_hidden_states")


def asked_for(name: str, config: Any, kwargs: dict[str, Any]) -> Any:
    """output_attentions or output_hidden_states, of the call or else of the config."""
    return kwargs.get(name, getattr(config, name, False))


def in_asked_form(output: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """`output`, a ModelOutput, or the tuple of its values where return_dict is False."""
    return_dict = kwargs.get("return_dict", getattr(config, "return_dict", True))
    return output.to_tuple() if return_dict is False else output


class HiddenStates:
    """The residual stream as a forward hands it out: `kept` has L + 1 entries, None outside of `indices` (None: all)."""

    def __init__(self, indices: frozenset[int] | None = None):
        self.indices = indices
        self.kept: list[Tensor | None] = []

    @classmethod
    def asked_for(cls, asked: bool | int | Sequence[int], count: int) -> "HiddenStates":
        """`asked` as output_hidden_states; from `count` negative indices are counted."""
        if not _SELECTS_HIDDEN_STATES or isinstance(asked, bool):
            return cls()
        indices = [asked] if isinstance(asked, int) else asked
        return cls(frozenset(i % count for i in indices if -count <= i < count))

    def collect(self, hidden_states: Tensor | None) -> None:
        """The next one, which may be None outside of `indices`."""
        is_kept = self.indices is None or len(self.kept) in self.indices
        self.kept.append(hidden_states if is_kept else None)
