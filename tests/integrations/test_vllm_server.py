"""vLLM's own OpenAI server on a CPU, the plugin off and on: the same tokens, log probabilities and embeddings over HTTP.

`.ci/vllm` makes the environment and runs it. A server takes half a minute to start on an idle machine.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from over_http import IMAGES, chat, content, free_port, post, serving, tokens

from siglip_fast.models.reasons import GRADIENTS

ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def is_cpu_build() -> bool:
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_cpu_build(), reason="no build of vLLM for CPUs: .ci/vllm makes an environment with one"),
]


def ask(checkpoint: Path, plugin: bool, log: Path, requests, *arguments: str) -> list:
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", *arguments]
    environment = ENVIRONMENT | {"SIGLIP_FAST_PLUGIN": str(int(plugin))}
    with serving(command, port, "/health", log, environment):
        return [post(port, path, body) for path, body in requests]


def both(model: str, tmp_path: Path, requests, *arguments: str) -> tuple[list, list, str]:
    """The answers with the plugin off and on, and the latter's log."""
    import whole_checkpoints  # it takes a tokenizer's library, which is there where vLLM is

    checkpoint = getattr(whole_checkpoints, model)(tmp_path / model)
    off, on = (ask(checkpoint, plugin, tmp_path / f"{plugin}.log", requests, *arguments) for plugin in (False, True))
    return off, on, (tmp_path / "True.log").read_text(errors="replace")


@pytest.mark.parametrize(
    "model, tower, arguments",
    [
        ("llava", "SiglipVisionTransformer", ["--enforce-eager"]),
        ("llava", "SiglipVisionTransformer", []),  # torch.compile, as vLLM comes up
        ("qwen3_vl", "Qwen3_VisionTransformer", ["--enforce-eager"]),
        ("qwen3_vl", "Qwen3_VisionTransformer", []),
    ],
    ids=["llava-eager", "llava-compiled", "qwen3_vl-eager", "qwen3_vl-compiled"],
)
def test_generation(model, tower, arguments, tmp_path):
    arguments = [*arguments, "--limit-mm-per-prompt", '{"image": 2}']
    off, on, log = both(model, tmp_path, [chat(images) for images in IMAGES], *arguments)
    assert f"vLLM: {tower} runs fused, on the cpu backend" in log
    warm_up = (
        set() if arguments[0] == "--enforce-eager" else {GRADIENTS}
    )  # which a CPU's does outside of inference_mode
    assert {*re.findall(f"running the stock {tower} forward: (.*)", log)} <= warm_up
    answers = [(tokens(a), tokens(b)) for a, b in zip(off, on, strict=True)]
    for (names, expected), (same_names, actual) in answers:
        assert names == same_names
        assert np.abs(actual - expected).max() < 1e-4
        print(model, *arguments, f"largest difference of log probabilities {np.abs(actual - expected).max():.1e}")
    assert len({tuple(names) for (names, _), _ in answers}) == len(IMAGES)  # images make a difference


def test_embeddings(tmp_path):
    """`vllm serve google/siglip-base-patch16-224 --runner pooling` is SigLIP over HTTP, of images and of texts."""
    messages = [{"messages": [{"role": "user", "content": content([image])}]} for (image, *_) in IMAGES]
    requests = [("/v1/embeddings", {**body, "encoding_format": "float"}) for body in (*messages, {"input": "a cat"})]
    off, on, log = both("siglip", tmp_path, requests, "--enforce-eager", "--runner", "pooling")
    assert "vLLM: SiglipVisionTransformer runs fused, on the cpu backend" in log and "running the stock" not in log
    expected, actual = (np.array([answer["data"][0]["embedding"] for answer in answers]) for answers in (off, on))
    differences = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"largest relative difference of an embedding {differences.max():.1e}")
    assert differences.max() < 1e-5 and differences[-1] == 0  # the text's tower is vLLM's
    assert np.linalg.norm(actual[0] - actual[1]) > 1e-2 * np.linalg.norm(actual[0])
