"""The next token from logits: greedy, or sampled with temperature, top-k, top-p.

Built in notebooks/15_sampling.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["sample_next_token"]


def apply_temperature(
    logits: Float[Tensor, "B V"], temperature: float
) -> Float[Tensor, "B V"]:
    """Divide by the temperature (> 0): under 1 sharpens the choice, over 1 flattens it.

    The largest logit becomes 0 first, so that a tiny temperature can't overflow.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-37)


def top_k_filter(logits: Float[Tensor, "B V"], top_k: int) -> Float[Tensor, "B V"]:
    """Mask out (-inf) all but the k most probable; ties with the k-th stay too."""
    kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_filter(logits: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """Mask out (-inf) all but the smallest set of tokens whose probabilities reach p.

    The token that crosses p is in the set, so there is always one.
    Source: Holtzman et al. 2020 (nucleus sampling).
    """
    if top_p >= 1:  # everything stays; rounding must not drop the tail
        return logits
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)  # [B, V]
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass ahead of each token
    drop = before >= top_p
    drop[:, 0] = False  # nothing is ahead of the first, however small p is
    drop = torch.zeros_like(drop).scatter(1, order, drop)  # back in vocabulary order
    return logits.masked_fill(drop, float("-inf"))


def sample_next_token(
    logits: Float[Tensor, "B V"],
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Choose each row's next token: (ids, probabilities of the chosen).

    Greedy unless `do_sample`; a temperature of 0 is greedy too. Temperature comes
    first, then top-k, then top-p. The probabilities are those drawn from; for greedy,
    the plain softmax's.
    """
    logits = logits.float()
    if not do_sample or temperature == 0:
        probabilities, token_ids = logits.softmax(dim=-1).max(dim=-1)  # [B] each
        return token_ids, probabilities
    logits = apply_temperature(logits, temperature)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    probabilities = logits.softmax(dim=-1)  # [B, V]
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)  # [B, 1]
    token_ids = drawn.to(logits.device)
    return token_ids[:, 0], probabilities.gather(1, token_ids)[:, 0]  # [B] each
