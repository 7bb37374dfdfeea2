"""Tensor names: the three layouts of checkpoints, brought to the hub's.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import re

__all__ = ["EMBEDDING", "TIED", "canonical_name"]

# Other layouts' names → ours, which are those of the hub's files.
RENAMES = (
    (r"\b(_orig_mod|module)\.", ""),  # the wrappers of torch.compile, data parallel
    (r"^model\.", ""),  # transformers 5 in memory
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED = "language_model.lm_head.weight"  # the embedding again; files may leave it out


def canonical_name(name: str) -> str:
    """A tensor's name in any of the three layouts → its name in our model."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
