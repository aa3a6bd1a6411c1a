"""The models of transformers that hold a SigLIP-like vision tower, tiny and random, each with inputs for its forward.

`ZOO` maps a name to a function without arguments that makes `(model, inputs)`. A function raises `Absent`, with the
reason, where the installed transformers has no such model.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from siglip_fast.ops import Ops

VOCABULARY = 64
IMAGE = 63  # the token in whose place an image's features go
SIZE = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 32, "patch_size": 8}  # 16 of them
VISION = {"model_type": "siglip_vision_model", **SIZE, **PATCHES}
HEADLESS = VISION | {"vision_use_head": False}  # as published vision-language models have it
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP_TEXT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "projection_size": 64}

QUICK = ["siglip_vision", "siglip", "paligemma", "llava", "smolvlm"]
Inputs = dict[str, Tensor]
ZOO: dict[str, Callable[[], tuple[PreTrainedModel, Inputs]]] = {}


class Absent(Exception):
    """The installed transformers lacks the model."""


def zoo(build):
    ZOO[build.__name__] = build
    return build


def make(architecture: str, config: str, **values) -> PreTrainedModel:
    """`transformers.<architecture>(transformers.<config>(**values))`, random, with nothing at its neutral value."""
    for name in (architecture, config):
        if not hasattr(transformers, name):
            raise Absent(f"no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # large enough that the outputs tell one image from another
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                is_norm = "norm" in name or ".ln." in name
                parameter.normal_(float(is_norm and name.endswith("weight")), 0.3)
    return model.eval()


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prompt(image_tokens: int, batch: int = 2) -> Inputs:
    """A few words after an image that takes `image_tokens` tokens."""
    ids = torch.tensor([[1, *[IMAGE] * image_tokens, 5, 6, 7]]).repeat(batch, 1)
    ids[-1, -1] = 8
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# The towers and what siglip's own files make of them


@zoo
def siglip_vision():
    config = {k: v for k, v in VISION.items() if k != "model_type"}
    return make("SiglipVisionModel", "SiglipVisionConfig", **config), {"pixel_values": pixels(2)}


@zoo
def siglip_vision_without_head():
    config = {k: v for k, v in HEADLESS.items() if k != "model_type"}
    return make("SiglipVisionModel", "SiglipVisionConfig", **config), {"pixel_values": pixels(2)}


@zoo
def siglip():
    model = make("SiglipModel", "SiglipConfig", text_config=SIGLIP_TEXT, vision_config=VISION)
    return model, {"input_ids": torch.arange(24).view(3, 8), "pixel_values": pixels(2)}


@zoo
def siglip_classification():
    values = {"text_config": SIGLIP_TEXT, "vision_config": VISION, "num_labels": 3}
    return make("SiglipForImageClassification", "SiglipConfig", **values), {"pixel_values": pixels(2)}


def naflex(height: int = 3, width: int = 5) -> Inputs:
    """Two images: 4 × 4 patches, and `height × width`, padded to 16."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, height * width :] = 0
    shapes = torch.tensor([[4, 4], [height, width]])
    rows = pixels(2).view(2, 16, 192) * mask[..., None]
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}


SIGLIP2_VISION = {**SIZE, "patch_size": 8, "num_patches": 16}


@zoo
def siglip2_vision():
    return make("Siglip2VisionModel", "Siglip2VisionConfig", **SIGLIP2_VISION), naflex()


@zoo
def siglip2():
    model = make("Siglip2Model", "Siglip2Config", text_config=SIGLIP_TEXT, vision_config=SIGLIP2_VISION)
    return model, {"input_ids": torch.arange(24).view(3, 8), **naflex()}


@zoo
def siglip2_classification():
    values = {"text_config": SIGLIP_TEXT, "vision_config": SIGLIP2_VISION, "num_labels": 3}
    return make("Siglip2ForImageClassification", "Siglip2Config", **values), naflex()


# Vision-language models: all build the tower by AutoModel.from_config


def vlm(model: str, *, text: str, **values) -> PreTrainedModel:
    values = {"vision_config": HEADLESS, "text_config": {"model_type": text, **TEXT}} | values
    return make(f"{model}ForConditionalGeneration", f"{model}Config", **values)


