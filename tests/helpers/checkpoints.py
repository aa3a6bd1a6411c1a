"""A tiny SigLIP saved as the Hub has them: config, weights, tokenizer and image processor; nothing is downloaded."""

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


def save_tiny_paligemma(folder: Path) -> None:
    """Of `zoo.paligemma`, the weights only."""
    zoo.paligemma()[0].save_pretrained(folder)
