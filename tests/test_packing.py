"""Sequence packing: rows, their mask, and that a question is what it is alone."""

import pytest
import torch
from reference import close, randomize, tiny_config

from vlm.masks import make_attn_mask
from vlm.packing import pack_questions
from vlm.paligemma import PaliGemmaForConditionalGeneration

IMAGE = [120] * 4  # the tiny model's image tokens
QUESTIONS = [
    (IMAGE + [2, 11, 12], [21, 22, 1]),
    (IMAGE + [2, 13], [31, 1]),
    (IMAGE + [2, 14, 15, 16], [41, 42, 1]),
]


def test_packed_rows_put_every_question_right_behind_the_image():
    row = pack_questions([([7, 7, 2, 5], [6, 1]), ([7, 7, 2, 8], [1])], 2)
    assert row["input_ids"].tolist() == [7, 7, 2, 5, 6, 1, 2, 8, 1]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1]
    assert row["segment_ids"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_packing_leaves_the_questions_as_they_are():
    before = [(list(prefix), list(suffix)) for prefix, suffix in QUESTIONS]
    pack_questions(QUESTIONS, 4)
    assert QUESTIONS == before


def packed_mask(segment_ids, token_type_ids):
    return make_attn_mask(segment_ids >= 0, token_type_ids, segment_ids=segment_ids)


def test_packed_mask_rules():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, -1]])
    types = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 0]])
    mask = packed_mask(segments, types)[0, 0]
    for q in range(9):
        for k in range(9):
            who, whom = segments[0, q].item(), segments[0, k].item()
            if who == -1:
                wanted = True  # padding: so that its softmax is defined
            elif who == whom == 0 or (whom == 0 and who > 0):
                wanted = True  # everyone attends to the image
            elif who == 0:
                wanted = whom == 1 and types[0, k] == 0  # it does to the first prompt
            elif who == whom:
                wanted = k <= q or types[0, k] == 0
            else:
                wanted = False
            assert mask[q, k].item() == bool(wanted), (q, k)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(PaliGemmaForConditionalGeneration(tiny_config())).eval()


def packed_logits(model, pixels, questions, mask=packed_mask):
    """The logits of a packed row [T, V], and its segment ids."""
    row = {name: v[None] for name, v in pack_questions(questions, 4).items()}
    allowed = mask(row["segment_ids"], row["token_type_ids"])
    with torch.no_grad():
        out = model(row["input_ids"], pixels, allowed, position_ids=row["position_ids"])
    return out["logits"][0], row["segment_ids"][0]


def image_to_all_prompts(segment_ids, token_type_ids):
    image = (segment_ids == 0)[:, None, :, None]
    prompts = (token_type_ids == 0)[:, None, None]
    return packed_mask(segment_ids, token_type_ids) | (image & prompts)


def test_first_question_is_what_it_is_alone(model):
    """Its logits are, and those of the image; with a mask that leaks they aren't."""
    pixels = torch.rand(1, 3, 28, 28) * 2 - 1
    prefix, suffix = QUESTIONS[0]
    types = torch.tensor([[0] * len(prefix) + [1] * len(suffix)])
    with torch.no_grad():
        alone = model(torch.tensor([prefix + suffix]), pixels, token_type_ids=types)
    for mask, same in ((packed_mask, True), (image_to_all_prompts, False)):
        logits, segments = packed_logits(model, pixels, QUESTIONS, mask)
        if same:
            close(logits[segments <= 1], alone["logits"][0])
        else:
            assert (logits[segments <= 1] - alone["logits"][0]).abs().max() > 1e-2


def test_questions_dont_touch_each_other(model):
    """The second question's logits stay when the third changes, or isn't there."""
    pixels = torch.rand(1, 3, 28, 28) * 2 - 1
    first, second, third = QUESTIONS
    other = (IMAGE + [2, 99], [98, 97, 96, 1])
    logits, segments = packed_logits(model, pixels, QUESTIONS)
    for questions in ([first, second, other], [first, second]):
        others, other_segments = packed_logits(model, pixels, questions)
        close(logits[segments == 2], others[other_segments == 2])


def test_a_question_depends_on_the_first_prompt_and_on_no_answer(model):
    """What the chapter says of the later questions of a row."""
    pixels = torch.rand(1, 3, 28, 28) * 2 - 1
    first, second, _ = QUESTIONS
    logits, segments = packed_logits(model, pixels, [first, second])
    for change, reaches in (((first[0], [51, 52, 1]), False), ((second[0], [1]), True)):
        others, other_segments = packed_logits(model, pixels, [change, second])
        difference = logits[segments == 2] - others[other_segments == 2]
        assert (difference.abs().max() > 1e-3) == reaches
