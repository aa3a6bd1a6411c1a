"""`siglip-fast demo`: what it tells, draws and refuses."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from embed_command import checkpoint, here, make_checkpoint, tiny_variant
from PIL import Image

from siglip_fast.cli import demo
from siglip_fast.cli.main import main

__all__ = ["checkpoint", "here", "tiny_variant"]  # fixtures


# A file closed before its writer shows only as an exception that Python ignored.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class TestDemo:
    @pytest.fixture(autouse=True)
    def needs_the_extra(self):
        pytest.importorskip("skimage")
        pytest.importorskip("matplotlib")

    def test_agreement_is_told_and_drawn(self, here, tiny_variant, capsys):
        Path("demo.png").write_text("older")
        args = ["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"]
        assert main(args) == 0
        out, err = capsys.readouterr()
        assert "RANDOM WEIGHTS" in err and "random weights" in out
        assert "backend cpu" in out and "They agree." in out
        for name in demo.PHOTOS:
            cosine, difference = next(line for line in out.splitlines() if line.startswith(name)).split()[1:3]
            assert float(cosine) == pytest.approx(1, abs=1e-6) and 0 <= float(difference) < 1e-4
        speeds = out[out.index("images/s") :].splitlines()[1:4]
        assert [line.split("  ")[1] for line in speeds] == ["stock sdpa", "stock eager", "siglip_fast"]
        assert all(" times" in line for line in speeds[:2])
        with Image.open("demo.png") as image:
            assert image.format == "PNG" and min(image.size) > 900
        assert os.listdir() == ["demo.png"]

    @pytest.mark.parametrize("spoiled", demo.ATTENTIONS)
    def test_disagreement_is_status_1(self, here, tiny_variant, capsys, monkeypatch, spoiled):
        twin = demo.stock_twin

        def wrong(model, attention):
            stock = twin(model, attention)
            assert stock.config._attn_implementation == attention
            assert type(stock) is transformers.SiglipVisionModel
            if attention == spoiled:
                mlp = getattr(stock, "vision_model", stock).encoder.layers[0].mlp
                shift = torch.zeros_like(mlp.fc2.bias)
                shift[3] = 0.01
                mlp.fc2.bias = torch.nn.Parameter(mlp.fc2.bias + shift)  # ours stays as it is
            return stock

        monkeypatch.setattr(demo, "stock_twin", wrong)
        args = ["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"]
        assert main(args) == 1
        assert "THEY DISAGREE" in capsys.readouterr().out
        assert Path("demo.png").exists()

    def test_a_model_without_head(self, here, capsys):
        checkpoint = make_checkpoint(here / "headless", vision_use_head=False)
        assert main(["demo", "--out", "demo.png", "--model", str(checkpoint), "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert "pooler_output" not in out and "last_hidden_state" in out
        assert "random" not in out and "RANDOM" not in err

    def test_the_missing_extra_is_named(self, here, tiny_variant, capsys, monkeypatch):
        for module in ("skimage", "matplotlib"):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                assert main(["demo", "--random-weights", tiny_variant]) == 2
            assert "pip install -e '.[demo]'" in capsys.readouterr().err
        assert os.listdir() == []

    def test_a_failure_leaves_the_older_picture(self, here, tiny_variant, monkeypatch):
        Path("demo.png").write_text("older")

        def fail(*args, **kwargs):
            raise ZeroDivisionError

        monkeypatch.setattr(demo, "draw", fail)
        with pytest.raises(ZeroDivisionError):
            main(["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"])
        assert os.listdir() == ["demo.png"] and Path("demo.png").read_text() == "older"

    @pytest.mark.parametrize(("error", "agree"), [(0.0, True), (9e-5, True), (2e-4, False), (np.nan, False)])
    def test_tolerance(self, error, agree):
        def outputs(error, scale):
            tokens = torch.ones(2, 4, 3)
            tokens[1, 2, 1] += error
            return {"last_hidden_state": tokens * scale, "pooler_output": torch.ones(2, 3)}

        for scale in (1, 100):  # above 1 it is relative
            assert demo.compare(["a", "b"], outputs(0, scale), outputs(error, scale))[1] == agree
        small = demo.compare(["a", "b"], outputs(0, 0.01), outputs(error, 0.01))
        assert small[1] == np.isfinite(error)

    def test_principal_colors_show_what_differs(self):
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randn(2, 32, generator=generator)
        side = torch.arange(16).reshape(4, 4) % 4 >= 2  # the right half
        tokens = kinds[side.long().flatten()] + 0.01 * torch.randn(16, 32, generator=generator)
        ours, stock = demo.principal_colors(tokens, tokens.clone(), (4, 4))
        assert ours.shape == (4, 4, 3) and ours.dtype == np.uint8
        assert (ours == stock).all()
        left, right = ours[:, :2, 0].astype(int), ours[:, 2:, 0].astype(int)
        assert abs(left.mean() - right.mean()) > 200 and np.ptp(left) < 50 and np.ptp(right) < 50
        changed = tokens.clone()
        changed[5] = kinds[1]
        ours, stock = demo.principal_colors(tokens, changed, (4, 4))
        assert (ours != stock).any(axis=2).sum() == 1 and (ours[1, 1] != stock[1, 1]).any()