@zoo
def paligemma():
    model = vlm("PaliGemma", text="gemma", image_token_index=IMAGE, projection_dim=32, hidden_size=32)
    return model, {**prompt(16), "pixel_values": pixels(2)}


@zoo
def colpali():
    vlm_config = paligemma()[0].config
    model = make("ColPaliForRetrieval", "ColPaliConfig", vlm_config=vlm_config, embedding_dim=16)
    return model, {**prompt(16), "pixel_values": pixels(2)}


@zoo
def pi0():
    dit = {"model_type": "gemma", **TEXT}
    values = {"chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8}
    vlm_config = paligemma()[0].config
    model = make("PI0ForConditionalGeneration", "PI0Config", vlm_config=vlm_config, dit_config=dit, **values)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "state": torch.randn(2, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, generator=generator),
        "timestep": torch.tensor([0.25, 0.75]),
        "pixel_values": pixels(2, 1),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }
    return model, {**prompt(16), **inputs}


GEMMA3 = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 61, "eoi_token_index": 62}


@zoo
def gemma3():
    return vlm("Gemma3", text="gemma3_text", **GEMMA3), {**prompt(4), "pixel_values": pixels(2)}


@zoo
def shieldgemma2():
    text = {"model_type": "gemma3_text", **TEXT}
    values = {"vision_config": HEADLESS, "text_config": text, "yes_token_index": 3, "no_token_index": 4}
    model = make("ShieldGemma2ForImageClassification", "ShieldGemma2Config", **values, **GEMMA3)
    return model, {**prompt(4), "pixel_values": pixels(2)}


@zoo
def t5gemma2():
    text = {"model_type": "t5gemma2_text", **TEXT}
    encoder = {"model_type": "t5gemma2_encoder", "text_config": text, "vision_config": HEADLESS, **GEMMA3}
    decoder = {"model_type": "t5gemma2_decoder", **TEXT}
    values = {"encoder": encoder, "decoder": decoder, "image_token_index": IMAGE}
    model = make("T5Gemma2ForConditionalGeneration", "T5Gemma2Config", **values)
    inputs = {**prompt(4), "pixel_values": pixels(2), "decoder_input_ids": torch.tensor([[1, 5], [1, 6]])}
    return model, inputs


LLAVA = {"image_token_index": IMAGE, "vision_feature_select_strategy": "full"}
# An image of the tower's own size: 16 tokens of the whole, 16 of its one tile and 4 ends of lines
TILES = {"image_sizes": torch.tensor([[32, 32]] * 2)}
PINPOINTS = {"image_grid_pinpoints": [[32, 32], [32, 64]]}


@zoo
def llava():
    return vlm("Llava", text="llama", **LLAVA), {**prompt(16), "pixel_values": pixels(2)}


@zoo
def vipllava():
    values = {"image_token_index": IMAGE, "vision_feature_layers": [-2, -1]}
    # it takes every image's first token for a class token
    return vlm("VipLlava", text="llama", **values), {**prompt(15), "pixel_values": pixels(2)}


@zoo
def llava_next():
    model = vlm("LlavaNext", text="llama", **LLAVA, **PINPOINTS)
    return model, {**prompt(36), **TILES, "pixel_values": pixels(2, 2)}


@zoo
def llava_next_video():
    model = vlm("LlavaNextVideo", text="llama", **LLAVA, **PINPOINTS, video_token_index=62)
    return model, {**prompt(36), **TILES, "pixel_values": pixels(2, 2)}


@zoo
def llava_onevision():
    model = vlm("LlavaOnevision", text="qwen2", **LLAVA, **PINPOINTS, video_token_index=62)
    return model, {**prompt(36), **TILES, "pixel_values": pixels(2, 2)}


@zoo
def aya_vision():
    model = vlm("AyaVision", text="cohere2", **LLAVA, vision_feature_layer=-1, downsample_factor=2)
    return model, {**prompt(4), "pixel_values": pixels(2)}


