"""Masks in sixteen tokens: the networks, the table between them, and what they know."""

import errno
import hashlib
import inspect
import io
import json
import random
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vlm.figures import mask_codes
from vlm.figures.codes import REACH
from vlm.hub import EMBEDDED
from vlm.mask_tokens import (
    DECODER_FILE,
    ENCODER_FILE,
    MaskDecoder,
    MaskEncoder,
    MaskVQVAE,
    crop_to_square,
    evaluate_reconstruction,
    mask_iou,
)
from vlm.scenes import VALIDATION_SEEDS, make_scene

# The tensors of Google's file and their shapes.
BLOCK = {
    "net.0.weight": (128, 128, 3, 3),
    "net.0.bias": (128,),
    "net.2.weight": (128, 128, 3, 3),
    "net.2.bias": (128,),
    "net.4.weight": (128, 128, 1, 1),
    "net.4.bias": (128,),
}
ENCODER_SHAPES = {
    "encoder.0.weight": (16, 1, 4, 4),
    "encoder.0.bias": (16,),
    "encoder.2.weight": (32, 16, 4, 4),
    "encoder.2.bias": (32,),
    "encoder.4.weight": (64, 32, 4, 4),
    "encoder.4.bias": (64,),
    "encoder.6.weight": (128, 64, 4, 4),
    "encoder.6.bias": (128,),
    **{f"encoder.{i}.{name}": shape for i in (8, 9) for name, shape in BLOCK.items()},
    "encoder.10.weight": (512, 128, 1, 1),
    "encoder.10.bias": (512,),
}
DECODER_SHAPES = {
    "_vq_vae._embedding": (128, 512),
    "decoder.0.weight": (128, 512, 1, 1),
    "decoder.0.bias": (128,),
    **{f"decoder.{i}.{name}": shape for i in (2, 3) for name, shape in BLOCK.items()},
    "decoder.4.weight": (128, 128, 4, 4),
    "decoder.4.bias": (128,),
    "decoder.6.weight": (128, 64, 4, 4),
    "decoder.6.bias": (64,),
    "decoder.8.weight": (64, 32, 4, 4),
    "decoder.8.bias": (32,),
    "decoder.10.weight": (32, 16, 4, 4),
    "decoder.10.bias": (16,),
    "decoder.12.weight": (1, 16, 1, 1),
    "decoder.12.bias": (1,),
}


def scene_masks(seed):
    return [item.cropped_mask for item in make_scene(seed).objects]


PARTS = {MaskEncoder: ENCODER_SHAPES, MaskDecoder: DECODER_SHAPES}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


@pytest.mark.parametrize("part", PARTS)
def test_names_and_shapes_are_those_of_googles_file(part):
    assert shapes(part()) == PARTS[part]


def test_the_whole_has_no_tensors_of_its_own_to_save():
    whole = MaskVQVAE()
    names = {name.partition(".")[2] for name in whole.state_dict()}
    assert names == {*ENCODER_SHAPES, *DECODER_SHAPES}


# The same networks once more, in NumPy, one output pixel's window at a time


def numpy_conv(x, weight, bias, stride=1, pad=0):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    side = weight.shape[-1]
    size = (x.shape[-1] - side) // stride + 1
    out = np.empty((len(x), len(weight), size, size))
    for row, column in np.ndindex(size, size):
        top, left = row * stride, column * stride
        window = x[:, :, top : top + side, left : left + side]
        out[:, :, row, column] = np.einsum("bcyx,dcyx->bd", window, weight) + bias
    return out


