"""SGLang's own OpenAI server on a CPU, the plugin off and on: the same tokens and log probabilities over HTTP.

`.ci/sglang` makes the environment and runs it: there is no build of SGLang's kernels for CPUs, and what stands for them
computes nothing, so that only what is plain PyTorch can be served.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from over_http import IMAGES, chat, free_port, post, serving, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed"),
]

ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
ARGUMENTS = ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--enable-multimodal"]
ARGUMENTS += ["--context-length", "256", "--max-total-tokens", "2048", "--max-running-requests", "4"]
ARGUMENTS += ["--skip-server-warmup"]


def ask(checkpoint: Path, plugin: bool, log: Path) -> list[dict]:
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--port", str(port)]
    environment = ENVIRONMENT | {"SIGLIP_FAST_PLUGIN": str(int(plugin))}
    with serving([*command, *ARGUMENTS], port, "/health", log, environment):
        return [post(port, path, body) for path, body in map(chat, IMAGES)]


def test_generation(tmp_path):
    import whole_checkpoints  # it takes a tokenizer's library, which is there where SGLang is

    checkpoint = whole_checkpoints.qwen3_vl(tmp_path / "checkpoint")
    off, on = (ask(checkpoint, plugin, tmp_path / f"{plugin}.log") for plugin in (False, True))
    log = (tmp_path / "True.log").read_text(errors="replace")
    assert "SGLang: Qwen3VLMoeVisionModel runs fused, on the cpu backend" in log and "running the stock" not in log
    assert "siglip_fast" not in (tmp_path / "False.log").read_text(errors="replace").lower()
    answers = [(tokens(a), tokens(b)) for a, b in zip(off, on, strict=True)]
    for (names, expected), (same_names, actual) in answers:
        assert names == same_names
        assert np.abs(actual - expected).max() < 1e-4
        print(f"largest difference of log probabilities {np.abs(actual - expected).max():.1e}")
    assert len({tuple(names) for (names, _), _ in answers}) == len(IMAGES)  # images make a difference
