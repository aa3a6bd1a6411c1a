"""What a NaFlex model is called with: by the checkpoint's own image processor, of images of any shape; what does not fit it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import save_tiny_naflex
from PIL import Image
from transformers import SiglipVisionConfig

from siglip_fast.errors import UserError
from siglip_fast.feed.kinds import FixedSize, NaFlex, batch_of, inputs_of, kind_of
from siglip_fast.feed.loading import load_processor
from siglip_fast.models.variants import NAFLEX, VARIANTS, config_for, config_of


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stock_inputs(folder: Path, image: Image.Image) -> dict[str, torch.Tensor]:
    kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
    return kind.from_pretrained(folder)(image, return_tensors="pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("naflex")
    save_tiny_naflex(folder, vision_only=True)
    return folder


def test_as_stocks_processor(folder):
    kind = kind_of(config_of(str(folder)))
    processor = load_processor(str(folder), kind)
    pictures = [picture(*size) for size in ((40, 50), (33, 200), (300, 20), (64, 64))]
    batch = batch_of([inputs_of(image, processor) for image in pictures])
    for i, image in enumerate(pictures):
        for name, values in stock_inputs(folder, image).items():
            assert torch.equal(batch[name][i], values[0]) and batch[name].dtype == values.dtype
    grids = kind.grids(batch)
    assert grids == [(4, 5), (2, 10), (15, 1), (4, 4)]
    assert batch["pixel_attention_mask"].sum(1).tolist() == [h * w for h, w in grids]


@pytest.mark.parametrize("size", [(1, 40), (3, 40), (40, 1), (40, 3), (1, 1), (3, 3), (1, 5000)])
def test_images_of_few_pixels(folder, size):
    """The last axis is the channels', whatever the others' sizes."""
    processor = load_processor(str(folder), kind_of(config_of(str(folder))))
    image = picture(*size)
    grown = Image.fromarray(np.repeat(np.repeat(np.asarray(image), 8, 0), 8, 1))
    inputs = inputs_of(image, processor)
    assert inputs["pixel_values"].shape == (20, 192)
    assert torch.equal(inputs["spatial_shapes"], inputs_of(grown, processor)["spatial_shapes"])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"patch_size": 16}, "makes patches of 16² pixels, the model takes 8²"),
        ({"do_resize": False}, "makes 21 patches of an image, for a max_num_patches of 20"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor, not Siglip2ImageProcessor"),
    ],
)
def test_a_processor_that_does_not_fit(tmp_path, processor, message):
    save_tiny_naflex(tmp_path, vision_only=True, processor=processor)
    with pytest.raises(UserError, match=message):
        load_processor(str(tmp_path), kind_of(config_of(str(tmp_path))))


@pytest.mark.parametrize("variant", ["base-patch16-naflex", "base-patch16-224", "so400m-patch14-384"])
def test_without_a_checkpoint(variant):
    config = config_for(variant)
    kind = kind_of(config)
    assert isinstance(kind, NaFlex if variant.endswith("naflex") else FixedSize)
    inputs = batch_of([inputs_of(picture(40, 50), load_processor(None, kind))] * 2)
    example = kind.example()
    assert example.keys() == inputs.keys()
    for name, values in example.items():
        assert values.shape[1:] == inputs[name].shape[1:] and values.dtype == inputs[name].dtype
    side = 16 if variant.endswith("naflex") else config.image_size // config.patch_size
    assert kind.grids(example) == [(side, side)]


def test_variants():
    assert {*NAFLEX} == {"base-patch16-naflex", "so400m-patch16-naflex"} and not {*NAFLEX} & {*VARIANTS}
    stock = transformers.Siglip2VisionConfig()
    for key in NAFLEX["base-patch16-naflex"]:
        assert getattr(config_for("base-patch16-naflex"), key) == getattr(stock, key)
    so400m, of_one_size = config_for("so400m-patch16-naflex"), config_for("so400m-patch16-256")
    assert isinstance(of_one_size, SiglipVisionConfig)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        assert getattr(so400m, key) == getattr(of_one_size, key)
