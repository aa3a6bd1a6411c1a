"""Races of the built-in configuration against the vendor's routes: who wins, when there is one, and what becomes of it.

Times are made up; forwards, checks, files, threads and processes are real, kernels Triton's interpreter's.
"""

import copy
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import zoo
from device import DEVICE, ON_GPU
from models import TINY, drop_in, stock_model
from packed_towers import naflex_inputs, qwen3_vl_inputs, qwen3_vl_tower
from torch.utils._pytree import tree_map
from transformers import Siglip2VisionConfig, SiglipVisionConfig

import siglip_fast
from siglip_fast.backends import select, vendor
from siglip_fast.backends import triton as triton_backend
from siglip_fast.backends.choice import DEFAULT, Choice
from siglip_fast.backends.triton import RUN
from siglip_fast.ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding
from siglip_fast.tuning import cache, race
from siglip_fast.tuning.cache import Key, Operation
from siglip_fast.tuning.cases import Case, cases, inputs, plain_result, row_moments

CPU = torch.device("cpu")
CONFIG = SiglipVisionConfig(**TINY)
VENDOR = Choice("vendor")
APPLIES, STOPWATCH = race.applies, race.Stopwatch
OTHERS = {"sdpa": 9e-6, "sdpa flash": 9e-6, "sdpa cudnn": 9e-6, "sdpa efficient": 9e-6, "flash_attn": 9e-6}