def numpy_transposed(x, weight, bias):
    batch, _, size, _ = x.shape
    out = np.zeros((batch, weight.shape[1], 2 * size + 2, 2 * size + 2))
    for row, column in np.ndindex(size, size):
        stamp = np.einsum("bc,cdyx->bdyx", x[:, :, row, column], weight)
        out[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += stamp
    return out[:, :, 1:-1, 1:-1] + bias[:, None, None]


class NumpyNetwork:
    def __init__(self, module):
        self.arrays = {n: t.double().numpy() for n, t in module.state_dict().items()}

    def layer(self, function, name, x, **options):
        weight, bias = (self.arrays[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return function(x, weight, bias, **options)

    def block(self, name, x):
        inner = self.layer(numpy_conv, f"{name}.net.0", x, pad=1).clip(0)
        inner = self.layer(numpy_conv, f"{name}.net.2", inner, pad=1).clip(0)
        return x + self.layer(numpy_conv, f"{name}.net.4", inner)

    def encode(self, x):
        for i in (0, 2, 4, 6):
            x = self.layer(numpy_conv, f"encoder.{i}", x, stride=2, pad=1).clip(0)
        x = self.block("encoder.9", self.block("encoder.8", x))
        return self.layer(numpy_conv, "encoder.10", x)

    def decode(self, codes):
        x = np.empty((len(codes), 512, 4, 4))
        for mask, cell in np.ndindex(*codes.shape):
            vector = self.arrays["_vq_vae._embedding"][codes[mask, cell]]
            x[mask, :, cell // 4, cell % 4] = vector
        x = self.layer(numpy_conv, "decoder.0", x).clip(0)
        x = self.block("decoder.3", self.block("decoder.2", x))
        for i in (4, 6, 8, 10):
            x = self.layer(numpy_transposed, f"decoder.{i}", x).clip(0)
        return self.layer(numpy_conv, "decoder.12", x)


def loud(module):
    """Weights three times as large as at the start, so that no layer's part is tiny."""
    for parameter in module.parameters():
        parameter.data.mul_(3)
    return module.eval()


def assert_near(ours: torch.Tensor, reference: np.ndarray):
    assert ours.shape == reference.shape
    size = np.abs(reference).max()
    error = np.abs(ours.detach().numpy() - reference).max()
    assert size > 0.1 and error <= 1e-5 * size


def test_encoder_is_that_of_the_numpy_reference():
    encoder = loud(MaskEncoder())
    masks = torch.rand(2, 1, 64, 64) * 2 - 1
    assert_near(encoder(masks), NumpyNetwork(encoder).encode(masks.double().numpy()))


def test_decoder_is_that_of_the_numpy_reference():
    decoder = loud(MaskDecoder())
    codes = torch.randint(128, (2, 16))
    assert_near(decoder(codes), NumpyNetwork(decoder).decode(codes.numpy()))


def test_the_reference_notices_a_swapped_layout():
    decoder = loud(MaskDecoder())
    codes = torch.randint(128, (2, 16))
    swapped = codes.unflatten(1, (4, 4)).transpose(1, 2).flatten(1)
    reference = NumpyNetwork(decoder).decode(codes.numpy())
    error = np.abs(decoder(swapped).detach().numpy() - reference).max()
    assert error > 1e-2 * np.abs(reference).max()


def test_every_pixel_depends_on_every_code():
    decoder = MaskDecoder()
    vectors = decoder.codebook.look_up(torch.randint(128, (1, 16))).requires_grad_()
    out = decoder.decoder(vectors)[0, 0]
    for row, column in ((0, 0), (0, 63), (40, 20)):
        (heard,) = torch.autograd.grad(out[row, column], vectors, retain_graph=True)
        assert (heard.norm(dim=1) > 0).all()


# The table


def test_nearest_is_nearest():
    codebook = MaskDecoder().codebook
    features = torch.randn(3, 512, 4, 4)
    codes = codebook.nearest(features)
    assert codes.shape == (3, 16)
    for mask in range(3):
        for cell in range(16):
            vector = features[mask, :, cell // 4, cell % 4]
            distances = (codebook._embedding - vector).norm(dim=1)
            assert codes[mask, cell] == distances.argmin()


def test_a_code_is_nearest_to_its_own_vector():
    codebook = MaskDecoder().codebook
    codes = torch.randint(128, (4, 16))
    assert torch.equal(codebook.nearest(codebook.look_up(codes)), codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 15, dtype=torch.long), r"\[B, 16\]"),
        (torch.zeros(1, 17, dtype=torch.long), r"\[B, 16\]"),
        (torch.zeros(16, dtype=torch.long), r"\[B, 16\]"),
        (torch.full((1, 16), 128), "0…127"),
        (torch.full((2, 16), -1), "0…127"),
        (torch.full((1, 16), 3.0), "whole numbers"),
        (torch.zeros(1, 16, dtype=torch.uint8), "whole numbers"),  # an index of bools
        ([[3] * 16], "tensor"),
        (np.zeros((1, 16), int), "tensor"),
    ],
)
def test_codes_that_are_none(codes, message):
    # The tests' type checker would refuse a wrong count even earlier: go without it.
    forward = inspect.unwrap(MaskDecoder.forward)
    with pytest.raises(ValueError, match=message):
        forward(MaskDecoder(), codes)


def test_no_codes_make_no_masks():
    assert MaskDecoder()(torch.zeros(0, 16, dtype=torch.long)).shape == (0, 1, 64, 64)


# Training


@pytest.fixture
def vqvae():
    return MaskVQVAE(decay=0.9)


def test_the_gradient_goes_straight_through(vqvae):
    vqvae.eval()
    caught = {}
    vqvae.encoder.register_forward_hook(lambda m, i, out: caught.update(z=out))
    vqvae.decoder.decoder.register_forward_pre_hook(
        lambda m, inputs: caught.update(passed=inputs[0])
    )
    masks = torch.rand(3, 1, 64, 64) * 2 - 1
    back, codes, commitment = vqvae(masks)
    z, passed = caught["z"], caught["passed"]
    chosen = vqvae.decoder.codebook.look_up(codes)
    torch.testing.assert_close(passed, chosen)
    assert torch.equal(codes, vqvae.decoder.codebook.nearest(z))
    torch.testing.assert_close(back, vqvae.decoder(codes))

    loss = F.mse_loss(back, masks)
    at_z, at_passed = torch.autograd.grad(loss, (z, passed), retain_graph=True)
    assert torch.equal(at_z, at_passed) and at_z.abs().max() > 0
    (pull,) = torch.autograd.grad(commitment, z)
    torch.testing.assert_close(pull, 2 * (z - chosen) / z.numel())


def test_no_gradient_reaches_the_table(vqvae):
    back, _, commitment = vqvae.eval()(torch.zeros(1, 1, 64, 64))
    (back.mean() + commitment).backward()
    assert not vqvae.decoder.codebook._embedding.requires_grad
    assert all(p.grad is not None for p in vqvae.parameters())


def test_codes_follow_running_means(vqvae):
    vqvae.dead_threshold = 0
    before = vqvae.decoder.codebook._embedding.clone()
    features, codes = torch.randn(2, 512, 4, 4), torch.randint(5, (2, 16))
    for _ in range(2):  # the second step starts from other means than 1 and the table
        vqvae.update_codebook(features, codes)
    vectors = features.permute(0, 2, 3, 1).reshape(32, 512)
    for code in range(128):
        count, total = 1.0, before[code].clone()
        chose = vectors[codes.flatten() == code]
        for _ in range(2):
            count = 0.9 * count + 0.1 * len(chose)
            total = 0.9 * total + 0.1 * chose.sum(dim=0)
        moved = vqvae.decoder.codebook._embedding[code]
        torch.testing.assert_close(moved, total / count, atol=1e-5, rtol=1e-4)
        assert bool((moved - before[code]).norm() > 1e-3) == (len(chose) > 0)


def test_a_dead_code_is_set_onto_a_vector_of_the_batch(vqvae):
    before = vqvae.decoder.codebook._embedding.clone()
    vqvae.counts[7] = 0.05
    features, codes = torch.randn(2, 512, 4, 4), torch.full((2, 16), 3)
    vqvae.update_codebook(features, codes)
    after = vqvae.decoder.codebook._embedding
    vectors = features.permute(0, 2, 3, 1).reshape(32, 512)
    assert (vectors == after[7]).all(dim=1).any()
    assert vqvae.counts[7] == 1
    others = [code for code in range(128) if code not in (3, 7)]
    torch.testing.assert_close(after[others], before[others])


def test_revival_draws_by_the_cpus_generator(vqvae):
    """Its state is what a saved run keeps."""
    vqvae.counts.zero_()
    torch.manual_seed(5)
    features, codes = torch.randn(2, 512, 4, 4), torch.full((2, 16), 3)
    state = torch.get_rng_state()
    vqvae.update_codebook(features, codes)
    torch.set_rng_state(state)
    dead = 127  # all but code 3, which gets a tenth of 32
    picks = torch.randint(32, (dead,))
    vectors = features.permute(0, 2, 3, 1).reshape(32, 512)
    others = [code for code in range(128) if code != 3]
    after = vqvae.decoder.codebook._embedding
    torch.testing.assert_close(after[others], vectors[picks])


def test_with_a_threshold_of_zero_the_dead_stay_dead(vqvae):
    vqvae.dead_threshold = 0
    vqvae.counts[7], vqvae.sums[7] = 1e-6, 1e-6 * vqvae.sums[7]
    before = vqvae.decoder.codebook._embedding[7].clone()
    vqvae.update_codebook(torch.randn(1, 512, 4, 4), torch.full((1, 16), 3))
    torch.testing.assert_close(vqvae.decoder.codebook._embedding[7], before)


@pytest.mark.parametrize("training", [True, False])
def test_the_table_moves_in_training_only(vqvae, training):
    before = vqvae.decoder.codebook._embedding.clone()
    vqvae.train(training)(torch.zeros(1, 1, 64, 64))
    moved = not torch.equal(before, vqvae.decoder.codebook._embedding)
    assert moved == training


# Masks, squares and data


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (9, 200), (300, 4)])
def test_full_and_empty_masks_are_plain_squares(shape):
    inside, outside = (crop_to_square(np.full(shape, value)) for value in (True, False))
    assert inside.shape == (1, 64, 64) and inside.dtype == torch.float32
    assert (inside == 1).all() and (outside == -1).all()