@zoo
def cohere2_vision():
    values = {"image_token_id": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 48}
    values["vision_config"] = VISION
    return vlm("Cohere2Vision", text="cohere2", **values), {**prompt(4), "pixel_values": pixels(2)}


@zoo
def deepseek_vl():
    model = vlm("DeepseekVL", text="llama", image_token_id=IMAGE)
    return model, {**prompt(16), "pixel_values": pixels(2)}


@zoo
def modernvbert():
    text = {"model_type": "modernbert", **TEXT, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    del text["num_key_value_heads"], text["head_dim"]
    values = {"image_token_id": IMAGE, "pixel_shuffle_factor": 2, "text_config": text}
    model = make("ModernVBertForMaskedLM", "ModernVBertConfig", vision_config=HEADLESS, **values)
    return model, {**prompt(4), "pixel_values": pixels(2, 1)}


@zoo
def colmodernvbert():
    vlm_config = modernvbert()[0].config
    model = make("ColModernVBertForRetrieval", "ColModernVBertConfig", vlm_config=vlm_config, embedding_dim=16)
    return model, {**prompt(4), "pixel_values": pixels(2, 1)}


@zoo
def vision_text_dual_encoder():
    text = {"model_type": "bert", **TEXT}
    config = {"vision_config": VISION, "text_config": text, "projection_dim": 16}
    model = make("VisionTextDualEncoderModel", "VisionTextDualEncoderConfig", **config)
    return model, {**prompt(1), "pixel_values": pixels(2)}


@zoo
def lfm2_vl():
    text = {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]}
    vision = {"model_type": "siglip2_vision_model", **SIGLIP2_VISION}
    values = {"text_config": text, "vision_config": vision, "image_token_id": IMAGE, "downsample_factor": 1}
    return vlm("Lfm2Vl", text="lfm2", **values), {**prompt(16), **naflex(2, 8)}


# Towers that take packed rows of pixels and the grid of each image or video

QWEN3_VL_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 32}
QWEN3_VL_VISION |= {"patch_size": 8, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 60, "vision_end_token_id": 61}


def gridded(model: PreTrainedModel, *row: int, tokens: tuple[int, int] = (4, 3)) -> tuple[PreTrainedModel, Inputs]:
    """And two images, of 4 × 4 and of 2 × 6 patches, in one prompt; a token is what four patches make, mostly."""
    first, second = ([IMAGE] * count for count in tokens)
    ids = torch.tensor([[1, 60, *first, 61, 5, 60, *second, 61, 6]])
    pixel_values = torch.randn(28, *row, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "pixel_values": pixel_values, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 6]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model, inputs


@zoo
def qwen3_vl():
    rope = MROPE | {"mrope_interleaved": True}
    text = TEXT | {"rope_parameters": rope, "rope_scaling": rope}  # the latter until transformers 5
    values = {"text_config": text, "vision_config": QWEN3_VL_VISION, **TOKENS}
    return gridded(make("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", **values), 3 * 2 * 8 * 8)


@zoo
def cosmos3_omni():
    text = {"model_type": "qwen3_vl_text", **TEXT, "rope_parameters": MROPE | {"mrope_interleaved": True}}
    vision = {"model_type": "qwen3_vl_vision", **QWEN3_VL_VISION}
    return gridded(vlm("Cosmos3Omni", text="", text_config=text, vision_config=vision, **TOKENS), 3 * 2 * 8 * 8)


@zoo
def cosmos3_edge():
    text = {"model_type": "cosmos3_edge_text", **TEXT, "rope_parameters": MROPE}
    vision = {"model_type": "cosmos3_edge_vision", **SIGLIP2_VISION}
    values = {"text_config": text, "vision_config": vision, "projector_hidden_size": 48, **TOKENS}
    return gridded(vlm("Cosmos3Edge", text="", **values), 3 * 8 * 8)


@zoo
def paddleocr_vl():
    text = {"model_type": "paddleocr_vl_text", **TEXT, "rope_parameters": MROPE}
    vision = {"model_type": "paddleocr_vl_vision", **SIZE, **PATCHES}
    return gridded(vlm("PaddleOCRVL", text="", text_config=text, vision_config=vision, **TOKENS), 3, 8, 8)