class FakeStopwatch:
    """Seconds on the GPU and on the host that are told, by route."""

    gpu = {"triton": 2e-6, "vendor": 1e-6} | OTHERS
    host: dict = {}
    made: list = []

    def __init__(self, run, args):
        self.made.append(args)

    def on_gpu(self, choice):
        seconds = self.gpu[str(choice)]
        return lambda: seconds() if callable(seconds) else seconds

    def on_host(self, choice):
        return self.host.get(str(choice), 0.0)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A process that has raced nothing, on what it takes for a GPU. → the stopwatch class, whose `made` counts the races."""
    monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SIGLIP_FAST_TUNE", raising=False)
    monkeypatch.setattr(race, "applies", lambda tensor: True)
    monkeypatch.setattr(race, "_found", {})
    race._say.cache_clear()
    stopwatch = type("Stopwatch", (FakeStopwatch,), {"made": []})
    monkeypatch.setattr(race, "Stopwatch", stopwatch)
    return stopwatch


class TestRule:
    @pytest.mark.parametrize(
        "ours, vendors, winner",
        [
            ([100], [97.9], VENDOR),
            ([100], [98.1], DEFAULT),
            ([100], [100], DEFAULT),
            ([100], [101], DEFAULT),
            ([90, 100, 100], [91], DEFAULT),  # ours was once as fast: noise
            ([92, 100, 100], [91], VENDOR),
            ([100, 100, 100], [91, 91, 500], VENDOR),  # medians, not means
            ([100, 100, 100], [50, 99, 99], DEFAULT),  # nor minima
        ],
    )
    def test_ours_stays_unless_the_vendor_is_faster_beyond_noise(self, ours, vendors, winner):
        assert race.beyond_noise({DEFAULT: ours, VENDOR: vendors}) == winner

    def test_the_fastest_of_several_routes(self):
        seconds = {DEFAULT: [5.0], Choice("sdpa"): [4.0], Choice("sdpa cudnn"): [3.0]}
        assert race.beyond_noise(seconds) == Choice("sdpa cudnn")

    def test_nobody_to_race_against(self):
        assert race.beyond_noise({DEFAULT: [1.0]}) == DEFAULT


def one(*_):
    return torch.ones(2, 8)


class TestRace:
    """One race, of a function that takes whatever choice."""

    args = (torch.zeros(2, 8),)

    def test_the_entry(self):
        entry, seconds = race.race("layernorm", one, self.args)
        found = {"route": "vendor", "config": None, "microseconds": {"triton": 2.0, "vendor": 1.0}}
        assert entry == {"eager": found, "graph": found, "dropped": {}, "raced": True}
        assert cache.is_raced(entry) and cache.is_measured(entry) and not cache.is_tuned(entry)
        assert seconds > 0

    def test_launched_eagerly_the_hosts_time_counts(self, fresh):
        fresh.host = {"vendor": 1.99e-6, "triton": 50e-6}  # ours will be launched by a plan
        entry, _ = race.race("layernorm", one, self.args)
        assert (entry["eager"]["route"], entry["graph"]["route"]) == ("triton", "vendor")
        assert entry["eager"]["microseconds"] == {"triton": 2.0, "vendor": 1.99}

    def test_all_routes_take_part(self, fresh):
        fresh.gpu = fresh.gpu | {"sdpa efficient": 1e-6}
        entry, _ = race.race("attention", one, self.args)
        assert set(entry["graph"]["microseconds"]) == {"triton", *vendor.routes("attention")}
        assert entry["eager"]["route"] == "sdpa efficient"

    def test_they_take_turns(self, fresh):
        order = []
        fresh.gpu = {name: lambda name=name: order.append(name) or 1e-6 for name in ("triton", "vendor")}
        race.race("layernorm", one, self.args)
        assert order == ["triton", "vendor"] * sum(race.ROUNDS)

    def test_a_route_that_disagrees_or_raises_is_out(self, fresh):
        def run(choice, x):
            if choice.route == "sdpa":
                return one() * 1.5
            if choice.route == "sdpa flash":
                raise RuntimeError("no kernel for this head_dim\nand more")
            return one()

        fresh.gpu = fresh.gpu | {"sdpa": 1e-9, "sdpa flash": 1e-9}
        entry, _ = race.race("attention", run, self.args)
        assert entry["eager"]["route"] == entry["graph"]["route"] == "triton"
        assert entry["dropped"] == {
            "sdpa": "disagrees: relative difference 0.5, allowed 1e-05",
            "sdpa flash": "RuntimeError: no kernel for this head_dim",
        }

    def test_nothing_is_found_without_the_built_in_one(self, fresh):
        def run(choice, x):
            if choice == DEFAULT:
                raise ValueError("it does not run")
            return one()

        with pytest.raises(ValueError, match="it does not run"):
            race.race("layernorm", run, self.args)
        fresh.on_gpu = lambda self, choice: {VENDOR: lambda: 1e-6}[choice]  # it runs once, and then not
        with pytest.raises(RuntimeError, match="KeyError"):
            race.race("layernorm", one, self.args)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nothing_is_found_where_the_result_is_not_finite(self, bad):
        """In an overflow or on a user's NaN right results may differ as they like."""
        with pytest.raises(ArithmeticError, match="not finite"):
            race.race("layernorm", lambda *_: one().index_fill(0, torch.tensor([1]), bad), self.args)


def real_cases(dtype):
    shapes = [
        ("layernorm_linear", (768, 1152, True), 60),
        ("layernorm_linear", (2304, 768, False), 60),
        ("linear_residual", (1152, 4304, True), 60),
        ("linear_residual", (768, 768, False), 3),
        ("attention", (196, 2, 64), 2),
        ("attention", (729, 2, 72), 2),
        ("layernorm", (768,), 60),
        ("patch_embed", (192, 768, 16, 196), 196),
        ("attention_pool", (196, 768, 12), 2),
    ]
    return [Case(Operation(name, dims, dtype), rows) for name, dims, rows in shapes]


