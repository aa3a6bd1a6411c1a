"""What the tuner takes for right: outputs that are spoiled a little, inputs of which a part is lost, the vendor's routes."""

import pytest
import torch
from models import TINY
from transformers import SiglipVisionConfig

from siglip_fast.backends.choice import Choice
from siglip_fast.tuning.cache import Operation
from siglip_fast.tuning.cases import Case, cases, inputs, plain_result, row_moments
from siglip_fast.tuning.verify import Verifier

CPU = torch.device("cpu")
CONFIG = SiglipVisionConfig(**TINY)


def wrong_by_a_little(out):
    return out * 1.02


def last_column_lost(out):
    out[..., -1] = 0
    return out


def not_a_number(out):
    out.view(-1)[7] = float("nan")
    return out


def a_fragment_lost(out):
    out[3, 64:] = 0  # 8 of 2520 values: nothing that the norm of all would show
    return out


class TestVerifier:
    case = Case(Operation("linear_residual", (72, 136, True), torch.float16), 35)

    @pytest.fixture
    def verify(self):
        args = inputs(self.case, CPU)
        verifier = Verifier(self.case, CPU, args)

        def verify(spoil=lambda out: out, spoil_moments=lambda m: m):
            out = plain_result(self.case, args)
            moments = row_moments(out)
            return verifier(lambda: (spoil(out.clone()), spoil_moments(moments)))

        return verify

    def test_right(self, verify):
        assert verify() is None

    @pytest.mark.parametrize("spoil", [wrong_by_a_little, last_column_lost, not_a_number, a_fragment_lost])
    def test_wrong(self, verify, spoil):
        assert "wrong: relative error" in verify(spoil)

    def test_a_fragment_is_lost_in_a_large_result(self):
        case = Case(Operation("linear_residual", (768, 768, True), torch.bfloat16), 12544)
        args = inputs(case, CPU)
        out = plain_result(case, args)
        out[-1, 64:128] = 0
        assert "wrong: relative error of a row" in Verifier(case, CPU, args)(lambda: out)

    def test_wrong_shape_and_dtype(self, verify):
        assert verify(lambda out: out.float()) == "wrong: torch.float32 [35, 72]"
        assert verify(lambda out: out[:-1]) == "wrong: torch.float16 [34, 72]"

    def test_wrong_moments(self, verify):
        assert "wrong row moments" in verify(spoil_moments=lambda m: m * 1.01)

    @pytest.mark.parametrize("unwritten", ["out", "moments"])
    def test_unwritten_memory_is_not_what_was_there_before(self, verify, unwritten):
        def reuse(tensor):
            # an allocator may well return the block that held the last candidate's right result
            memory = torch.empty_like(tensor)
            return memory if memory.isnan().all() else tensor

        spoil = {"spoil": reuse} if unwritten == "out" else {"spoil_moments": reuse}
        assert "wrong" in verify(**spoil)

    def test_not_deterministic(self, verify):
        noise = iter([0.0, 1e-3])
        assert verify(lambda out: out + next(noise)) == "not the same bits twice"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
class TestInputs:
    """What a broken kernel would do to them is far outside of what is allowed."""

    def check(self, name: str, dtype: torch.dtype, spoil) -> None:
        config = SiglipVisionConfig(**TINY | {"hidden_size": 256, "intermediate_size": 1024})
        for case in cases(config, 9, dtype, [3]):
            if case.operation.name == name and case.operation.dims != (256, 256, False):
                args, spoiled = inputs(case, CPU), inputs(case, CPU)
                out = plain_result(case, spoil(spoiled))
                assert "wrong: relative error" in (Verifier(case, CPU, args)(lambda: out) or ""), case  # noqa: B023

    @pytest.mark.parametrize("name, index", [("layernorm_linear", 2), ("linear_residual", 1), ("patch_embed", 1)])
    @pytest.mark.parametrize("lost", [slice(-1, None), slice(16, 32)], ids=["the last column", "a block of K"])
    def test_a_part_of_k_is_lost(self, dtype, name, index, lost):
        def spoil(args):
            args[index].weight[:, lost] = 0
            return args

        self.check(name, dtype, spoil)

    def test_the_residual_is_lost(self, dtype):
        self.check("linear_residual", dtype, lambda args: (*args[:2], torch.zeros_like(args[2])))

    def test_a_phantom_key(self, dtype):
        [case] = [c for c in cases(CONFIG, 9, dtype, [2]) if c.operation.name == "attention"]
        (qkv,) = inputs(case, CPU)
        longer = torch.cat([qkv, torch.zeros_like(qkv[:, :1])], dim=1)
        reason = Verifier(case, CPU, (qkv,))(lambda: plain_result(case, (longer,))[:, :-1])
        assert "wrong: relative error" in reason

    def test_a_lost_key(self, dtype):
        [case] = [c for c in cases(CONFIG, 200, dtype, [2]) if c.operation.name == "attention"]
        (qkv,) = inputs(case, CPU)
        short = torch.cat([plain_result(case, (qkv[:, :-1],)), qkv[:, -1:, 0] * 0], dim=1)
        reason = Verifier(case, CPU, (qkv,))(lambda: short)
        assert "wrong: relative error" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_vendor_routes_are_right(dtype, device):
    """Those that the device has: on a CPU attention only by torch's own choice."""
    from siglip_fast.backends import vendor
    from siglip_fast.tuning.candidates import run

    ran = set()
    for case in cases(CONFIG, 9, dtype, [2]):
        args = inputs(case, torch.device(device))
        verifier = Verifier(case, torch.device(device), args)
        for choice in map(Choice, vendor.routes(case.operation.name)):
            try:
                wrong = verifier(lambda: run(case, choice, args))  # noqa: B023
            except (RuntimeError, NotImplementedError) as error:
                assert choice.route.startswith("sdpa "), f"{case} {choice}: {error}"
                continue
            assert wrong is None, f"{case} {choice}"
            ran.add((case.operation.name, choice.route))
    assert len({name for name, _ in ran}) == 6