@zoo
def kimi_k25():
    vision = {"model_type": "kimi_k25_vision", **SIZE, "patch_size": 8, "pos_emb_height": 6, "pos_emb_width": 6}
    text = {"model_type": "deepseek_v3", **TEXT, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1}
    text |= {"topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    text |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text |= {"num_key_value_heads": 2, "head_dim": 8}
    values = {"text_config": text, "vision_config": vision, "projection_hidden_size": 64, **TOKENS}
    return gridded(vlm("Kimi_K25", text="", **values), 3, 8, 8)


@zoo
def video_llama_3():
    """One image of whose merge size 2 is, of the other 1."""
    vision = {"model_type": "video_llama_3_vision", **SIZE, "patch_size": 8}
    model, inputs = gridded(vlm("VideoLlama3", text="qwen2", vision_config=vision, **TOKENS), 3 * 8 * 8)
    sizes = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 1, 3]]), "image_merge_sizes": torch.tensor([2, 1])}
    return model, {**inputs, **sizes, "pixel_values": inputs["pixel_values"][:19]}


@zoo
def qwen2_vl():
    text = TEXT | {"rope_parameters": MROPE, "rope_scaling": MROPE}  # the latter until transformers 5
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 4, "patch_size": 8}
    values = {"text_config": text, "vision_config": vision, **TOKENS}
    return gridded(make("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", **values), 3 * 2 * 8 * 8)


@zoo
def ernie4_5_vl_moe():
    text = {**TEXT, "moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    text |= {"mlp_layer_types": ["dense", "sparse"], "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 100, "num_heads": 4, "patch_size": 8}
    values = {"text_config": text, "vision_config": vision, "image_start_token_id": 60, "image_end_token_id": 61}
    values |= {"image_token_id": IMAGE, "video_token_id": 62}
    model = make("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig", **values)
    return gridded(model, 3 * 8 * 8)


@zoo
def glm_image():
    """Of whose images each patch is a token: the nearest of a codebook, so the outputs are equal or far apart. The last
    grid is that of an image to be made."""
    text = {"model_type": "glm_image_text", **TEXT, "vision_vocab_size": 16, "rope_parameters": MROPE}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_heads": 4,
        "patch_size": 8,
        "image_size": 48,
    }
    vq = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 64}
    values = {"text_config": text, "vision_config": vision, "vq_config": vq, "image_token_id": IMAGE}
    model = vlm("GlmImage", text="", **values, image_start_token_id=60, image_end_token_id=61)
    model, inputs = gridded(model, 3 * 8 * 8, tokens=(16, 12))
    to_make = torch.tensor([[1, 4, 4]])
    return model, {**inputs, "image_grid_thw": torch.cat([inputs["image_grid_thw"], to_make])}


@zoo
def hunyuan_vl():
    text = {"model_type": "hunyuan_vl_text", **TEXT, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}}
    vision = {**SIZE, "patch_size": 8, "max_image_size": 48}
    model = vlm("HunYuanVL", text="", text_config=text, vision_config=vision, image_token_id=IMAGE)
    return gridded(model, 3 * 8 * 8, tokens=(8, 6))  # begin, end, and an end of each line


@zoo
def hy_v4_vl():
    text = {"model_type": "hy_v4_vl_text", **TEXT, "moe_intermediate_size": 16, "n_routed_experts": 4}
    text |= {"num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 24, "q_lora_rank": 8, "kv_lora_rank": 8}
    text |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 8, "rope_parameters": MROPE}
    vision = {**SIZE, "patch_size": 8, "max_image_size": 48, "out_hidden_size": 32}
    model = vlm("HYV4VL", text="", text_config=text, vision_config=vision, image_token_id=IMAGE)
    return gridded(model, 3 * 8 * 8, tokens=(6, 4))  # an end of each line