@pytest.mark.parametrize("seed", range(20))
def test_squeezing_keeps_sides_in_place(seed):
    (mask, *_) = scene_masks(seed)
    square = crop_to_square(mask)
    flipped = crop_to_square(np.ascontiguousarray(mask[:, ::-1]))
    turned = crop_to_square(np.ascontiguousarray(mask.T))
    torch.testing.assert_close(flipped.flip(2), square, atol=0.02, rtol=0)
    torch.testing.assert_close(turned.transpose(1, 2), square, atol=0.02, rtol=0)
    opposite = crop_to_square(~mask)
    torch.testing.assert_close(opposite, -square, atol=0.02, rtol=0)
    assert abs(mask.mean() - (square.mean().item() + 1) / 2) < 0.03


@pytest.mark.parametrize(
    "mask",
    [
        np.full((5, 5), 255, np.uint8),  # a picture's bytes: 255 · 255 is 1, in bytes
        np.ones((5, 5)),
        np.ones((3, 5, 5), bool),
        torch.ones(5, 5),
    ],
)
def test_only_yes_and_no_is_a_mask(mask):
    with pytest.raises(ValueError, match="bool"):
        inspect.unwrap(crop_to_square)(mask)


def test_a_mask_without_pixels_is_refused():
    with pytest.raises(ValueError, match="with pixels"):
        crop_to_square(np.zeros((0, 5), bool))


