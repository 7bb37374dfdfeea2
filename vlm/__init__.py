"""A vision-language model from scratch, built chapter by chapter.

This is the table of contents: each chapter's module and the public names in it. A
module is imported when one of its names is first used: `import vlm` is quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["GemmaConfig", "PaliGemmaConfig", "SiglipVisionConfig"],
        "siglip": ["SiglipVisionModel"],
        "rmsnorm": ["GemmaRMSNorm"],
        "rope": ["GemmaRotaryEmbedding"],
        "kv_cache": ["KVCache", "StaticKVCache"],
        "gemma": ["GemmaForCausalLM"],
        "processing": ["PaliGemmaProcessor"],
        "paligemma": ["PaliGemmaForConditionalGeneration"],
        "sampling": ["generate", "stream"],
        "weights": ["load_hf_model", "save_hf_model"],
        "mask_tokens": ["MaskDecoder"],
        "detection": ["parse_detections"],
        "segmentation": ["parse_segmentations"],
    },
)
