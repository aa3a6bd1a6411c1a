"""sentence-transformers with a SigLIP model: `siglip_fast.apply_to(model)` after loading it is the whole recipe."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_tiny_siglip
from PIL import Image

import siglip_fast
from siglip_fast.ops import Ops

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.4")

TEXTS = ["a photo of a cat", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-siglip")
    save_tiny_siglip(folder)
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The batch sizes that the fused operations saw."""
    seen, patch_embed = [], Ops.patch_embed

    def counted(self, pixel_values, *args):
        seen.append(len(pixel_values))
        return patch_embed(self, pixel_values, *args)

    monkeypatch.setattr(Ops, "patch_embed", counted)
    return seen


def images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in range(count)]


def test_encodes_as_stock_does(folder, calls):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    expected = model.encode(images(5), batch_size=2), model.encode(TEXTS)
    assert not calls
    siglip_fast.apply_to(model)
    np.testing.assert_allclose(model.encode(images(5), batch_size=2), expected[0], rtol=1e-4, atol=1e-4)
    assert sorted(calls) == [1, 2, 2]
    np.testing.assert_array_equal(model.encode(TEXTS), expected[1])
    assert len(calls) == 3, "texts have no images"


def test_saves_what_stock_loads(folder, tmp_path):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    siglip_fast.apply_to(model)
    model.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(again.encode(images(2)), model.encode(images(2)), rtol=1e-4, atol=1e-4)
