"""Batches to the device and embeddings back. On CUDA neither waits: a batch is copied while the last one computes.

No GPU has run the part for CUDA.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .kinds import Inputs, batch_of
from .meter import Meter

Finish = Callable[[], Tensor]  # waits for a batch's embeddings


class OnCpu:
    """Everything in its turn."""

    def __init__(self, device: torch.device, meter: Meter):
        self._meter = meter

    def start(self, images: list[Inputs], model: Callable[[Inputs], Tensor]) -> Finish:
        start = time.perf_counter()
        inputs = batch_of(images)
        copied = time.perf_counter()
        embeddings = model(inputs)
        self._meter.copying += copied - start
        self._meter.model += time.perf_counter() - copied
        return lambda: embeddings


class OnCuda:
    """What `start` asks for is queued, and `Finish` waits for it."""

    def __init__(self, device: torch.device, meter: Meter):
        self._device, self._meter = device, meter
        self._copies = torch.cuda.Stream(device)

    def start(self, images: list[Inputs], model: Callable[[Inputs], Tensor]) -> Finish:
        computes = torch.cuda.current_stream(self._device)
        start = time.perf_counter()
        pinned = {name: _pinned([image[name] for image in images]) for name in images[0]}
        self._meter.copying += time.perf_counter() - start
        with torch.cuda.stream(self._copies):
            began = self._event(self._copies)
            inputs = {name: values.to(self._device, non_blocking=True) for name, values in pinned.items()}
            copied = self._event(self._copies)
        computes.wait_event(copied)
        for values in inputs.values():
            values.record_stream(computes)  # else its memory were free for the next copy once this function ends
        started = self._event(computes)
        embeddings = model(inputs)
        ended = self._event(computes)
        # Queued behind this batch's work and before the next one's; to pinned memory, as non_blocking has it.
        on_host = embeddings.to("cpu", non_blocking=True)
        returned = self._event(computes)

        def finish() -> Tensor:
            returned.synchronize()
            self._meter.copying += (began.elapsed_time(copied) + ended.elapsed_time(returned)) / 1000
            self._meter.model += started.elapsed_time(ended) / 1000
            return on_host

        return finish

    @staticmethod
    def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event(torch.cuda.Event(enable_timing=True))


def _pinned(values: list[Tensor]) -> Tensor:
    """One copy, from shared memory to where the GPU can read it by itself. Freed, it is kept until the GPU has read it:
    torch's allocator of pinned memory notes the streams that use it."""
    out = torch.empty((len(values), *values[0].shape), dtype=values[0].dtype, pin_memory=True)
    return torch.stack(values, out=out)
