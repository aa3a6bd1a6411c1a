"""The servers of docs/http.md, as they stand there: started, asked over HTTP, and compared with stock's model.

`.ci/http` makes the environments and runs them; a server whose engine is not installed is skipped.
"""

import base64
import importlib.util
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from over_http import data_url, free_port, picture, post, serving
from whole_checkpoints import siglip

PAGE = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
IMAGES = [picture(0), picture(1, (40, 170)), picture(2, (48, 48))]
BIN = Path(sys.executable).parent


def engine(package: str) -> Callable:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: .ci/http makes an environment with it")


pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return siglip(tmp_path / "checkpoint")


@pytest.fixture
def expected(checkpoint) -> np.ndarray:
    """Stock's embeddings of the images."""
    model = transformers.SiglipVisionModel.from_pretrained(checkpoint).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(checkpoint)(images=IMAGES, return_tensors="pt")
    with torch.inference_mode():
        return model(**pixels).pooler_output.numpy()


def script(heading: str, folder: Path, checkpoint: Path) -> Path:
    """The section's program, with the checkpoint in the place of the Hub's."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    file = folder / "server.py"
    file.write_text(code.replace('"google/siglip-base-patch16-224"', repr(str(checkpoint))))
    return file


def encoded(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def assert_same(actual, expected: np.ndarray, log: Path) -> None:
    differences = np.linalg.norm(np.array(actual) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"largest relative difference of an embedding {differences.max():.1e}")
    assert 0 < differences.max() < 1e-5  # of other kernels, so not the same bits
    assert "running the stock" not in log.read_text(errors="replace")


@engine("litserve")
def test_litserve(tmp_path, checkpoint, expected):
    port, log = free_port(), tmp_path / "log"
    file = script("LitServe", tmp_path, checkpoint)
    file.write_text(file.read_text().replace("port=8000", f"port={port}"))
    with serving([sys.executable, str(file)], port, "/health", log, {}):
        actual = [post(port, "/predict", {"image": encoded(image)})["embedding"] for image in IMAGES]
    assert_same(actual, expected, log)


@engine("ray")
@engine("starlette")  # of ray[serve]
def test_ray_serve(tmp_path, checkpoint, expected):
    log, port = tmp_path / "log", 8000  # where the command listens
    script("Ray Serve", tmp_path, checkpoint)
    command = [str(BIN / "serve"), "run", "--app-dir", str(tmp_path), "server:app"]
    with serving(command, port, "/-/healthz", log, {}):
        actual = [post(port, "/", {"image": encoded(image)})["embedding"] for image in IMAGES]
    assert_same(actual, expected, log)


@engine("infinity_emb")
def test_infinity(tmp_path, checkpoint):
    """Its own command first, then ours: images to 1e-5, the text to the bit."""
    answers = []
    ours = [sys.executable, "-m", "siglip_fast.integrations.infinity"]
    for name, start in {"stock": [str(BIN / "infinity_emb")], "ours": ours}.items():
        port, log = free_port(), tmp_path / name
        command = [*start, "v2", "--model-id", str(checkpoint), "--port", str(port)]
        with serving(command, port, "/health", log, {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}):
            images = {"input": [*map(data_url, IMAGES)], "modality": "image"}
            asked = [
                post(port, "/embeddings", {"model": "checkpoint", **body}) for body in (images, {"input": ["a cat"]})
            ]
        answers.append([np.array([each["embedding"] for each in answer["data"]]) for answer in asked])
    (expected, text), (actual, same_text) = answers
    assert_same(actual, expected, log)
    assert np.array_equal(text, same_text)
    assert "siglip_fast WARNING: Infinity:" in log.read_text(errors="replace")
