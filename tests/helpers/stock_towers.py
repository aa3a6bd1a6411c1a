"""What tests of all kinds of towers share: weights of which none is neutral, and how often the host asks for values."""

from collections.abc import Sequence

from torch import Tensor, nn


def without_neutral_values(tower: nn.Module, scores: Sequence[str] = ("q_proj",)) -> nn.Module:
    """The same, drawn anew, for inference; `scores` name the projections whose size tells keys from each other."""
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.2)
        elif "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, 1, 0.4)
        elif "position" in name or "pos_embed" in name:
            nn.init.normal_(parameter)
        else:
            is_score = any(score in name for score in scores)
            nn.init.normal_(parameter, 0, (2 if is_score else 1) * parameter[0].numel() ** -0.5)
    return tower.eval()


def count_reads(monkeypatch) -> list[str]:
    """What asks for values that the host needs, from now on, by name. What it asks the device for is counted on the CPU.

    `numpy` is not among it, by which an upload's memory on the host is filled.
    """
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        own = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, _own=own, _name=name: reads.append(_name) or _own(self, *a))
    return reads