def test_iou_by_counting():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool)
    a[:2], b[1:3] = True, True  # rows 0 and 1; rows 1 and 2
    empty = torch.zeros(4, 4, dtype=torch.bool)
    assert mask_iou(a, b).item() == pytest.approx(1 / 3)
    assert mask_iou(a, ~a) == 0 and mask_iou(a, empty) == 0
    assert mask_iou(a, a) == 1 and mask_iou(empty, empty) == 1
    many = mask_iou(torch.stack([a, b, empty]), torch.stack([b, b, b]))
    assert many.tolist() == pytest.approx([1 / 3, 1, 0])


def test_iou_is_symmetric_and_a_share():
    a, b = torch.rand(2, 50, 8, 8) > torch.rand(2, 50, 1, 1)
    iou = mask_iou(a, b)
    assert torch.equal(iou, mask_iou(b, a)) and ((iou >= 0) & (iou <= 1)).all()
    assert torch.equal(mask_iou(a, a), torch.ones(50))


# Files


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """A random file with the names of `vae-oid.npz`, and what training left in it."""
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.standard_normal(shape, np.float32) * 0.05
        for name, shape in {**ENCODER_SHAPES, **DECODER_SHAPES}.items()
    }
    left = {
        "_vq_vae._ema_w": np.zeros((128, 512), np.float32),
        "_vq_vae._ema_cluster_size": np.zeros(128, np.float32),
    }
    path = tmp_path_factory.mktemp("google") / "vae.npz"
    np.savez(path, **arrays, **left)
    return path, arrays


