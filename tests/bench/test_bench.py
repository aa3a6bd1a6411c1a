"""bench/: which cases and peers there are, what becomes of a candidate that fails, and bench/run_gpu.sh's stages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cases
import environment
import operations
import peers
import pytest
import rounds
import torch
from models import TINY
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("operation", operations.OPERATIONS)
@torch.no_grad()
def test_the_candidates_of_an_operation_agree(operation):
    case = cases.Case("base-patch16-224", 1, "float32")
    makers = operations.candidates(case, operation)
    torch.testing.assert_close(makers["siglip_fast"]()(), makers["torch"]()(), atol=1e-3, rtol=1e-4)


class TestCases:
    def test_full_is_the_whole_matrix(self):
        full = cases.CASES["cuda", "full"]
        assert len({(c.variant, c.batch_size, c.dtype) for c in full}) == len(full) == 6 * 4 * 2

    def test_quick_is_part_of_full(self):
        for device in ("cuda", "cpu"):
            full = {case[:3] for case in cases.CASES[device, "full"]}
            assert {case[:3] for case in cases.CASES[device, "quick"]} < full

    def test_compiled_peers_of_a_quick_run(self, monkeypatch):
        monkeypatch.delenv("SIGLIP_FAST_BENCH", raising=False)
        case, peer = cases.Case("base-patch16-224", 8, "bfloat16"), "torch.compile, max-autotune"
        assert cases.left_out(case, "cuda", peer, 0) is None
        assert "used up" in cases.left_out(case, "cuda", peer, 1e3)
        assert "leaves it out" in cases.left_out(case._replace(batch_size=1), "cuda", peer, 0)
        assert cases.left_out(case._replace(batch_size=1), "cuda", "timm", 1e3) is None
        monkeypatch.setenv("SIGLIP_FAST_BENCH", "full")
        assert cases.left_out(case, "cuda", peer, 1e3) is None

    def test_an_unknown_extent(self, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_BENCH", "all")
        with pytest.raises(ValueError, match="expected quick or full"):
            cases.extent()


class TestPeers:
    def test_each_device_has_ours_and_stock(self):
        for makers in peers.PEERS.values():
            assert next(iter(makers)) == rounds.OURS
            assert {"siglip_fast, graph", "siglip_fast, tuned", "stock eager", "stock sdpa", "timm"} <= set(makers)

    def test_timm_names_lose_no_weight(self):
        """That the model computes the same takes timm, which does not import beside a CPU torch."""
        state = peers.stock(SiglipVisionConfig(**TINY), "sdpa", torch.float32).state_dict()
        renamed = peers.timm_state(state)
        layer = {f"{part}.{kind}" for kind in ("weight", "bias") for part in _TIMM_LAYER}
        head = {f"attn_pool.{part}.{kind}" for kind in ("weight", "bias") for part in _TIMM_HEAD}
        outer = {f"{part}.{kind}" for kind in ("weight", "bias") for part in ("patch_embed.proj", "norm")}
        blocks = {f"blocks.{i}.{name}" for i in range(TINY["num_hidden_layers"]) for name in layer}
        assert set(renamed) == blocks | head | outer | {"pos_embed", "attn_pool.latent"}
        assert sum(t.numel() for t in renamed.values()) == sum(t.numel() for t in state.values())
        q, _, v = renamed["blocks.1.attn.qkv.weight"].chunk(3)
        for part, name in ((q, "q_proj"), (v, "v_proj")):
            assert any(k.endswith(f"layers.1.self_attn.{name}.weight") and t.equal(part) for k, t in state.items())

    @pytest.mark.parametrize("missing", ["flash_attn", "timm"])
    def test_what_is_not_installed_is_missing(self, missing, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        make = {"flash_attn": peers.flash_attention_2, "timm": peers.timm}[missing]
        with pytest.raises(peers.Missing, match=f"{missing} is not installed"):
            make(None, None, None)

    @pytest.mark.parametrize("tuned, expected", [(False, "off"), (True, None)])
    def test_which_configurations_ours_runs(self, tuned, expected, monkeypatch):
        seen = []
        forward = SiglipVisionModel.forward

        def spy(self, *args, **kwargs):
            seen.append(os.environ.get("SIGLIP_FAST_TUNE"))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(SiglipVisionModel, "forward", spy)
        monkeypatch.setattr(peers, "has_tuned", lambda device: True)
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "the user's")
        with torch.no_grad():
            peers.siglip_fast(SiglipVisionConfig(**TINY), torch.float32, torch.zeros(1, 3, 24, 24), tuned)()
        assert seen == [expected, "the user's"]

    def test_tuned_needs_a_gpu(self):
        with pytest.raises(peers.Missing, match="nothing is tuned"):
            peers.siglip_fast(None, torch.float32, torch.zeros(1), tuned=True)


_TIMM_LAYER = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_TIMM_HEAD = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")


class TestField:
    def test_who_fails_is_named_and_the_others_go_on(self):
        def failing(error):
            def make():
                raise error

            return make

        makers = {
            "siglip_fast": lambda: lambda: torch.ones(1),
            "siglip_fast, graph": failing(RuntimeError("in /home/someone/code/file.py: broken\nand more")),
            "siglip_fast, tuned": failing(peers.Missing("nothing is tuned")),
            "large": failing(torch.OutOfMemoryError("of 1 TB")),
            "absent": failing(ImportError("No module named 'absent'")),
            "wrong": lambda: lambda: torch.zeros(1),
            "not a number": lambda: lambda: torch.full((1,), float("nan")),
            "right": lambda: lambda: torch.ones(1),
        }
        field = rounds.build(makers, lambda out: (out - 1).abs().item(), 0.5)
        assert list(field.runs) == ["siglip_fast", "right"]
        assert field.broken == {"siglip_fast, graph": "RuntimeError: in file.py: broken"}
        assert field.missing["siglip_fast, tuned"] == "nothing is tuned"
        assert field.missing["large"] == "out of memory"
        assert field.missing["wrong"].endswith("wrong by 1.0e+00, allowed 5e-01")
        assert "wrong by nan" in field.missing["not a number"]


class TestClocks:
    @pytest.mark.parametrize(
        "printed, expected",
        [
            ("1980, 2619, 345.67, 40", {"sm_mhz": 1980, "memory_mhz": 2619, "watts": 345.67, "celsius": 40}),
            ("1980, 2619, [N/A], 40", None),
            (None, None),
        ],
        ids=["all", "not-all", "no-nvidia-smi"],
    )
    def test_read(self, printed, expected, tmp_path, monkeypatch):
        if printed:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!/bin/sh\n[ $1 = -i ] && [ $2 = GPU-some-id ] && echo '{printed}'\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if printed else str(tmp_path))
        monkeypatch.setattr(environment, "DEVICE", "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="some-id"))
        assert environment.clocks() == expected


class TestRunGpu:
    """With a `python` that only notes what it is called for."""

    @pytest.fixture
    def start(self, tmp_path):
        fake, calls, self.out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"

        def start(*arguments, gpu="", behave=""):
            fake.write_text(f"""#!/usr/bin/env bash
