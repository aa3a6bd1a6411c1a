"""What importing and installing the package does, and does not do."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path, *options: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_import_is_light(tmp_path):
    loaded = run("import siglip_fast, sys; print(*sys.modules)", tmp_path).split()
    assert "siglip_fast" in loaded
    assert not {"torch", "triton", "torchvision", "transformers"} & set(loaded)


def test_dir_lists_the_public_names(tmp_path):
    names = run("import siglip_fast.models.swap; print(*dir(siglip_fast))", tmp_path).split()
    assert sorted(names) == sorted(
        [
            "SiglipVisionModel",
            "Siglip2VisionModel",
            "apply_to",
            "restore",
            "towers",
            "register",
            "unregister",
            "__version__",
        ]
    )
    run("import siglip_fast; assert all(hasattr(siglip_fast, name) for name in siglip_fast.__all__)", tmp_path)


def test_works_without_triton_and_torchvision_and_gpu(tmp_path):
    """Importing either, or asking CUDA for anything, would fail the run."""
    run(
        """
import sys
sys.modules["triton"] = sys.modules["torchvision"] = None  # as if not installed
import torch
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.is_available = lambda: 1 / 0
from siglip_fast import SiglipVisionModel
from transformers import SiglipVisionConfig
config = SiglipVisionConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32)
with torch.no_grad():
    SiglipVisionModel(config, strict=True)(torch.randn(1, 3, 32, 32))
""",
        tmp_path,
    )


def test_transformers_and_torch_are_untouched(tmp_path):
    run(
        """
import torch, transformers
from transformers.models.siglip import modeling_siglip
before = dict(vars(modeling_siglip)), dict(vars(modeling_siglip.SiglipVisionModel)), dict(vars(torch.nn.LayerNorm))
layernorm, mapped = torch.nn.LayerNorm, transformers.AutoModel._model_mapping[transformers.SiglipVisionConfig]
import siglip_fast
siglip_fast.SiglipVisionModel
assert before == (
    dict(vars(modeling_siglip)), dict(vars(modeling_siglip.SiglipVisionModel)), dict(vars(torch.nn.LayerNorm))
)
assert torch.nn.LayerNorm is layernorm
assert transformers.AutoModel._model_mapping[transformers.SiglipVisionConfig] is mapped
import sys, siglip_fast.models.qwen3_vl  # whose towers are of many modules of transformers, which may not be needed
assert not [name for name in sys.modules if "modeling_qwen" in name or "modeling_cohere" in name]
""",
        tmp_path,
    )


def test_kernels_are_not_a_top_level_package(tmp_path):
    """`import kernels` finds Hugging Face's, where it is installed, or nothing; never ours."""
    code = """
import importlib.util, siglip_fast.kernels
spec = importlib.util.find_spec("kernels")
print(siglip_fast.kernels.__file__, spec and spec.origin)
"""
    ours, top_level = run(code, tmp_path).split()
    assert top_level != ours


@pytest.mark.slow
def test_wheel(tmp_path):
    """Built from the checkout; needs the network for setuptools unless it is installed."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, str(ROOT)], check=True, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "siglip_fast/kernels/attention.py" in names and "siglip_fast/backends/torch.py" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"siglip_fast"}


def test_version_is_stated_once():
    import siglip_fast

    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert siglip_fast.__version__ == declared