@pytest.mark.parametrize("part", PARTS)
def test_googles_file_can_be_read(google, part):
    path, arrays = google
    hash_in_capitals = hashlib.sha256(path.read_bytes()).hexdigest().upper()
    for sha256 in (None, hash_in_capitals):
        module = part.from_npz(path, sha256)
        assert not module.training
        for name, tensor in module.state_dict().items():
            assert np.array_equal(tensor.numpy(), arrays[name])


def test_the_decoder_needs_no_encoder(google, tmp_path):
    path, arrays = google
    half = {name: array for name, array in arrays.items() if name in DECODER_SHAPES}
    np.savez(tmp_path / "half.npz", **half)
    codes = torch.randint(128, (2, 16))
    ours = MaskDecoder.from_npz(tmp_path / "half.npz")(codes)
    assert torch.equal(ours, MaskDecoder.from_npz(path)(codes))
    with pytest.raises(ValueError, match=r"encoder\.0\.weight"):
        MaskEncoder.from_npz(tmp_path / "half.npz")


def test_another_hash_is_refused(google):
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, not 0{64}"):
        MaskDecoder.from_npz(google[0], sha256="0" * 64)


def test_files_that_are_none(google, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        MaskDecoder.from_npz(tmp_path / "nothing.npz")
    broken = tmp_path / "broken.npz"
    for content in (b"", b"no file of arrays", google[0].read_bytes()[:9999]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz can't be read"):
            MaskDecoder.from_npz(broken)
    np.savez(broken, **{"_vq_vae._embedding": np.array([{"a": 1}], object)})
    with pytest.raises(ValueError, match=r"broken\.npz can't be read.*allow_pickle"):
        MaskDecoder.from_npz(broken)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_value_errors(google, tmp_path, save):
    """Bytes changed at random, in 60 ways: numpy's reader fails in many words."""
    file, rng = tmp_path / "damaged.npz", random.Random(0)
    save(
        file,
        **{name: array[:1, :9] for name, array in google[1].items() if array.ndim > 1},
    )
    whole = file.read_bytes()
    for _ in range(60):
        spoiled = bytearray(whole)
        start = rng.randrange(len(whole))
        spoiled[start : start + 40] = rng.randbytes(len(whole[start : start + 40]))
        file.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"damaged\.npz|_vq_vae"):
            MaskDecoder.from_npz(file)


def test_a_wrong_shape_is_named(google, tmp_path):
    arrays = {**google[1], "decoder.4.bias": np.zeros(64, np.float32)}
    np.savez(tmp_path / "other.npz", **arrays)
    message = r"(?s)other\.npz.*decoder\.4\.bias.*\[64\].*\[128\]"
    with pytest.raises(ValueError, match=message):
        MaskDecoder.from_npz(tmp_path / "other.npz")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_takes_autocast(dtype):
    """Codes and codebook stay float32: rounded, many cells would get another code."""
    vqvae = MaskVQVAE().train()
    before = vqvae.decoder.codebook._embedding.clone()
    with torch.autocast("cpu", dtype):
        logits, _, commitment = vqvae(torch.ones(2, 1, 64, 64))
    (logits.float().mean() + commitment.float().mean()).backward()
    assert vqvae.sums.dtype == torch.float32
    assert not torch.equal(vqvae.decoder.codebook._embedding, before)


def test_the_nearest_code_is_the_same_in_autocast(shipped):
    """Also between two codes, a little nearer to one of them."""
    nearest, table = (
        shipped.decoder.codebook.nearest,
        shipped.decoder.codebook._embedding,
    )
    between = 0.501 * table + 0.499 * table.roll(1, dims=0)  # [128, 512]
    features = between.view(8, 4, 4, 512).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nearest(features)
    assert torch.equal(inside, nearest(features))


def test_what_is_saved_comes_back(vqvae, tmp_path):
    folder = tmp_path / "new" / "folder"
    vqvae.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {ENCODER_FILE, DECODER_FILE}
    again = MaskVQVAE.from_pretrained(folder)
    assert not again.training
    for name, tensor in vqvae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert torch.equal(again.sums, again.decoder.codebook._embedding)
    decoder = MaskDecoder.from_pretrained(str(folder))
    codes = torch.randint(128, (1, 16))
    assert torch.equal(decoder(codes), vqvae.eval().decoder(codes))


def test_a_full_disk_leaves_both_files(vqvae, tmp_path, monkeypatch):
    """Encoder and decoder belong together: neither is replaced without the other."""
    vqvae.save_pretrained(tmp_path)
    former = {file: file.read_bytes() for file in tmp_path.iterdir()}
    files = []

    write_bytes = Path.write_bytes

    def full(file, content):
        if files.append(file) or len(files) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        MaskVQVAE().save_pretrained(tmp_path)
    assert former == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_folders_that_hold_no_masks(vqvae, tmp_path):
    with pytest.raises(FileNotFoundError, match=DECODER_FILE):
        MaskDecoder.from_pretrained(tmp_path)
    vqvae.save_pretrained(tmp_path)
    (tmp_path / ENCODER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=ENCODER_FILE):
        MaskVQVAE.from_pretrained(tmp_path)
    shutil.copy(tmp_path / DECODER_FILE, tmp_path / ENCODER_FILE)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight"):
        MaskEncoder.from_pretrained(tmp_path)
    file = tmp_path / DECODER_FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't be read"):
        MaskDecoder.from_pretrained(tmp_path)


def test_reading_masks_needs_neither_scenes_nor_a_trainer():
    code = "import sys, vlm.mask_tokens; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = done.stdout.split()
    assert "vlm.mask_tokens" in modules
    assert not {"vlm.scenes", "vlm.training"} & {*modules}


# The shipped weights


@pytest.fixture(scope="module")
def shipped():
    if not (EMBEDDED / ENCODER_FILE).exists():
        pytest.skip("the embedded checkpoint has no mask encoder yet")
    return MaskVQVAE.from_pretrained(EMBEDDED)


def test_shipped_codes_carry_masks_never_seen(shipped):
    masks = [mask for seed in VALIDATION_SEEDS[:100] for mask in scene_masks(seed)]
    ious, codes = evaluate_reconstruction(shipped, masks)
    assert len(ious) == len(masks) and codes.shape == (len(masks), 16)
    assert ious.mean() >= 0.92
    assert codes.unique().tolist() == list(range(128))


def test_a_mask_becomes_sixteen_codes_and_comes_back(shipped):
    (item, *_) = make_scene(VALIDATION_SEEDS[0], 256).objects
    mask = item.cropped_mask
    (codes,) = shipped.encode_masks([mask])
    assert len(codes) == 16 and all(type(code) is int for code in codes)
    with torch.no_grad():
        back = shipped.decoder(torch.tensor([codes]))
    square = crop_to_square(mask)
    assert mask_iou(back[0] > 0, square > 0).item() > 0.8
    ((iou,), (judged,)) = evaluate_reconstruction(shipped, [mask])
    assert judged.tolist() == codes
    assert iou.item() == pytest.approx(mask_iou(back[0] > 0, square > 0).item())


def test_the_training_log_is_that_of_the_page(shipped):
    lines = (EMBEDDED / "mask_training_log.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert {*entries[0]} == {"step", "loss", "commitment", "iou", "used"}
    assert entries[0]["used"] < 5 and entries[-1]["used"] > 100


# The interactive figure


@pytest.fixture(scope="module")
def changes():
    """Some changes of a mask of 8 × 8, as the figure takes them."""
    codes = list(range(16))
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(16, 128, 8, 8, generator=generator) * 2 - 1
    for token, code in enumerate(codes):
        values[token, code] = values[0, 0]
    return codes, values


def test_the_figure_holds_every_change(changes):
    codes, values = changes
    html = mask_codes(codes, values).data
    data = re.search(r'<script type="application/json">(.*?)</script>', html, re.S)
    data = json.loads(data[1])
    sprite = Image.open(io.BytesIO(b64decode(data["sprite"].partition(",")[2])))
    tiles = np.asarray(sprite).reshape(16, 8, 128, 8).transpose(0, 2, 1, 3)
    start = tiles[0, codes[0]].astype(int)
    levels = (tiles.astype(int) + start) % 256  # the sprite holds differences
    levels[0, codes[0]] = start
    half = data["levels"] // 2
    expected = np.round((values.numpy() / REACH).clip(-1, 1) * half) + half
    assert data["codes"] == codes and data["side"] == 8
    assert np.array_equal(levels, expected)


def test_the_figure_needs_nothing_and_names_nothing_twice(changes):
    pages = [mask_codes(*changes).data for _ in range(2)]
    ids = [re.findall(r'\bid="([^"]+)"', page) for page in pages]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1])
    for page, (own,) in zip(pages, ids):
        assert f'getElementById("{own}")' in page
        assert "http" not in page and 'alt="' in page and "&lt;seg005&gt;" in page


