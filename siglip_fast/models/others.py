"""Vision towers of transformers that are close to SigLIP's and are left alone, each with the reason."""

_GATED = "RMSNorm and a gated MLP in place of LayerNorm and fc1, fc2"
_SCALED = "its layers scale what they add (LayerScale)"

# By the class's name, as `transformers.models.PART.modeling_PART` has it: that part, and the reason
_OTHERS = {
    "MiniMaxM3VLVisionModel": ("minimax_m3_vl", "rotary positions of three axes, on a part of each head"),
    "MuseGlimmerVisionModel": ("muse_glimmer", "most of its layers attend in windows"),
    "MuseSparkVisionModel": ("muse_spark", "most of its layers attend in windows"),
    "Step3p7VisionModel": ("step3p7", _SCALED),
    "Inkling2VisionModel": ("inkling2", _SCALED),
    "InternVLVisionModel": ("internvl", _SCALED),
    "Llama4VisionModel": ("llama4", "a class token, and a LayerNorm before the first layer"),
    "MLCDVisionModel": ("mlcd", "a class token, and a LayerNorm before the first layer"),
    "Qwen2_5_VisionTransformerPretrainedModel": ("qwen2_5_vl", _GATED),
    "Qwen2_5OmniVisionEncoder": ("qwen2_5_omni", _GATED),
    "Exaone4_5_VisionModel": ("exaone4_5", _GATED),
    "Glm4vVisionModel": ("glm4v", _GATED),
    "Glm4vMoeVisionModel": ("glm4v_moe", _GATED),
    "GlmOcrVisionModel": ("glm_ocr", _GATED),
    "Glm5NextVisionModel": ("glm5_next", _GATED),
    "Dots3NoteVisionModel": ("dots3_note", _GATED),
    "Gemma4VisionModel": ("gemma4", _GATED),
    "Ovis2VisionModel": ("ovis2", _GATED),
    "Aimv2VisionModel": ("aimv2", _GATED),
    "Lfm3VlVisionModel": ("lfm3_vl", "RMSNorm and short convolutions"),
}
OTHERS = {f"transformers.models.{part}.modeling_{part}.{name}": reason for name, (part, reason) in _OTHERS.items()}