class TestAgreement:
    """What two right results may differ by, and what a wrong one differs by."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_four_times_pytorchs_own_error(self, dtype):
        for case in real_cases(dtype):
            args = inputs(case, CPU)
            exact = plain_result(case, tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, args))
            error = ((plain_result(case, args) - exact).norm() / exact.norm()).item()
            assert 4 * error + 2e-6 < race.tolerance(args), case

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @torch.no_grad()
    def test_right_routes_agree(self, dtype, device):
        agreed = set()
        for case in cases(CONFIG, 9, dtype, [2]):
            args, name = inputs(case, torch.device(device)), case.operation.name
            check = race.agreement(RUN[name], args)
            for route in vendor.routes(name):
                try:
                    assert check(Choice(route)) is None, f"{case} {route}"
                except (RuntimeError, NotImplementedError) as error:
                    assert route.startswith("sdpa "), f"{case} {route}: {error}"
                    continue
                agreed.add(name)
        assert agreed == {case.operation.name for case in cases(CONFIG, 9, dtype, [2])}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_wrong_ones_do_not(self, dtype):
        for case in real_cases(dtype):
            name, args = case.operation.name, inputs(case, CPU)
            wrong = {}
            if name == "attention":
                (qkv,) = args
                wrong["a phantom key"] = (torch.cat([qkv, torch.zeros_like(qkv[:, :1])], dim=1),), slice(0, -1)
                wrong["a lost key"] = (qkv[:, :-1],), slice(0, None)
            for i, arg in enumerate(args):
                if isinstance(arg, Linear | NormedLinear | PatchEmbedding):
                    weight = arg.weight.clone()
                    weight[:, -1] = 0
                    spoiled = *args[:i], arg._replace(weight=weight), *args[i + 1 :]
                    wrong["a lost column"] = spoiled, slice(0, None)
            right = plain_result(case, args)
            for what, (spoiled, part) in wrong.items():
                out = plain_result(case, spoiled)[:, part] if name == "attention" else plain_result(case, spoiled)
                expected = right[:, : out.shape[1]] if name == "attention" else right
                assert "disagrees: relative" in (race.disagreement(out, expected, race.tolerance(args)) or ""), (
                    case,
                    what,
                )

    def test_a_fragment_of_one_row(self):
        right = torch.randn(12544, 768)
        wrong = right.clone()
        wrong[-1, 64:128] = 0
        assert race.disagreement(right, right, 1.6e-2) is None
        assert "relative difference of a row" in race.disagreement(wrong, right, 1.6e-2)

    def test_a_row_of_zeros_is_not_a_wrong_one(self):
        right = torch.cat([torch.zeros(1, 64), torch.ones(3, 64)])
        assert race.disagreement(right, right, 1e-5) is None

    def test_not_a_number_shape_and_dtype(self):
        ones = torch.ones(4, 8)
        assert "relative difference nan" in race.disagreement(ones * float("nan"), ones, 1e-2)
        assert race.disagreement(ones[:3], ones, 1e-2).startswith("disagrees: torch.float32 [3, 8], not")
        assert race.disagreement(ones.half(), ones, 1e-2).startswith("disagrees: torch.float16 [4, 8], not")

    def test_row_moments(self):
        out, moments = torch.ones(4, 64), torch.ones(4, 2, 1)
        run = lambda choice, x: (out, moments * (1 if choice == DEFAULT else 1.1))  # noqa: E731
        assert "disagrees" in race.agreement(run, (out,))(VENDOR)

    def test_tf32_is_as_coarse_as_fp16(self, monkeypatch):
        args = (torch.ones(2, 2),)
        assert race.tolerance(args) == 1e-5
        monkeypatch.setattr(race, "input_precision", lambda dtype: "tf32")
        assert race.tolerance(args) == 2**-9

    def test_the_coarsest_of_several_dtypes(self):
        linear = Linear(torch.ones(2, 2).bfloat16(), torch.ones(2).bfloat16())
        assert race.tolerance((torch.ones(2, 2), linear)) == 2**-6


D = 64


def rows_of(rows) -> torch.Tensor:
    return torch.randn(rows, D, device=DEVICE)


def layernorm(selection_on=race.selection_on, rows=9) -> torch.Tensor:
    """A call through a backend made anew, as a model's after each edit of its weights."""
    return call(select.load("triton", selection_on), rows_of(rows))


