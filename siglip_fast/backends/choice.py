"""How an operation is to run, where there is more than one way: what tuning measures and the Triton backend obeys."""

from typing import NamedTuple


class Choice(NamedTuple):
    """How an operation runs: "triton" with a configuration, or a route of `siglip_fast.backends.vendor` without."""

    route: str
    config: dict | None = None

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        settings = (f"{key.removeprefix('BLOCK_')}={value}" for key, value in (self.config or {}).items())
        return " ".join([self.route, *settings])


DEFAULT = Choice("triton")  # with the kernel's built-in configuration
