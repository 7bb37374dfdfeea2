"""SigLIP vision encoder: pre-norm transformer layers over image patches, no mask.

Built in notebooks/03_siglip.ipynb: edit it there, then run `make export`.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SiglipVisionConfig
from .patch_embeddings import SiglipVisionEmbeddings


class SiglipAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) without a mask, with biases."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _split_heads(self, states: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N Dh"]:
        states = states.unflatten(-1, (-1, self.head_dim))  # [B, N, H, Dh]
        return states.transpose(1, 2)  # [B, H, N, Dh]

    def forward(self, hidden_states: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Each patch gathers the values of all patches, by PyTorch's fused kernel."""
        query_states = self._split_heads(self.q_proj(hidden_states))  # [B, H, N, Dh]
        key_states = self._split_heads(self.k_proj(hidden_states))  # [B, H, N, Dh]
        value_states = self._split_heads(self.v_proj(hidden_states))  # [B, H, N, Dh]
        output = F.scaled_dot_product_attention(query_states, key_states, value_states)
        return self.out_proj(output.transpose(1, 2).flatten(2))  # [B, N, D]


class SiglipMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between, for each patch alone."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Up-project, activate, down-project; no patch sees another."""
        hidden_states = self.fc1(hidden_states)  # [B, N, F]
        hidden_states = F.gelu(hidden_states, approximate="tanh")
        return self.fc2(hidden_states)  # [B, N, D]


class SiglipEncoderLayer(nn.Module):
    """Norm, attention, add; norm, MLP, add: a pre-norm transformer layer."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, hidden_states: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """The residual stream after this layer."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SiglipVisionModel(nn.Module):
    """Patch embeddings, encoder, final norm; no class token and no pooling head.

    Nested as in the hub's files, where a layer is `vision_model.encoder.layers.0`.
    Source: Zhai et al. 2023; the shapes of So400m are Alabdulmohsin et al. 2023's.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = tower = nn.Sequential()  # runs its parts in this order
        tower.embeddings = SiglipVisionEmbeddings(config)
        tower.encoder = nn.Sequential()
        tower.encoder.layers = nn.Sequential(
            *(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        )
        tower.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N D"]:
        """Pixels in [-1, 1] → one feature vector a patch.

        Raises ValueError where the pictures' shape is not the config's.
        """
        return self.vision_model(pixel_values)  # [B, N, D]
