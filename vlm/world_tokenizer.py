"""A byte-pair tokenizer for the sticker world, with PaliGemma's vocabulary layout.

Built in notebooks/18_questions.ipynb: edit it there, then run `make export`.
"""

import random
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer

from .processing import EXTRA_TOKENS
from .questions import EMPTY_CAPTION, make_question, relation_questions
from .scenes import TRAINING_SEEDS, all_classes, make_scene


def tokenizer_corpus(num_scenes: int) -> Iterator[str]:
    """The sentences of this world, without loc and seg tokens.

    Every class in every prompt, then captions and relations of `num_scenes` scenes.
    """
    rng = random.Random(0)
    scene = make_scene(0, image_size=32)  # any: only the prompts are wanted
    for name in all_classes():
        yield f"detect {name} ; {name}\n"
        yield f"segment {name} ; {name}\n"
        for task in ("count", "presence"):
            yield make_question(scene, task, name).prompt + "\n"
    for _ in range(num_scenes):
        scene = make_scene(rng.choice(TRAINING_SEEDS), image_size=32)
        for question in [make_question(scene, "caption"), *relation_questions(scene)]:
            yield f"{question.prompt}\n"
            yield question.answer
    yield EMPTY_CAPTION
    yield "yes no nothing zero one two three four five six"
    yield "0 1 2 3 4 5 6 7 8 9"


SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2, 3
# A word with the space before it; digits and newlines stand alone.
WORD = Regex(r"▁?\p{L}+|\n|\p{N}|▁?[^▁\p{L}\p{N}\n]+|▁")


def train_tokenizer(sentences: Iterable[str], num_pieces: int = 1024) -> Tokenizer:
    """A byte-pair tokenizer laid out like PaliGemma's: vocabulary, loc, seg, image.

    At most `num_pieces` tokens come before `<loc0000>`, special and byte tokens among
    them. Source: Sennrich et al. 2016 (BPE); byte fallback as in SentencePiece.
    """
    learner = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = Replace(" ", "▁")
    learner.pre_tokenizer = Split(WORD, "isolated")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=[*SPECIAL_TOKENS, *byte_tokens],  # the first ids
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    learner.train_from_iterator(sentences, trainer)
    tokenizer = Tokenizer(learner.model)  # here byte tokens are ordinary vocabulary
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    *added, image_token = EXTRA_TOKENS
    # Not normalized: found in the raw text, before it is split into words.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.add_special_tokens([image_token])
    return tokenizer