def call(backend, x):
    return backend.layernorm(x, row_moments(x), Norm(x.new_ones(D), x.new_zeros(D), 1e-6), None)


def in_file(device=DEVICE) -> dict:
    return cache.read(Key.of(torch.device(device)))


@pytest.fixture
def ran(monkeypatch):
    """The routes by which layernorm ran, races among them."""
    routes, layernorm = [], RUN["layernorm"]

    def record(choice, *args):
        routes.append(choice.route)
        return layernorm(choice, *args)

    monkeypatch.setitem(triton_backend.RUN, "layernorm", record)
    return routes


class TestWhen:
    """Through a backend, as a model calls it."""

    def test_the_winner_runs_from_then_on(self, fresh, ran):
        backend = select.load("triton", race.selection_on)
        call(backend, rows_of(9))
        assert len(fresh.made) == 1 and ran[-1] == "vendor"
        ran.clear()
        call(backend, rows_of(9))
        assert ran == ["vendor"] and len(fresh.made) == 1
        entry = in_file()["layernorm 64 float32"]["16"]
        assert entry["raced"] and entry["graph"]["route"] == "vendor"

    def test_later_processes_race_no_more(self, fresh, ran, monkeypatch):
        layernorm()
        monkeypatch.setattr(race, "_found", {})
        fresh.gpu = fresh.gpu | {"vendor": 9e-6}  # would lose now
        ran.clear()
        layernorm()
        assert ran == ["vendor"] and len(fresh.made) == 1

    def test_near_numbers_of_rows_share_a_race(self, fresh):
        backend = select.load("triton", race.selection_on)
        for rows, races in ((16, 1), (4, 1), (64, 1), (65, 2), (2, 3), (1, 3)):
            call(backend, rows_of(rows))
            assert len(fresh.made) == races, rows

    def test_not_where_tuned(self, fresh, ran):
        found = {"route": "triton", "config": None, "microseconds": {"triton": 1.0}}
        cache.write(
            Key.of(torch.device(DEVICE)),
            {"layernorm 64 float32": {"16": {"eager": found, "graph": found, "dropped": {}}}},
        )
        layernorm()
        assert ran == ["triton"] and not fresh.made

    def test_not_with_off(self, fresh, ran, monkeypatch):
        layernorm()
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "off")
        ran.clear()
        layernorm()
        layernorm(rows=200)
        assert ran == ["triton", "triton"] and len(fresh.made) == 1

    @pytest.mark.skipif(ON_GPU, reason="needs Triton's interpreter")
    def test_not_on_a_cpu(self, fresh, ran, monkeypatch):
        monkeypatch.setattr(race, "applies", APPLIES)
        layernorm(lambda device: race.Racing(Key.of(device), {}))
        assert not fresh.made

    def test_after_a_capture_not_inside(self, fresh, ran, monkeypatch):
        backend = select.load("triton", race.selection_on)
        monkeypatch.setattr(race, "is_capturing", lambda tensor: True)
        call(backend, rows_of(9))
        assert ran == ["triton"] and not fresh.made
        monkeypatch.setattr(race, "is_capturing", lambda tensor: False)
        call(backend, rows_of(9))
        assert ran[-1] == "vendor" and len(fresh.made) == 1

    def test_a_graph_of_ours_has_its_own_winner(self, fresh, ran):
        """Its warm-up races, and what it captures is what the race found for graphs."""
        fresh.host = {"vendor": 50e-6}
        backend = select.load("triton", race.selection_on)
        with select.for_graph():
            call(backend, rows_of(9))
            assert ran[-1] == "vendor"
        call(backend, rows_of(9))
        assert ran[-1] == "triton" and len(fresh.made) == 1

    def test_until_the_budget_is_spent(self, fresh, ran, monkeypatch, caplog):
        monkeypatch.setattr(race, "BUDGET", 0.05)
        fresh.gpu = fresh.gpu | {"vendor": lambda: time.sleep(0.01) or 1e-6}
        backend = select.load("triton", race.selection_on)
        with caplog.at_level(logging.INFO):
            for rows in (9, 200, 9, 200):
                call(backend, rows_of(rows))
        assert len(fresh.made) == 1 and ran[-2:] == ["vendor", "triton"]
        assert caplog.text.count("races are over") == 1
        assert list(in_file()["layernorm 64 float32"]) == ["16"]  # the next process goes on with the other

    def test_bytes_have_no_rival(self, fresh, device):
        weight, bias = torch.randn(D, 192, device=device).half(), torch.randn(D, device=device)
        position = torch.zeros(1, D, device=device).half()
        pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, device=device)
        backend = select.load("triton", race.selection_on)
        backend.patch_embed(pixels, PatchEmbedding(weight, bias, 8, 0.5), position)
        assert not fresh.made
        backend.patch_embed(pixels.half(), PatchEmbedding(weight, bias.half(), 8), position)
        assert len(fresh.made) == 1

    def test_mixed_dtypes_are_an_operation_of_their_own(self, fresh, device):
        ops = Ops("triton", race.selection_on)
        x, weight = torch.randn(9, D, device=device), torch.randn(32, D, device=device)
        for dtype in (torch.float32, torch.float16):
            linear = Linear(weight.to(dtype), torch.zeros(32, device=device, dtype=dtype))
            ops.linear_residual(x.to(dtype), linear, torch.zeros(9, 32, device=device))
        assert set(in_file()) == {"linear_residual 32x64x1 float32", "linear_residual 32x64x1 float16+float32"}


