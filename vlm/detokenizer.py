"""Detokenizer: a growing row of ids becomes text piece by piece.

Built in notebooks/15_sampling.ipynb: edit it there, then run `make export`.
"""

from typing import Any

from .processing import IMAGE_TOKEN


class IncrementalDetokenizer:
    """Turns a growing row of ids into pieces of text, special tokens left out.

    loc and seg tokens are text, also where the tokenizer calls them special. A
    character may take several byte tokens: its text comes with the last of them.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)
        self.hidden = {i for t, i in special if not t.startswith(("<loc", "<seg"))}
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.hidden |= {tokenizer.eos_token_id, image_id}
        self.token_ids: list[int] = []  # of the last piece and what follows
        self.num_before, self.before = 0, ""  # those of it, and their text

    def add(self, token_id: int) -> str:
        """The text that this token adds; empty for a special or unfinished one."""
        if token_id in self.hidden:
            return ""
        self.token_ids.append(token_id)
        return self._advance()

    def finish(self) -> str:
        """What is still held back: each byte of a cut character is a `\ufffd`."""
        return self._advance(final=True)

    def _advance(self, final: bool = False) -> str:
        text = self._decode(self.token_ids)
        if text.endswith("\ufffd") and not final:
            return ""
        piece = text[len(self.before) :]
        # The last piece stays, so that the next knows what it follows: at the start of
        # a text, a space would be dropped. What came before it never changes.
        self.token_ids = self.token_ids[self.num_before :]
        self.num_before = len(self.token_ids)
        self.before = self._decode(self.token_ids)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
