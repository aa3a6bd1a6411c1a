"""bench/: which cases and peers there are, what becomes of a candidate that fails, and what a row says."""

import json
import os
import subprocess
import sys
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
from siglip_fast.tuning import cache
from siglip_fast.tuning.select import unmeasured


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

    def test_short_runs_are_part_of_full(self):
        for device in ("cuda", "cpu"):
            full = {case[:3] for case in cases.CASES[device, "full"]}
            assert {case[:3] for extent in ("quick", "second") for case in cases.CASES[device, extent]} < full

    @pytest.mark.parametrize(
        "extent, model, modes",
        [
            ("quick", "base-patch16-224", {"default"}),
            ("second", "base-patch16-224", {"max-autotune"}),
            ("second", "so400m-patch14-384", set()),
            ("full", "so400m-patch14-384", {"default", "reduce-overhead", "max-autotune"}),
        ],
    )
    def test_compiled_peers(self, extent, model, modes, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_BENCH", extent)
        case, compiled = cases.Case(model, 64, "bfloat16"), [p for p in peers.PEERS["cuda"] if "compile" in p]
        assert {p.partition(", ")[2] for p in compiled if not cases.left_out(case, "cuda", p, 0)} == modes
        assert all(
            "used up" in cases.left_out(case, "cuda", f"torch.compile, {m}", 1e3) for m in modes if extent != "full"
        )
        assert not cases.left_out(case, "cuda", "timm", 1e3)

    def test_an_unknown_extent(self, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_BENCH", "all")
        with pytest.raises(ValueError, match="expected quick, second, full or robots"):
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

    @pytest.mark.parametrize("choices, expected", [("built-in", "off"), ("tuned", None)])
    def test_which_configurations_ours_runs(self, choices, expected, monkeypatch):
        seen = []
        forward = SiglipVisionModel.forward

        def spy(self, *args, **kwargs):
            seen.append(os.environ.get("SIGLIP_FAST_TUNE"))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(SiglipVisionModel, "forward", spy)
        monkeypatch.setattr(peers, "is_tuned", lambda cases, device: True)
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "the user's")
        with torch.no_grad():
            peers.siglip_fast(SiglipVisionConfig(**TINY), torch.float32, torch.zeros(1, 3, 24, 24), choices)()
        assert seen == [expected, "the user's"]

    def test_tuned_needs_a_gpu(self):
        with pytest.raises(peers.Missing, match="not tuned"):
            peers.siglip_fast(SiglipVisionConfig(**TINY), torch.float32, torch.zeros(1), "tuned")

    def test_a_race_needs_one_too_and_an_empty_cache(self, monkeypatch):
        with pytest.raises(peers.Missing, match="races are for GPUs"):
            peers.siglip_fast(SiglipVisionConfig(**TINY), torch.float32, torch.zeros(1), "raced")
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "off")
        monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", "the user's")
        with peers.configurations("raced"):
            assert "SIGLIP_FAST_TUNE" not in os.environ and not os.listdir(os.environ["SIGLIP_FAST_CACHE_DIR"])
        assert os.environ["SIGLIP_FAST_CACHE_DIR"] == "the user's"

    def test_tuned_is_a_model_whose_own_operations_are(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        gpu, config = torch.device("cuda"), SiglipVisionConfig(**TINY)
        small, large = (peers.tuning_cases(config, torch.bfloat16, size) for size in (1, 64))
        found = {"route": "vendor", "config": None, "microseconds": {"vendor": 1.0}}
        entries = {}
        for case in small:
            entry = {"eager": found, "graph": found, "dropped": {}, "raced": True}
            entries.setdefault(str(case.operation), {})[str(cache.bucket(case.rows))] = entry
        cache.write(cache.Key.of(gpu), entries)
        assert not peers.is_tuned(small, gpu)
        for buckets in entries.values():
            for entry in buckets.values():
                del entry["raced"]
        cache.write(cache.Key.of(gpu), entries)
        assert peers.is_tuned(small, gpu) and not peers.is_tuned(large, gpu)
        assert not peers.is_tuned(peers.tuning_cases(config, torch.float16, 1), gpu)
        assert not peers.is_tuned(small, torch.device("cpu"))
        entries[str(small[0].operation)] = {str(cache.bucket(small[0].rows)): unmeasured("nothing passed")}
        cache.write(cache.Key.of(gpu), entries)
        assert not peers.is_tuned(small, gpu)


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

    def test_who_fails_while_it_is_timed_is_dropped_and_the_others_go_on(self):
        times = {"siglip_fast": iter([3.0, 1.0, 2.0]), "peer": iter([1.0])}
        field = rounds.Field(runs=dict.fromkeys(times))
        names = iter(times)

        def make_turn(run):
            own = times[next(names)]
            return lambda: next(own)

        assert rounds.race(field, make_turn, 3) == {"siglip_fast": 2.0}
        assert "StopIteration" in field.missing["peer"] and not field.broken


class Nvml:
    """As nvidia-ml-py, for one GPU that is known by its UUID."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, lacks: str = ""):
        self.lacks, self.begun = lacks, 0

    def nvmlInit(self):
        self.begun += 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-some-id":
            raise self.NVMLError
        return "handle"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        assert gpu == "handle"
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetTemperature(self, gpu, kind):
        return 40

    def nvmlDeviceGetPowerUsage(self, gpu):
        if self.lacks == "power":
            raise self.NVMLError
        return 345_670


class TestEnvironment:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(environment, "DEVICE", "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="some-id"))
        for function in (environment._nvml, environment.about):
            function.cache_clear()
        yield
        for function in (environment._nvml, environment.about):
            function.cache_clear()

    @pytest.mark.parametrize("lacks, watts", [("", {"watts": pytest.approx(345.67)}), ("power", {})])
    def test_clocks(self, lacks, watts, monkeypatch):
        nvml = Nvml(lacks)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        expected = {"sm_mhz": 1980, "memory_mhz": 3201, "celsius": 40} | watts
        assert environment.clocks() == environment.clocks() == expected and nvml.begun == 1

    def test_without_nvml_nothing_is_known(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert environment.clocks() is None

    def test_another_gpus_clocks_are_not_told(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", Nvml())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="another"))
        assert environment.clocks() is None

    def test_about(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", Nvml())
        monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("SIGLIP_FAST_REVISION", "abc")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        about = environment.about()
        assert (about["device"], about["capability"], about["driver"]) == ("A GPU", "9.0", "580.1")
        assert about["revision"] == "abc" and about["gpu_measured"] and not about["imitated"] and about["tuned"] == []
        json.dumps(about)


class TestRows:
    """Benchmarks in a pytest of their own, that of bench/."""

    TEST = """
import os

def test_one(row):
    row({"milliseconds": 1})

def test_two(row):
    row({"milliseconds": 2})
    os._exit(9)  # as if killed
"""

    def test_a_row_is_there_once_it_is_measured(self, pytester_of_bench):
        status, rows = pytester_of_bench(self.TEST)
        assert status == 9 and [row["milliseconds"] for row in rows] == [1, 2]
        assert all({"device", "versions", "revision", "gpu_measured"} <= set(row["about"]) for row in rows)

    @pytest.fixture
    def pytester_of_bench(self, tmp_path):
        def run(code: str):
            bench = Path(environment.__file__).parent
            (tmp_path / "test_rows.py").write_text(code)
            (tmp_path / "conftest.py").write_text((bench / "conftest.py").read_text())
            rows = tmp_path / "rows.jsonl"
            path = os.pathsep.join(map(str, (bench, bench.parent / "tests/helpers")))
            command = [sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, tmp_path, "--rows", rows]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True)
            return done.returncode, [json.loads(line) for line in rows.read_text().splitlines()]

        return run
