"""The Python of README.md and docs/ is run as it stands there, each section in a process of its own, and so are its embed
commands.

The blocks of a section are one program. What they take for granted (inputs, a model from further up) is in RECIPES; a
section that is missing there fails. Checkpoints of the Hub are replaced by a tiny one; others cannot be found, offline.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
import torch
from checkpoints import save_tiny_naflex, save_tiny_paligemma, save_tiny_pi0, save_tiny_qwen3_vl, save_tiny_siglip
from PIL import Image
from pyarrow import parquet

HELPERS = str(Path(__file__).parent / "helpers")
ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("swap", "any-size", "embedding", "gpu", "batch-invariance", "robots")),
]
CHECKPOINTS = {
    "google/siglip-base-patch16-224": save_tiny_siglip,
    "google/siglip2-base-patch16-naflex": save_tiny_naflex,
    "google/paligemma2-3b-mix-224": save_tiny_paligemma,
    "Qwen/Qwen3-VL-2B-Instruct": save_tiny_qwen3_vl,
    "lerobot/pi0_base": save_tiny_pi0,
}


class Recipe(NamedTuple):
    before: str = ""
    after: str = ""  # asserts that it did something
    requires: tuple[str, ...] = ()  # optional packages
    gpu_lines: tuple[str, ...] = ()  # the beginnings of lines that raise RuntimeError without a GPU


RECIPES = {
    "From image files to embeddings": Recipe(
        after="""
with torch.no_grad():
    assert model.why_not(**pixels) is None
assert embeddings.shape == (2, 64)
"""
    ),
    "Images as bytes": Recipe(
        before="""
import torch
from siglip_fast import SiglipVisionModel
model = SiglipVisionModel.from_pretrained("google/siglip-base-patch16-224")
images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
""",
        after="assert output.pooler_output.shape == (2, 64)",
    ),
    "In a model that holds a SigLIP tower": Recipe(
        after="assert [tower.fast for tower in siglip_fast.towers(model)] == [False]"
    ),
    "In models that hold a SigLIP tower": Recipe(
        after="""
assert [tower.fast for tower in siglip_fast.towers(model)] == [False]
siglip_fast.apply_to(model)
assert [tower.fast for tower in siglip_fast.towers(model)] == [True]
"""
    ),
    "Before models are built": Recipe(after="assert [tower.fast for tower in siglip_fast.towers(model)] == [True]"),
    "SigLIP 2 NaFlex": Recipe(
        after="""
with torch.no_grad():
    assert model.why_not(**processor(images, return_tensors="pt")) is None
assert embeddings.shape == (2, 64)
"""
    ),
    "Qwen3-VL and its descendants": Recipe(
        after="assert [tower.fast for tower in siglip_fast.towers(model)] == [True]"
    ),
    "timm and open_clip": Recipe(
        before="""
import sys
sys.path.insert(0, HELPERS)
from without_torchvision import torchvision_or_empty_modules
with torchvision_or_empty_modules():
    import timm
import torch
torch.set_grad_enabled(False)
pixel_values = torch.rand(2, 3, 224, 224)
""",
        after="""
assert model.why_not(pixel_values) is None
assert features.shape == (2, 768)
""",
        requires=("timm",),
    ),
    "sentence-transformers": Recipe(
        before="""
from PIL import Image
images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
""",
        after="""
assert [tower.fast for tower in siglip_fast.towers(model)] == [True]
assert embeddings.shape == (2, 64)
""",
        requires=("sentence_transformers",),
    ),
    "CUDA graphs": Recipe(
        before="""
from siglip_fast import Siglip2VisionModel
model = Siglip2VisionModel.from_pretrained("google/siglip2-base-patch16-naflex")
""",
        gpu_lines=("model.capture(",),
    ),
    "Batch invariance": Recipe(after="assert model.batch_invariant"),
    "Robot policies": Recipe(after="assert tower.config.hidden_size", gpu_lines=("tower.capture(",)),
    "On a GPU": Recipe(
        before="""
import torch
from siglip_fast import SiglipVisionModel
model = SiglipVisionModel.from_pretrained("google/siglip-base-patch16-224")
model.to("cuda" if torch.cuda.is_available() else "cpu")
""",
        gpu_lines=("model.tune(", "model.capture("),
    ),
}


def sections(markdown: str) -> dict[str, list[str]]:
    """The Python blocks under each heading that has any."""
    found: dict[str, list[str]] = {}
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL):
        title, language, code = match.groups()
        if title:
            heading = title
        elif language in ("python", "py"):
            found.setdefault(heading, []).append(code)
    return found


def raises_without_gpu(code: str, beginnings: tuple[str, ...]) -> str:
    """`code`, its lines with these beginnings expected to raise RuntimeError."""
    for beginning in beginnings:
        expected = r"with pytest.raises(RuntimeError):\n    \g<0>"
        code, count = re.subn(rf"^{re.escape(beginning)}.*", expected, code, flags=re.MULTILINE)
        assert count, f"no line begins with {beginning}"
    return "import pytest\n" + code


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A folder for each name of the Hub."""
    folders = {name: tmp_path_factory.mktemp("checkpoint") for name in CHECKPOINTS}
    for name, save in CHECKPOINTS.items():
        save(folders[name])
    return folders


TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = sections(TEXT)


def test_every_section_has_its_stand_ins():
    assert set(BLOCKS) == set(RECIPES)


@pytest.mark.parametrize("heading", [heading for heading in BLOCKS if heading in RECIPES])
def test_runs(heading, checkpoints, tmp_path):
    recipe = RECIPES[heading]
    for package in recipe.requires:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code = "\n".join([recipe.before.replace("HELPERS", repr(HELPERS)), *BLOCKS[heading], recipe.after])
    for name, folder in checkpoints.items():
        code = code.replace(f'"{name}"', repr(str(folder)))
    if not torch.cuda.is_available():
        code = raises_without_gpu(code, recipe.gpu_lines)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # whose pictures are read
    script = tmp_path / "recipe.py"
    script.write_text(code, encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "SIGLIP_FAST_CACHE_DIR": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | offline
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_sections_are_told_apart():
    markdown = (
        "# A\n```python\na\n# no heading\n```\n## B\n```bash\n# b\n```\n### C\n```py\nc\n```\n```python\nd\n```\n"
    )
    assert sections(markdown) == {"A": ["a\n# no heading\n"], "C": ["c\n", "d\n"]}


@pytest.mark.parametrize("line", dict.fromkeys(re.findall(r"^siglip-fast embed .*$", TEXT, re.MULTILINE)))
def test_embed_lines(line, checkpoints, tmp_path):
    """Run as they stand there, with a tiny checkpoint and a few images."""
    if "--ray" in line:
        pytest.importorskip("ray")
    for name, folder in checkpoints.items():
        line = line.replace(name, str(folder))
    encoded = []
    for folder in ("photos", "more/below", "data"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / folder / "image.jpg")
        encoded.append((tmp_path / folder / "image.jpg").read_bytes())
    parquet.write_table(pa.table({"path": ["a", "b", "c"], "image": encoded}), tmp_path / "data" / "x.parquet")
    script = "import sys; from siglip_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, *shlex.split(line)[1:]], cwd=tmp_path, env=environment, check=True)
    (out,) = tmp_path.glob("embeddings*")
    assert parquet.read_table(out).num_rows == (3 if "--ray" in line else 2)