@zoo
def qwen2_5_vl():
    """Beside Qwen3-VL, with layers of another kind."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = TEXT | {"rope_parameters": rope, "rope_scaling": rope}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
    tokens = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 60, "vision_end_token_id": 61}
    model = make(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", text_config=text, vision_config=vision, **tokens
    )
    inputs = qwen3_vl()[1]
    return model, inputs


def minicpm(model: str, **values) -> tuple[PreTrainedModel, Inputs]:
    """Two images, of 4 × 4 and of 4 × 8 patches, in one prompt; squares of 2 × 2 become one behind the first layer."""
    text = {"model_type": "qwen3_5_text", **TEXT, "layer_types": ["full_attention"] * 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text["rope_parameters"]["partial_rotary_factor"] = 1.0
    values |= {"text_config": text, "vision_config": SIZE | PATCHES | {"insert_layer_id": 0}, "insert_layer_id": 0}
    values |= {"image_token_id": IMAGE, "video_token_id": 62, "downsample_mode": "16x"}
    model = make(f"{model}ForConditionalGeneration", f"{model}Config", **values)
    ids = torch.tensor([[1, 60, IMAGE, 61, 5, 60, *[IMAGE] * 2, 61, 6]])
    strip = torch.randn(1, 3, 8, 48 * 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[4, 4], [4, 8]], dtype=torch.int32)
    inputs = {"input_ids": ids, "pixel_values": strip, "target_sizes": sizes}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model, inputs


@zoo
def minicpmv4_6():
    return minicpm("MiniCPMV4_6")


@zoo
def minicpmv4_7():
    slices = {"slice_start_id": 58, "slice_end_id": 59, "newline_id": 57}
    return minicpm("MiniCPMV4_7", image_start_id=60, image_end_id=61, **slices)


@zoo
def minicpm_ocr():
    return minicpm("MiniCPMOcr")


# SigLIP's layers under other names, with embeddings for images of any shape


@zoo
def idefics2():
    vision = SIZE | PATCHES
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1}
    perceiver |= {"resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1}
    values = {"vision_config": vision, "perceiver_config": perceiver, "image_token_id": IMAGE}
    return vlm("Idefics2", text="mistral", **values), {**prompt(4), "pixel_values": pixels(2, 1)}


@zoo
def idefics3():
    values = {"vision_config": SIZE | PATCHES, "image_token_id": IMAGE, "scale_factor": 2}
    return vlm("Idefics3", text="llama", **values), {**prompt(4), "pixel_values": pixels(2, 1)}


@zoo
def smolvlm():
    values = {"vision_config": SIZE | PATCHES, "image_token_id": IMAGE, "scale_factor": 2}
    return vlm("SmolVLM", text="llama", **values), {**prompt(4), "pixel_values": pixels(2, 1)}


def padded(model: PreTrainedModel, inputs: Inputs) -> tuple[PreTrainedModel, Inputs]:
    """The second image is smaller than the batch: the tower gets a mask."""
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    mask[1, :, :, 16:] = False
    return model, {**inputs, "pixel_attention_mask": mask}


@zoo
def idefics2_padded():
    return padded(*idefics2())


@zoo
def idefics3_padded():
    return padded(*idefics3())


@zoo
def smolvlm_padded():
    return padded(*smolvlm())


@zoo
def aria():
    """Idefics3's tower; reads its states before the last layer."""
    text = {"model_type": "aria_text", **TEXT, "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}
    vision = {"model_type": "idefics3_vision", **SIZE, **PATCHES}
    values = {"vision_config": vision, "text_config": text, "image_token_index": IMAGE, "vision_feature_layer": -2}
    model = vlm("Aria", text="aria_text", **values, projector_patch_to_query_dict={16: 4})
    return model, {**prompt(4), "pixel_values": pixels(2)}


@zoo
def aria_padded():
    model, inputs = padded(*aria())
    mask = inputs.pop("pixel_attention_mask")
    return model, {**inputs, "pixel_mask": mask[:, 0]}


@zoo
def phi4_multimodal():
    """A crop and the whole image, both for the causal attention that stock has where nothing is padded."""
    vision = {**SIZE, "image_size": 32, "crop_size": 32, "patch_size": 8, "image_token_id": IMAGE, "feature_layer": -2}
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}
    audio |= dict.fromkeys(("nemo_conv_channels", "ext_pw_out_channel", "depthwise_separable_out_channel"), 16)
    values = {**TEXT, "vision_config": vision, "audio_config": audio | {"audio_token_id": 62}}
    del values["head_dim"]
    model = make("Phi4MultimodalForCausalLM", "Phi4MultimodalConfig", **values)
    mask = torch.ones(2, 2, 4, 4)
    sizes = {"image_sizes": torch.tensor([[32, 32]] * 2), "image_attention_mask": mask}
    return model, {**prompt(13), "image_pixel_values": pixels(2, 2), **sizes}


