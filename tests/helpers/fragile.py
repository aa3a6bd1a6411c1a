"""What an image processor of the tests does with sources that are commands: "1.5" is an image, "kill" the end of its process.

A module of its own because processes import it by name.
"""

import os
import signal
import time
import warnings

import torch


def prepare(source: str | bytes) -> dict[str, torch.Tensor]:
    """Of a number, a tensor full of it; encoded images as `Processes` measures one are 0."""
    if isinstance(source, bytes):
        source = source.decode() if len(source) < 50 else "0"
    word, _, rest = source.partition(" ")
    if word == "kill":
        os.kill(os.getpid(), int(rest or signal.SIGKILL))
    if word == "exit":
        os._exit(int(rest))
    if word == "bad":
        raise ValueError(f"bad {rest}")
    if word == "warn":
        warnings.warn(f"warned {rest}", UserWarning, stacklevel=1)
    if word == "sleep":
        time.sleep(float(rest))
    if word == "pid":
        return {"pixel_values": torch.full((2, 3), float(os.getpid()))}
    return {"pixel_values": torch.full((2, 3), float(rest or word))}
