"""Tiny models saved as the Hub has them: config, weights, and tokenizer or image processor; nothing is downloaded."""

import json
from pathlib import Path

import torch
import zoo
from models import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

WORDS = ["<pad>", "<unk>", "</s>", *"a photo of cat dog".split()]
TINY_TEXT = {
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "hidden_size": 64,
    "projection_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def save_tiny_siglip(folder: Path) -> None:
    """Of `models.TINY` (images of 24 pixels, embeddings of 64); it knows the words "a photo of cat dog"."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "model_max_length": 16}
    SiglipProcessor(
        SiglipImageProcessor(size={"height": 24, "width": 24}),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=TINY_TEXT, vision_config=TINY)).save_pretrained(folder)


def save_tiny_naflex(folder: Path, vision_only: bool = False, processor: dict | None = None, **vision) -> None:
    """Of `zoo.siglip2`, patches of 8 pixels and embeddings of 64; its image processor makes 20 patches at most, and has
    SigLIP's defaults nowhere else. `processor` and `vision` replace settings of it and of the vision config."""
    settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 20}
    settings |= {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | (processor or {})))
    if vision_only:
        zoo.make("Siglip2VisionModel", "Siglip2VisionConfig", **zoo.SIGLIP2_VISION | vision).save_pretrained(folder)
    else:
        zoo.siglip2()[0].save_pretrained(folder)


def save_tiny_paligemma(folder: Path) -> None:
    """Of `zoo.paligemma`, the weights only."""
    zoo.paligemma()[0].save_pretrained(folder)


def save_tiny_qwen3_vl(folder: Path) -> None:
    """Of `zoo.qwen3_vl`, the weights only."""
    zoo.qwen3_vl()[0].save_pretrained(folder)


def save_tiny_pi0(folder: Path) -> None:
    """The model alone."""
    zoo.pi0()[0].save_pretrained(folder)