@zoo
def phi4_multimodal_padded():
    """The second image is half as wide as its crop."""
    model, inputs = phi4_multimodal()
    inputs["image_attention_mask"][1, 1, :, 2:] = 0
    inputs["input_ids"][1, 12:14] = 5  # which takes two tokens less
    return model, inputs


# Crops and tiles of one size


@zoo
def molmo2():
    vision = {**SIZE, "num_key_value_heads": 4, "head_dim": 16, "image_size": [32, 32], "patch_size": 8}
    adapter = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    adapter |= {"vision_feature_layer": [1, 0], "intermediate_size": 48, "text_hidden_size": 32}
    values = {"vision_config": vision, "adapter_config": adapter, "image_patch_id": IMAGE}
    model = vlm("Molmo2", text="molmo2_text", **values)
    # each token pools 2 × 2 of an image's 4 × 4 patches
    patches = torch.arange(32).view(2, 2, 2, 2, 2).transpose(2, 3).reshape(8, 4)
    grids = {"image_token_pooling": patches, "image_grids": torch.tensor([[2, 2, 0, 0]] * 2)}
    return model, {**prompt(4), "pixel_values": pixels(2).view(2, 16, 192), **grids}


@zoo
def granite_docling():
    vision = {**SIZE, **PATCHES, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    values = {"vision_config": vision, "image_token_id": IMAGE, "pad_token_id": 0}
    model = vlm("GraniteDocling", text="granite_docling_text", **values)
    mask = torch.ones(2, 1, dtype=torch.bool)
    return model, {**prompt(4), "pixel_values": pixels(2, 1), "pixel_attention_mask": mask}


@zoo
def janus():
    vision = {**SIZE, **PATCHES, "mlp_ratio": 1.5, "projection_dim": 32, "depth": 1, "num_image_tokens": 16}
    del vision["intermediate_size"]
    vq = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    vq |= {"projection_dim": 32, "image_token_embed_dim": 32, "latent_channels": 32, "num_patches": 4}
    values = {"vision_config": vision, "vq_config": vq, "image_token_id": IMAGE}
    return vlm("Janus", text="llama", **values), {**prompt(16), "pixel_values": pixels(2)}


def quick(names: Iterable[str]) -> list:
    """Parameters of a test: those in QUICK for every day, the others for the slow tier."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def build(name: str) -> tuple[PreTrainedModel, Inputs]:
    """`ZOO[name]()`; skips the test that asks where the model is absent."""
    try:
        return ZOO[name]()
    except Absent as error:
        pytest.skip(f"transformers {transformers.__version__} has {error}")


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor of the model's output."""
    return tensors(model(**inputs))


@contextlib.contextmanager
def fused_attentions() -> Iterator[list[str]]:
    """The backends of the fused attentions that run meanwhile: one a layer of every fused forward."""
    calls, attention = [], Ops.attention
    Ops.attention = lambda self, *args: calls.append(self.backend) or attention(self, *args)
    try:
        yield calls
    finally:
        Ops.attention = attention


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative Frobenius error of any tensor; inf where names or shapes differ."""
    shapes = [{name: t.shape for name, t in outputs.items()} for outputs in (actual, expected)]
    if shapes[0] != shapes[1]:
        return float("inf")
    pairs = [(actual[n].double(), expected[n].double()) for n in expected]
    return max(0.0 if torch.equal(a, e) else float((a - e).norm() / e.norm()) for a, e in pairs)


def tensors(value: object, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a (nested) output, under its path; caches are left out, the logits tell about them."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {}
    return {path: t for key, item in items for path, t in tensors(item, f"{name}.{key}").items()}