echo "$PWD $*" >>{calls}
case "$*" in *get_device_name*) echo "{gpu}" ;; {behave} esac
""")
            fake.chmod(0o755)
            command = [REPO / "bench/run_gpu.sh", "--out", self.out, *arguments]
            return subprocess.Popen(command, env=os.environ | {"PYTHON": str(fake)}, stdout=subprocess.PIPE, text=True)

        self.calls = calls
        return start

    def finish(self, process) -> tuple[int, str]:
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def test_without_a_gpu(self, start):
        status, output = self.finish(start())
        assert status == 0
        assert "NO GPU WAS MEASURED" in output and "| tune-base-patch16-224-bfloat16 | skipped: no GPU | 0 |" in output
        for name in (
            "info",
            "tests-kernels",
            "tests-model",
            "tests-graphs-compile",
            "bench-model",
            "bench-kernels",
            "report",
        ):
            assert f"| {name} | pass |" in output and (self.out / f"{name}.log").exists()
        assert "| bench-kernels | pass |" in (self.out / "summary.md").read_text()

    def test_a_failing_stage_stops_no_other(self, start):
        status, output = self.finish(start(gpu="NVIDIA X", behave="*test_model.py*raw*) exit 3 ;;"))
        assert status == 1
        assert "| bench-model | FAIL: exit status 3 |" in output and "| report | pass |" in output
        assert "NO GPU" not in output
        calls = self.calls.read_text()
        assert "tune --random-weights base-patch16-224 --batch-sizes 1 64 --dtype bfloat16 --budget" in calls
        assert str(REPO) not in {line.split()[0] for line in calls.splitlines()[1:]}  # it runs beside the checkout

    def test_ctrl_c_ends_the_stage_and_the_run(self, start):
        process = start(behave="*tests/kernels/test_attention.py*) sleep 60 ;;")
        while not (self.out / "tests-kernels.log").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        status, output = self.finish(process)
        assert status == 130
        assert "| tests-kernels | interrupted |" in output and "bench-model" not in output

    def test_the_checkout_is_imported_without_being_installed(self, start):
        """-S leaves out site-packages, and with them an installed siglip_fast."""
        code = "import siglip_fast.errors, siglip_fast.kernels as k; print(k.__file__)"
        status, _ = self.finish(start(behave=f"*report.py*) exec {sys.executable} -S -c '{code}' ;;"))
        log = (self.out / "report.log").read_text()
        assert status == 0 and Path(log.strip()).parts[-3:] == ("siglip_fast", "kernels", "__init__.py"), log

    def test_a_tuning_that_ran_out_of_time_is_no_failure(self, start):
        status, output = self.finish(start(gpu="NVIDIA X", behave="*tune*) exit 1 ;;"))
        assert status == 0 and "| tune-base-patch16-224-bfloat16 | partial: see its log |" in output

    def test_only_some_stages(self, start):
        status, output = self.finish(start("--only", "info|tests-model"))
        assert status == 0 and "| info |" in output and "| tests-model |" in output
        assert "tests-kernels" not in output and "bench" not in output.split("Results")[0]

    def test_usage(self, start):
        assert self.finish(start("--fast"))[0] == 2