class TestTrouble:
    def test_a_failing_race_breaks_no_forward(self, fresh, ran, caplog):
        def fails(self, run, args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")

        fresh.__init__ = fails
        with caplog.at_level(logging.WARNING):
            out = layernorm()
        assert ran == ["triton"] and out.isfinite().all()
        assert (
            "racing layernorm 64 float32, 9 rows failed, its built-in configuration runs: OutOfMemoryError"
            in caplog.text
        )
        assert in_file() == {}

    def test_disagreement_is_told(self, ran, monkeypatch, caplog):
        monkeypatch.setattr(vendor, "layernorm", lambda x, *_: torch.zeros_like(x))
        with caplog.at_level(logging.WARNING):
            layernorm()
        assert ran[-1] == "triton"
        assert "racing layernorm 64 float32, 9 rows: vendor is out, disagrees: relative difference 1" in caplog.text

    def test_a_route_that_raises_is_told(self, ran, monkeypatch, caplog):
        monkeypatch.setattr(vendor, "layernorm", lambda *args: 1 / 0)
        with caplog.at_level(logging.INFO):
            layernorm()
        assert ran[-1] == "triton" and "vendor is out, ZeroDivisionError: division by zero" in caplog.text

    def test_not_a_number_in_a_users_data(self, fresh, ran, caplog):
        backend = select.load("triton", race.selection_on)
        with caplog.at_level(logging.WARNING):
            call(backend, rows_of(9) * float("nan"))
        assert "its result is not finite" in caplog.text and in_file() == {}
        layernorm()
        assert len(in_file()) == 1

    def test_a_folder_that_cannot_be_written(self, fresh, ran, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path / "file"))
        with caplog.at_level(logging.INFO):
            layernorm()
            layernorm()
            layernorm(rows=200)
        assert ran[-1] == "vendor" and len(fresh.made) == 2  # holds for the backends to come, in this process
        assert caplog.text.count("is kept for this process only") == 1

    def test_one_race_for_all_threads(self, fresh, ran):
        fresh.gpu = fresh.gpu | {"vendor": lambda: time.sleep(0.02) or 1e-6}
        backend, start = select.load("triton", race.selection_on), threading.Barrier(4)
        others = [select.load("triton", race.selection_on) for _ in range(2)]

        def run(backend):
            start.wait()
            call(backend, rows_of(9))
            chosen.append(backend.selection(rows_of(1).device).choice("layernorm", (D,), torch.float32, 9).route)

        chosen: list[str] = []
        threads = [threading.Thread(target=run, args=(each,)) for each in (backend, backend, *others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(fresh.made) == 1 and chosen == 4 * ["vendor"]

    def test_threads_that_come_first_together_share_a_selection(self):
        together = threading.Barrier(2)

        def selection_on(device):
            together.wait()  # both found that there is none
            return race.selection_on(device)

        backend, found = select.load("triton", selection_on), []
        threads = [threading.Thread(target=lambda: found.append(backend.selection(CPU))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] is found[1] is backend.selection(CPU)


# Both race the same operations at the same time, with opposite results.
PROCESS = textwrap.dedent("""
    import sys, torch
    from siglip_fast.tuning import race

    vendors = float(sys.argv[1])

    class Stopwatch:
        def __init__(self, run, args): pass
        def on_gpu(self, choice): return lambda: 1.0 if choice.route == "triton" else vendors
        def on_host(self, choice): return 0.0

    race.applies, race.Stopwatch = lambda tensor: True, Stopwatch
    selection = race.selection_on(torch.device("cpu"))
    print("ready", flush=True)
    sys.stdin.readline()
    for D in range(8, 48):
        selection.settle("layernorm", (D,), torch.float32, 9, lambda choice, x: x, (torch.ones(9, D),))
    print([selection.choice("layernorm", (D,), torch.float32, 9).route for D in range(8, 48)])
""")


def test_two_processes_at_once():
    command = [sys.executable, "-c", PROCESS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, vendors], **pipes) for vendors in ("0.5", "2.0")]
    assert [process.stdout.readline() for process in processes] == 2 * ["ready\n"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert first == second  # whose race ended first has its result in force in both
    entries = in_file("cpu")
    routes = [entries[f"layernorm {D} float32"]["16"]["eager"]["route"] for D in range(8, 48)]
    assert f"{routes}\n" == first
    assert not [path for path in Key.of(CPU).path().parent.iterdir() if path.suffix == ".part"]


class TestModel:
    @torch.no_grad()
    def test_a_forward_races_each_operation_once(self, fresh):
        stock = stock_model(CONFIG).half().to(DEVICE)
        model, pixels = drop_in(stock, backend="triton").to(DEVICE), torch.randn(2, 3, 24, 24).half().to(DEVICE)
        outputs = model(pixels)
        wanted = {str(case.operation) for case in cases(CONFIG, 9, torch.float16, [2])}
        raced = in_file()
        assert {name.replace("True", "1") for name in raced} == wanted
        assert all(cache.is_raced(entry) for buckets in raced.values() for entry in buckets.values())
        races = len(fresh.made)
        torch.testing.assert_close(outputs[:], stock(pixels)[:], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(model(pixels)[:], outputs[:], atol=2e-2, rtol=2e-2)
        model.forget_derived()
        model(pixels)
        assert len(fresh.made) == races

    @pytest.mark.parametrize("tower", ["naflex", "qwen3_vl"])
    @torch.no_grad()
    def test_packed_images(self, fresh, tower):
        """Every operation that has a vendor's route, which wins and is right; what goes by segments has none."""
        if tower == "naflex":
            stock = stock_model(Siglip2VisionConfig(**zoo.SIGLIP2_VISION), "sdpa", "Siglip2VisionModel").to(DEVICE)
            model = drop_in(stock, backend="triton", strict=True).to(DEVICE)
            call = {name: value.to(DEVICE) for name, value in naflex_inputs([(3, 5), (4, 4)], 16).items()}
            alone = {"patch_embed_rows", "layernorm_linear", "linear_residual", "layernorm"}
        else:
            stock = qwen3_vl_tower().to(DEVICE)
            model = siglip_fast.apply_to(copy.deepcopy(stock), backend="triton", strict=True)
            call = dict(zip(("hidden_states", "grid_thw"), qwen3_vl_inputs([(1, 4, 2), (1, 2, 6)]), strict=True))
            alone = {"patch_embed_rows", "layernorm_linear", "linear_residual", "layernorm", "linear"}
        model(**call)
        entries = in_file()
        assert {name.split()[0] for name in entries} == alone
        assert all(entry["graph"]["route"] == "vendor" for buckets in entries.values() for entry in buckets.values())
        assert not any(entry["dropped"] for buckets in entries.values() for entry in buckets.values())
        races = len(fresh.made)
        assert zoo.error(zoo.tensors(model(**call)), zoo.tensors(stock(**call))) < 1e-4
        assert len(fresh.made) == races

    @torch.no_grad()
    def test_with_pixels_of_another_dtype(self):
        """As processors make them. The patch embedding is another operation then, the others are not."""
        model = drop_in(stock_model(CONFIG).half(), backend="triton").to(DEVICE)
        model(torch.randn(2, 3, 24, 24, device=DEVICE))
        named = {name.split()[0]: name.rpartition(" ")[2] for name in in_file()}
        assert named.pop("patch_embed") == "float16+float32"
        assert set(named.values()) == {"float16"} and len(named) == 5


LAYERNORM_TILE = {"BLOCK_M": 4, "BLOCK_N": 64, "num_warps": 4}


class TestTuning:
    """What `tune` does with what races left."""

    CASE = Case(Operation("layernorm", (D,), torch.float32), 9)

    @pytest.fixture
    def search(self, monkeypatch):
        from siglip_fast.tuning import tune as tuning

        monkeypatch.setattr(tuning, "cases_of", lambda *_: [self.CASE])
        wanted_by = []

        def measure(wanted, entries, key, device, deadline, worker, stall):
            wanted_by.append(wanted)
            if self.has_time:
                for case in wanted:
                    found = {"route": "triton", "config": LAYERNORM_TILE, "microseconds": {"triton M=4": 0.5}}
                    entry = {"eager": found, "graph": found, "dropped": {}}
                    entries[str(case.operation)] = {"16": entry}
                    cache.update(key, {str(case.operation): {"16": entry}})

        self.has_time = True
        monkeypatch.setattr(tuning, "_measure", measure)
        return SimpleNamespace(
            tune=lambda: tuning.tune(CONFIG, torch.float32, [1], CPU),
            auto=lambda: tuning.first_contact(CONFIG, torch.float32, 1, 9, CPU),
            wanted_by=wanted_by,
        )

    def test_it_replaces_them(self, search, ran):
        layernorm()
        assert search.tune().left == [] and search.wanted_by == [[self.CASE]]
        assert cache.is_tuned(in_file()["layernorm 64 float32"]["16"])
        search.tune()
        assert search.wanted_by[1:] == [[]]
        layernorm()
        assert ran[-1] == "triton"

    def test_what_there_was_no_time_for_is_left(self, search, ran):
        layernorm()
        self.has_time = False
        report = search.tune()
        assert report.left == [self.CASE] and report.entries == {}
        layernorm()
        assert ran[-1] == "vendor"  # the race's result holds

    def test_auto_still_tunes(self, search, monkeypatch):
        layernorm()
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        search.auto()
        search.auto()
        assert search.wanted_by == [[self.CASE]]

    def test_auto_without_time_tries_once(self, search, ran, monkeypatch):
        layernorm()
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        self.has_time = False
        search.auto()
        search.auto()
        assert search.wanted_by == [[self.CASE]]
        layernorm()
        assert ran[-1] == "vendor"


class TestStopwatch:
    """What it asks of torch.cuda, of which there is an imitation here: a queue, and a clock that its end reads."""

    @pytest.fixture
    def watch(self, monkeypatch):
        monkeypatch.setattr(race, "Stopwatch", STOPWATCH)
        queue: list[str] = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                queue.append("event")
                self.at = len(queue)

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return sum(1.0 for each in queue[self.at : end.at] if each != "event")  # a millisecond each

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=self.cache_size)
        )
        monkeypatch.setattr(STOPWATCH, "_fill", lambda self, times: queue.extend(times * ["fill"]))
        self.cache_size = 4096
        return queue

    def test_a_round(self, watch):
        args = (torch.ones(4, 8), Linear(torch.ones(8, 8), torch.ones(8)))
        seen = []
        stopwatch = race.Stopwatch(lambda choice, *args: watch.append("call") or seen.append(args), args)
        sample = stopwatch.on_gpu(DEFAULT)
        watch.clear(), seen.clear()
        assert sample() == pytest.approx(1e-3)
        assert watch[0] == "fill" and watch[watch.index("event") :] == ["event", *race.CALLS * ["call"], "event"]
        # each call has memory of its own, with the same values
        assert len({args[0].data_ptr() for args in seen}) == len({args[1].weight.data_ptr() for args in seen}) == 8
        assert all(torch.equal(copy[1].bias, args[1].bias) for copy in seen)
        assert stopwatch.on_host(DEFAULT) > 0

    def test_the_queue_is_filled_for_as_long_as_launching_takes(self, watch):
        args = (torch.ones(4, 8),)
        stopwatch = race.Stopwatch(lambda choice, x: time.sleep(2e-3) or watch.append("call"), args)
        sample = stopwatch.on_gpu(DEFAULT)
        watch.clear()
        sample()
        assert watch.count("fill") >= 2 * race.CALLS * 2  # of a millisecond each
        stopwatch._seconds_a_fill = 1e-9
        watch.clear()
        sample()
        assert watch.count("fill") == race.MAX_FILLS

    def test_its_memory_is_bounded(self, watch, monkeypatch):
        monkeypatch.setattr(race, "COPIES_BYTES", 3 * 4 * 32)
        monkeypatch.setattr(race, "FLUSH_BYTES", 5000)
        for rows, copies in ((4, 3), (8, 1), (100, 1)):
            stopwatch = race.Stopwatch(lambda choice, x: x, (torch.ones(rows, 8),))
            assert len(stopwatch._copies) == copies
            assert stopwatch._buffer.nbytes == 5000

    def test_a_whole_race(self, monkeypatch, device):
        """Each operation on its own arguments, by the host's clock, in the interpreter: times that mean nothing."""
        monkeypatch.setattr(race, "Stopwatch", STOPWATCH)

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = time.perf_counter()

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
        monkeypatch.setattr(race, "CALLS", 2)
        monkeypatch.setattr(race, "ROUNDS", (1, 1))
        for case in {case.operation.name: case for case in cases(CONFIG, 9, torch.float16, [1])}.values():
            name, args = case.operation.name, inputs(case, torch.device(device))
            entry, seconds = race.race(name, RUN[name], args)
            known = {"triton", *vendor.routes(name)}
            assert seconds > 0 and {*entry["graph"]["microseconds"], *entry["dropped"]} == known, case
            assert len(entry["graph"]["microseconds"]) >= 2
            for launch in cache.LAUNCHES:
                assert entry[launch]["route"] in entry[launch]["microseconds"]
                assert all(microseconds > 0 for microseconds in entry[launch]["microseconds"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch):
    """A route with a fifth of the work wins, one with five times the work does not."""
    monkeypatch.setattr(race, "Stopwatch", STOPWATCH)
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)

    def repeated(times):
        for _ in range(times):
            out = x @ x
        return out

    for ours, vendors, winner in ((5, 1, "vendor"), (1, 5, "triton")):
        run = lambda choice, x: repeated(ours if choice == DEFAULT else vendors)  # noqa: B023, E731
        entry, _ = race.race("layernorm", run, (x,))
        assert entry["graph"]["route"] == winner, json.dumps(entry)
