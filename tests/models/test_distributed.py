"""Two ranks under torchrun, on gloo: DDP and FSDP2 around the drop-in do what they do around the stock class."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORKER = Path(__file__).parents[1] / "helpers/distributed_worker.py"
CASES = (
    "ddp",
    "fsdp_root",
    "fsdp_root_stays_gathered",
    "fsdp_layers",
    "fsdp_layers_bf16",
    "edited_between_evals",
    "checkpoint",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """One launch for all cases, since starting takes longer than they do: the folder where each rank leaves a file
    for each that it is through with, and what was printed. The first that fails ends it."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKER), str(folder), *CASES],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return folder, done.stdout


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case, run):
    folder, printed = run
    assert [rank for rank in (0, 1) if (folder / f"{case}-{rank}").exists()] == [0, 1], printed