def test_the_figure_takes_what_a_model_in_training_gives(changes):
    codes, values = changes
    values = values.bfloat16()
    shown = [mask_codes(codes, v).data for v in (values, values.requires_grad_())]
    numbers = [re.findall(r"data:image[^\"]+", page) for page in shown]
    assert numbers[0] == numbers[1]


def test_the_figure_refuses_what_is_no_mask(changes):
    codes, values = changes
    with pytest.raises(ValueError, match="sixteen numbers"):
        mask_codes(codes[:15], values)
    with pytest.raises(ValueError, match="sixteen numbers"):
        mask_codes([128] * 16, values)
    with pytest.raises(ValueError, match="expected"):
        mask_codes(codes, values[:, :, :, :7])


def test_the_figure_answers_mouse_and_keyboard(changes):
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the figure isn't tried in a browser")
    html = mask_codes(*changes).data + mask_codes(*changes).data
    with playwright.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=path, args=options)
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.set_content(f"<!doctype html><body>{html}</body>")
        page.wait_for_selector(".board canvas")
        page.evaluate(  # as JupyterLab does
            "addEventListener('keydown', e => e.key[0] == 'A' && e.preventDefault())"
        )
        first, second = (page.locator(".vlm-codes").nth(i) for i in range(2))
        title = first.locator("label span")
        assert title.inner_text() == "Token 6 of 16: <seg005>"
        first.get_by_role("radio").nth(5).focus()
        page.keyboard.press("ArrowDown")
        assert title.inner_text() == "Token 10 of 16: <seg009>"
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert title.inner_text() == "Token 10 of 16: <seg010>"
        page.keyboard.press("End")
        assert title.inner_text() == "Token 10 of 16: <seg127>"
        assert "<seg009> became <seg127>" in first.inner_text()
        first.get_by_role("button", name="Put it back").click()
        assert title.inner_text() == "Token 10 of 16: <seg009>"
        first.get_by_role("radio").nth(0).click()
        canvas = first.locator(".codes canvas")
        box = canvas.bounding_box()
        place = {"x": box["width"] * 1.5 / 16, "y": box["height"] * 2.5 / 8}
        canvas.click(position=place)
        assert title.inner_text() == "Token 1 of 16: <seg033>"
        assert second.locator("label span").inner_text() == "Token 6 of 16: <seg005>"
        browser.close()
    assert not problems
