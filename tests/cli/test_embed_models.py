"""`siglip-fast embed`: which checkpoints and untrained models it takes."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from embed_command import (
    DEFAULTS,
    PROCESSOR,
    TINY,
    check,
    checkpoint,
    expected,
    here,
    make_checkpoint,
    picture,
    read,
    run,
    save,
    tiny_variant,
)
from transformers import SiglipVisionConfig

from siglip_fast.models.variants import VARIANTS, UnknownVariantError, config_for

__all__ = ["checkpoint", "here", "tiny_variant"]  # fixtures


# A file closed before its writer shows only as an exception that Python ignored.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class TestModels:
    def test_random_weights_are_seeded_and_loud(self, here, tiny_variant, capsys):
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(None, *names, "--random-weights", tiny_variant, "--seed", 5, "--out", "out.parquet") == 0
        assert "!!!  RANDOM WEIGHTS: tiny-patch8-32, seed 5, not trained." in capsys.readouterr().err
        metadata = parquet.read_schema("out.parquet").metadata
        assert metadata[b"model"] == b"tiny-patch8-32" and metadata[b"random_weights"] == b"seed 5"
        torch.manual_seed(5)
        transformers.SiglipVisionModel(SiglipVisionConfig(**TINY)).save_pretrained("stock")
        check(read("out.parquet")[1], expected(here / "stock", [picture(0), picture(1)], processor=DEFAULTS))

    def test_exactly_one_model_is_asked_for(self, here, checkpoint):
        for args in ([], ["--model", str(checkpoint), "--random-weights", "base-patch16-224"]):
            with pytest.raises(SystemExit) as exit:
                run(None, "a.png", "--out", "out.npy", *args)
            assert exit.value.code == 2

    def test_unknown_variants_list_the_known(self, here, capsys):
        save("a.png", picture(0))
        assert run(None, "a.png", "--random-weights", "huge-patch1-1", "--out", "out.npy") == 2
        err = capsys.readouterr().err
        assert "'huge-patch1-1'" in err and "so400m-patch14-384" in err
        with pytest.raises(UnknownVariantError):
            config_for("base-patch16")

    def test_every_variant_has_a_config(self):
        assert len(VARIANTS) == 17
        for name, sizes in VARIANTS.items():
            config = config_for(name)
            assert name.endswith(f"-patch{config.patch_size}-{config.image_size}")
            assert config.hidden_size % config.num_attention_heads == 0
            assert {key: getattr(config, key) for key in sizes} == sizes
        assert config_for("so400m-patch14-384").intermediate_size == 4304

    def test_pool_mean_for_a_model_without_head(self, here, capsys):
        checkpoint = make_checkpoint(here / "headless", vision_use_head=False)
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(checkpoint, *names, "--out", "out.parquet") == 2
        assert "has no pooling head: use --pool mean" in capsys.readouterr().err
        assert not Path("out.parquet").exists()
        assert run(checkpoint, *names, "--out", "out.parquet", "--pool", "mean") == 0
        check(read("out.parquet")[1], expected(checkpoint, [picture(0), picture(1)], pool="mean"))

    def test_bfloat16(self, here, checkpoint):
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(checkpoint, *names, "--out", "out.parquet", "--dtype", "bfloat16") == 0
        rows = read("out.parquet")[1]
        full = expected(checkpoint, [picture(0), picture(1)])
        stock = expected(checkpoint, [picture(0), picture(1)], dtype=torch.bfloat16)
        assert 1e-6 < np.linalg.norm(rows - full) <= 2 * np.linalg.norm(stock - full)
        assert parquet.read_schema("out.parquet").metadata[b"dtype"] == b"bfloat16"

    def test_the_stock_path_tells_why_it_ran(self, here, capsys):
        checkpoint = make_checkpoint(here / "relu", hidden_act="relu")
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet") == 0
        assert "ran on: stock transformers, because " in capsys.readouterr().out
        assert b"stock transformers, because" in parquet.read_schema("out.parquet").metadata[b"backend"]
        check(read("out.parquet")[1], expected(checkpoint, [picture(0)]))

    def test_a_checkpoint_with_its_text_tower(self, here, capsys):
        text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=TINY)
        model = transformers.SiglipModel(config)
        model.save_pretrained("whole")
        save("a.png", picture(0))
        assert run(Path("whole"), "a.png", "--out", "out.parquet") == 0
        err = capsys.readouterr().err
        assert "whole has no preprocessor_config.json: using SigLIP's defaults" in err
        assert "UNEXPECTED" not in err and "text_model" not in err
        check(read("out.parquet")[1], expected(here / "whole", [picture(0)], processor=DEFAULTS))

    def test_models_that_cannot_be_loaded(self, here, capsys):
        save("a.png", picture(0))
        make_checkpoint(here / "broken")
        Path("broken/model.safetensors").write_bytes(b"not weights at all")
        Path("empty").mkdir()
        bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        transformers.BertModel(transformers.BertConfig(vocab_size=9, **bert)).save_pretrained("bert")
        transformers.Siglip2TextConfig().save_pretrained("text")
        for name, change in {"wide": {"intermediate_size": 72}, "deep": {"num_hidden_layers": 3}}.items():
            config = json.loads((make_checkpoint(here / name) / "config.json").read_text())
            (here / name / "config.json").write_text(json.dumps(config | change))
        Path("in").mkdir()
        for model, message in {
            "broken": "cannot load broken: ",
            "empty": "empty: ",
            "/no/such/model": "/no/such/model: no such folder, and no id on the Hugging Face Hub (OWNER/NAME)",
            "in/models": "in/models: no such folder",  # in a folder that there is
            "here": "here: no such folder",
            "bert": "bert is no SigLIP model: its config has model_type 'bert'",
            "text": "text is no SigLIP model: its config has model_type 'siglip2_text_model'",
            "wide": "cannot load wide: ",
            "deep": "deep is no SigLIP vision model: lacks 16 weights such as ",
        }.items():
            capsys.readouterr()
            assert run(Path(model), "a.png", "--out", "out.parquet") == 2
            err = capsys.readouterr().err
            assert message in err.splitlines()[-1]
            assert "Traceback" not in err and "above" not in err
            if model == "wide":
                told = "[128], by the config [72]" if transformers.__version__ > "5" else "not of the config's shape"
                assert f"mlp.fc1.bias is {told}" in err.splitlines()[-1]
        assert not Path("out.parquet").exists()

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (PROCESSOR | {"size": {"height": 16, "width": 16}}, "makes [16, 16] pixels, the model takes 32²"),
            (PROCESSOR | {"do_resize": False}, "makes [9, 8] pixels"),
            (PROCESSOR | {"image_processor_type": "CLIPImageProcessor"}, "the image processor CLIPImageProc"),
        ],
    )
    def test_a_processor_that_does_not_fit(self, here, capsys, processor, message):
        checkpoint = make_checkpoint(here / "model", processor=processor)
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet") == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "message"),
        [(["--device", "nonsense"], "--device nonsense: "), (["--backend", "triton"], "backend='triton' cannot")],
    )
    def test_where_it_cannot_run(self, here, checkpoint, capsys, monkeypatch, args, message):
        import triton

        from siglip_fast.backends import select

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        select._triton_unavailable.cache_clear()
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet", *args) == 2
        select._triton_unavailable.cache_clear()
        assert message in capsys.readouterr().err

    def test_options_for_ray_are_not_ignored_without_it(self, here, checkpoint, capsys):
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.npy", "--ray-actors", 3) == 2
        assert "--ray-actors is for --ray" in capsys.readouterr().err
        assert run(checkpoint, "a.png", "--out", "out.npy", "--part-size", 3) == 2
        assert "--part-size is for a folder" in capsys.readouterr().err
        assert os.listdir() == ["a.png"]

    def test_arguments_that_make_no_sense(self, checkpoint, capsys):
        for args in (["--batch-size", "0"], ["--workers", "-1"], ["--pool", "max"], ["--dtype", "int8"]):
            with pytest.raises(SystemExit) as exit:
                run(checkpoint, "a.png", "--out", "out.npy", *args)
            assert exit.value.code == 2
            assert args[0] in capsys.readouterr().err
