"""Batches to the device and back: each gets its own embeddings, however many are begun before one is fetched."""

import torch
from device import DEVICE

from siglip_fast.feed.meter import Meter
from siglip_fast.feed.transfer import OnCpu, OnCuda


def test_each_batch_has_its_own():
    meter, device = Meter(), torch.device(DEVICE)
    way = (OnCuda if device.type == "cuda" else OnCpu)(device, meter)
    weight = torch.eye(2048, device=device) * 2

    def model(inputs):
        assert inputs["pixels"].device.type == device.type
        rows = inputs["pixels"].float()
        for _ in range(20):  # long enough for the next batches to be copied meanwhile
            rows = rows @ weight / 2
        return rows + inputs["shift"][:, None]

    generator = torch.Generator().manual_seed(0)
    batches = [
        [
            {
                "pixels": torch.randint(0, 255, (2048,), generator=generator, dtype=torch.uint8),
                "shift": torch.tensor(float(i)),
            }
            for _ in range(size)
        ]
        for i, size in enumerate([8, 8, 3, 8, 1])
    ]
    begun = [way.start(batch, model) for batch in batches]
    for i, (batch, finish) in enumerate(zip(batches, begun, strict=True)):
        rows = finish()
        assert rows.device.type == "cpu" and rows.dtype == torch.float32
        wanted = torch.stack([image["pixels"] for image in batch]).float() + i
        assert torch.equal(rows, wanted)
    assert meter.copying > 0 and meter.model > 0
