"""Throughput of the whole model against the stock one, on the device at hand: `pytest bench`.

Peers: stock eager, stock sdpa, and stock sdpa with a contiguous residual stream (stock's is not: its tokens are a
transposed convolution output, which every layer then inherits). All share their weights, and each is compared with
stock eager in float32 before it is timed.
"""

import peers
import pytest
import torch

from siglip_fast import SiglipVisionModel
from siglip_fast.variants import config_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cuda": ["bfloat16", "float16"], "cpu": ["float32"]}[DEVICE]
BATCH_SIZES = {"cuda": [1, 8, 64, 256], "cpu": [1, 8]}[DEVICE]
VARIANTS = {"cuda": ["base-patch16-224", "so400m-patch14-384"], "cpu": ["base-patch16-224"]}[DEVICE]


def build(peer: str, variant: str) -> torch.nn.Module:
    config = config_for(variant)
    if peer == "siglip_fast":
        return SiglipVisionModel(config, strict=True)
    model = peers.stock(config, "eager" if peer == "eager" else "sdpa", torch.float32)
    return peers.make_contiguous(model) if peer == "sdpa-contiguous" else model


@pytest.mark.parametrize("peer", ["eager", "sdpa", "sdpa-contiguous", "siglip_fast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_forward(benchmark, variant, batch_size, dtype, peer):
    torch.manual_seed(0)
    with torch.inference_mode(False):
        reference, model = build("eager", variant).eval(), build(peer, variant).eval()
    model.load_state_dict(reference.state_dict())
    model.to(DEVICE, getattr(torch, dtype))
    image_size = model.config.image_size
    pixel_values = torch.randn(batch_size, 3, image_size, image_size)
    expected = reference(pixel_values[:1]).pooler_output[0]
    pixel_values = pixel_values.to(DEVICE, model.dtype)

    def forward():
        output = model(pixel_values).pooler_output
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return output

    cosine = torch.cosine_similarity(forward()[0].float().cpu(), expected, dim=0).item()
    assert cosine > (0.9999 if dtype == "float32" else 0.99)
    benchmark.group = f"{variant} B={batch_size} {dtype} {DEVICE}"
    benchmark.pedantic(forward, rounds=10, warmup_rounds=3)
    benchmark.extra_info |= {"images_per_second": batch_size / benchmark.stats["median"], "cosine": cosine}
