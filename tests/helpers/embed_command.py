"""`siglip-fast embed` in tests: tiny checkpoints, pictures, and what stock makes of them."""

import contextlib
import io
import json
import os
import re
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from PIL import Image
from transformers import SiglipVisionConfig

from siglip_fast.cli.main import main
from siglip_fast.models.variants import VARIANTS

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
# Not SigLIP's defaults, so that a processor whose file nobody reads fails the tests.
PROCESSOR = {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
DEFAULTS = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_checkpoint(folder: Path, processor: dict | None = PROCESSOR, **config) -> Path:
    torch.manual_seed(1)
    model = transformers.SiglipVisionModel(SiglipVisionConfig(**TINY | config))
    with torch.no_grad():
        for parameter in model.parameters():  # Hugging Face's own are zero or tiny in places
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    if processor is not None:
        settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_variant(monkeypatch) -> str:
    monkeypatch.setitem(VARIANTS, "tiny-patch8-32", TINY)
    return "tiny-patch8-32"


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: str | Path, pixels: np.ndarray) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def write_shard(path: str, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    """As WebDataset's."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def expected(checkpoint: Path, images: list[np.ndarray], processor=PROCESSOR, pool="head", dtype=None):
    """Stock transformers on RGB pixels, with the preprocessing written out."""
    mean, std = (np.float32(processor[key]) for key in ("image_mean", "image_std"))
    batch = [
        (np.float32(Image.fromarray(image).resize((32, 32), processor["resample"])) / 255 - mean) / std
        for image in images
    ]
    model = transformers.SiglipVisionModel.from_pretrained(checkpoint).to(dtype or torch.float32).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))
    return (output.pooler_output if pool == "head" else output.last_hidden_state.mean(1)).float().numpy()


def run(checkpoint: Path | None, *args: object) -> int:
    model = ["--model", str(checkpoint)] if checkpoint else []
    return main(["embed", "--device", "cpu", *model, *map(str, args)])


def read(path: str | Path) -> tuple[list[str], np.ndarray]:
    table = parquet.read_table(path)
    return table["path"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


def check(rows: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    assert rows.shape == wanted.shape
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    if len(wanted) > 1:  # images that look alike to the model would hide a wrong order
        distance = np.abs(wanted[:, None] - wanted[None]).max(-1) + np.eye(len(wanted)) * 1e9
        assert distance.min() > 10 * tolerance * np.abs(wanted).max()


CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from siglip_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}


def shared_files(process: int) -> list[str]:
    """In /dev/shm, the locks of its queues at least."""
    files = re.findall(r"/dev/shm/sem\S+", Path(f"/proc/{process}/maps").read_text())
    assert files
    return files


def wait_until_gone(group: int, shared: list[str]) -> None:
    """No process of the group is left, and none of these files."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not any(map(os.path.exists, shared))
