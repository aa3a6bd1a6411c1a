"""Checkpoints of tiny random models, whole with tokenizer and processor, as servers want them."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin

TEXT = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 64}
VISION = {"hidden_size": 144, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 48, "patch_size": 16}
STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def tokenizer(*special: str, image: str = "") -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones behind these; a chat is its texts and images, one behind the other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_only, additional_special_tokens=[*special], **names)
    part = "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}" + image + "{% endif %}"
    made.chat_template = "{% for m in messages %}{% for c in m['content'] %}" + part + "{% endfor %}{% endfor %}"
    return made


def save(model: nn.Module, processor: ProcessorMixin, folder: Path) -> Path:
    """With weights by which outputs tell images apart; under the names of towers that vLLM reads."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {_older(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


def _older(name: str) -> str:
    """Until transformers 5.6 SigLIP's tower was a module inside of its model, and so its weights are still named for vLLM."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name


def llava(folder: Path) -> Path:
    text = tokenizer("<image>", image="<image>")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=9,
    )
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.SiglipImageProcessor(size=size),
        tokenizer=text,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="full",
        chat_template=text.chat_template,
    )
    return save(transformers.LlavaForConditionalGeneration(config), processor, folder)


def siglip(folder: Path) -> Path:
    text = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 160, "vocab_size": 320}
    text |= {"num_hidden_layers": 2, "max_position_embeddings": 256, "projection_size": VISION["hidden_size"]}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    processor = transformers.SiglipProcessor(transformers.SiglipImageProcessor(size=size), tokenizer())
    return save(transformers.SiglipModel(config), processor, folder)


def qwen3_vl(folder: Path) -> Path:
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    text = tokenizer(*special, image="<|vision_start|><|image_pad|><|vision_end|>")
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={
            **{"depth": 3, "hidden_size": 128, "num_heads": 2, "intermediate_size": 160, "out_hidden_size": 128},
            **{"patch_size": 16, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        },
        **dict(zip(names, text.convert_tokens_to_ids([*special]), strict=True)),
    )
    limits = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=16, size=limits, **STATISTICS),
        text,
        transformers.Qwen3VLVideoProcessor(patch_size=16, size=limits, **STATISTICS),
        chat_template=text.chat_template,
    )
    return save(transformers.Qwen3VLForConditionalGeneration(config), processor, folder)
