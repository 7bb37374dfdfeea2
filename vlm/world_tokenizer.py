"""A byte-pair tokenizer for the sticker world, with PaliGemma's vocabulary layout.

Built in notebooks/17_scenes.ipynb: edit it there, then run `make export`.
"""

import random
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer

from .processing import IMAGE_TOKEN, NUM_LOCS, NUM_SEGS, loc_token, seg_token
from .questions import EMPTY_CAPTION, caption_question, relation_questions
from .scenes import TRAINING_SEEDS, all_kinds, make_scene

__all__ = ["tokenizer_corpus", "train_tokenizer"]


def tokenizer_corpus(num_scenes: int, seed: int = 0) -> Iterator[str]:
    """The sentences of this world, without loc and seg tokens.

    Every kind in every prompt, then captions and relations of `num_scenes` scenes.
    """
    rng = random.Random(seed)
    for kind in all_kinds().values():
        yield f"detect {kind.name} ; {kind.name}\n"
        yield f"segment {kind.name} ; {kind.name}\n"
        yield f"answer en how many {kind.plural} are there?\n"
        yield f"answer en is there {kind.with_article}?\n"
    for _ in range(num_scenes):
        scene = make_scene(rng.choice(TRAINING_SEEDS), image_size=32)
        for question in [caption_question(scene), *relation_questions(scene)]:
            yield f"{question.prompt}\n"
            yield question.answer
    yield EMPTY_CAPTION
    yield "yes no nothing zero one two three four five six"
    yield "0 1 2 3 4 5 6 7 8 9"


SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2, 3
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# A word with the space before it; digits and newlines stand alone.
WORD = Regex(r"▁?\p{L}+|\n|\p{N}|▁?[^▁\p{L}\p{N}\n]+|▁")


def train_tokenizer(sentences: Iterable[str], num_pieces: int = 1024) -> Tokenizer:
    """A byte-pair tokenizer laid out like PaliGemma's: vocabulary, loc, seg, image.

    At most `num_pieces` tokens come before `<loc0000>`, special and byte tokens among
    them. As in Gemma's tokenizer, a space becomes "▁" and belongs to the word after it,
    and unseen characters fall back to bytes, so any prompt has ids.
    Source: Sennrich et al. 2016 (BPE); byte fallback as in SentencePiece.
    """
    learner = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = Replace(" ", "▁")
    learner.pre_tokenizer = Split(WORD, "isolated")
    trainer = BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS],  # the first ids
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    learner.train_from_iterator(sentences, trainer)
    tokenizer = Tokenizer(learner.model)  # here byte tokens are ordinary vocabulary
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = [*SPECIAL_TOKENS, *map(loc_token, range(NUM_LOCS))]
    added += [*map(seg_token, range(NUM_SEGS)), IMAGE_TOKEN]
    special = {*SPECIAL_TOKENS, IMAGE_TOKEN}
    # Not normalized: found in the raw text, before it is split into words.
    tokens = [AddedToken(t, normalized=False, special=t in special) for t in added]
    tokenizer.add_tokens(tokens)
    return tokenizer
