"""Sixteen tokens become the outline of a thing, and a small network reads them.

Built in notebooks/16_mask_tokens.ipynb: edit it there, then run `make export`.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .processing import NUM_SEGS
from .scenes import STYLES, make_scene
from .weights import require_space

__all__ = [
    "MASK_SIDE",
    "GRID_SIDE",
    "CODES_PER_MASK",
    "CODE_WIDTH",
    "DECODER_FILE",
    "ENCODER_FILE",
    "crop_to_square",
    "mask_iou",
    "ResidualBlock",
    "MaskModule",
    "MaskEncoder",
    "Codebook",
    "MaskDecoder",
    "MaskVQVAE",
    "draw_silhouette",
    "scene_masks",
    "MaskDataset",
    "judge_masks",
    "train_mask_tokens",
    "build_parser",
    "main",
]

MASK_SIDE = 64  # a mask is drawn into a square of this many pixels
GRID_SIDE = 4  # and written as 4 × 4 codes, row by row
CODES_PER_MASK = GRID_SIDE * GRID_SIDE
CODE_WIDTH = 512
DECODER_FILE = "mask_decoder.safetensors"
ENCODER_FILE = "mask_encoder.safetensors"


def crop_to_square(mask: Bool[np.ndarray, "h w"]) -> Float[Tensor, "1 64 64"]:
    """A mask cut out along its box → 64 × 64 values from -1 (outside) to 1 (inside).

    Both sides are stretched to 64, whatever their ratio. Raises ValueError for what
    isn't a mask with pixels.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or mask.size == 0:
        raise ValueError(
            f"a mask is a bool array [h, w] with pixels, not {mask.dtype} "
            f"{list(mask.shape)}"
        )
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    size = (MASK_SIDE, MASK_SIDE)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture, np.float32) / 127.5 - 1)[None]


def mask_iou(
    a: Bool[Tensor, "*B h w"], b: Bool[Tensor, "*B h w"]
) -> Float[Tensor, "*B"]:
    """Intersection over union of masks, pair by pair; 1 where both are empty."""
    both = (a & b).sum(dim=(-2, -1))  # [*B]
    either = (a | b).sum(dim=(-2, -1))  # [*B]
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


class ResidualBlock(nn.Module):
    """Three convolutions whose result is added to what came in."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Same shape out as in."""
        return features + self.net(features)


def _read_npz(path: str | os.PathLike, sha256: str | None) -> dict[str, np.ndarray]:
    "The arrays of an .npz; ValueError where the file isn't the one with that hash."
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of vae-oid.npz")
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256.lower():
            raise ValueError(
                f"{path} has the SHA-256 {found}, not {sha256}: it is damaged or "
                "another file; fetch it again"
            )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} isn't an .npz file (truncated?): fetch it again")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of zip, zlib, NumPy or Python's own tokenizer
        raise ValueError(f"{path} can't be read as arrays: {error}") from error


def _fill(module: nn.Module, arrays: dict[str, Any], source: Any) -> None:
    "Copy every tensor of `module` from `arrays`, which may hold others too; strict."
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in arrays:
            raise ValueError(
                f"{source} has no tensor {name}: it isn't the file of a mask model"
            )
        if tuple(arrays[name].shape) != tuple(tensor.shape):
            raise ValueError(
                f"{name} in {source} has shape {tuple(arrays[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    module.load_state_dict({name: torch.as_tensor(arrays[name]) for name in wanted})


def _save(folder: str | os.PathLike, *parts: "MaskModule") -> None:
    "Write each part's file; none is replaced before all are complete. Or OSError."
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for part in parts:
            tensors = {name: t.contiguous() for name, t in part.state_dict().items()}
            try:
                save_file(tensors, Path(scratch, part.file_name), {"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"can't write into {folder}: {error}") from error
        for part in parts:
            os.replace(Path(scratch, part.file_name), Path(folder, part.file_name))


class MaskModule(nn.Module):
    """What encoder and decoder share: where they are read from and written to."""

    file_name: str

    @classmethod
    def from_npz(cls, path: str | os.PathLike, sha256: str | None = None) -> Self:
        """Read Google's `vae-oid.npz`, or a file with the same names; no pickle.

        Raises FileNotFoundError, and ValueError for another hash than `sha256`, a
        missing tensor or a wrong shape.
        """
        module = cls()
        _fill(module, _read_npz(path, sha256), path)
        return module.eval()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Read the file that `save_pretrained` wrote; raises as `from_npz` does."""
        path = Path(folder) / cls.file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"no {cls.file_name} in {folder}: give a folder that save_pretrained "
                "wrote, or read Google's file with from_npz"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read (truncated?): {error}") from error
        module = cls()
        _fill(module, tensors, path)
        return module.eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write this part's safetensors file into `folder`."""
        _save(folder, self)


class MaskEncoder(MaskModule):
    """Mask → a vector for each of 4 × 4 cells; reading masks does without it.

    Layers and names as in `vae-oid.npz`. Source: Ning et al. 2023 (the masks as
    tokens), van den Oord et al. 2017 (the VQ-VAE).
    """

    file_name = ENCODER_FILE

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),  # 64 → 32
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),  # → 16
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),  # → 8
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),  # → 4
            nn.ReLU(),
            ResidualBlock(128),
            ResidualBlock(128),
            nn.Conv2d(128, CODE_WIDTH, 1),
        )

    def forward(self, masks: Float[Tensor, "B 1 64 64"]) -> Float[Tensor, "B 512 4 4"]:
        """Masks of -1…1 → one vector of 512 a cell."""
        return self.encoder(masks)


class Codebook(nn.Module):
    """128 vectors; a code is the number of one of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("_embedding", torch.randn(NUM_SEGS, CODE_WIDTH))

    def look_up(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 512 4 4"]:
        """The codes' vectors, laid out row by row on the 4 × 4 cells."""
        vectors = self._embedding[codes]  # [B, 16, 512]
        return vectors.transpose(1, 2).unflatten(2, (GRID_SIDE, GRID_SIDE))

    def nearest(self, features: Float[Tensor, "B 512 4 4"]) -> Int[Tensor, "B 16"]:
        """For each cell the code whose vector is nearest."""
        vectors = features.flatten(2).transpose(1, 2)  # [B, 16, 512]
        # |v - e|² = |v|² - 2 v·e + |e|², and |v|² is the same for all codes
        table = self._embedding
        distance = table.square().sum(dim=1) - 2 * vectors @ table.T  # [B, 16, 128]
        return distance.argmin(dim=-1)


class MaskDecoder(MaskModule):
    """Sixteen codes → a mask of 64 × 64: the half of the VQ-VAE that answers need.

    Layers and names as in `vae-oid.npz`. The source of both is with MaskEncoder.
    """

    file_name = DECODER_FILE

    def __init__(self):
        super().__init__()
        self._vq_vae = Codebook()
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_WIDTH, 128, 1),
            nn.ReLU(),
            ResidualBlock(128),
            ResidualBlock(128),
            nn.ConvTranspose2d(128, 128, 4, stride=2, padding=1),  # 4 → 8
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),  # → 16
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # → 32
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),  # → 64
            nn.ReLU(),
            nn.Conv2d(16, 1, 1),
        )

    @property
    def codebook(self) -> Codebook:
        """The table of codes; its name inside is that of Google's file."""
        return self._vq_vae

    def forward(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 1 64 64"]:
        """Codes 0…127, row by row → values nominally -1…1; a pixel over 0 is inside.

        Raises ValueError for another number of codes, type, or one out of range.
        """
        whole = getattr(codes, "dtype", None) in (torch.int64, torch.int32)
        shaped = whole and codes.shape[1:] == (CODES_PER_MASK,)
        if not shaped or ((codes < 0) | (codes >= NUM_SEGS)).any():
            raise ValueError(
                f"codes must be a tensor [B, {CODES_PER_MASK}] of whole numbers "
                f"0…{NUM_SEGS - 1}, not {codes!r:.99}"
            )
        return self.decoder(self.codebook.look_up(codes))


class MaskVQVAE(nn.Module):
    """Encoder and decoder with the codebook between them.

    Training moves the codebook to running means, `decay` being the share of the old
    mean that stays, and revives a code that is chosen less than `least` times a batch
    (0: never). Source: van den Oord et al. 2017, the running means in its appendix.
    """

    def __init__(
        self,
        encoder: MaskEncoder,
        decoder: MaskDecoder,
        decay: float = 0.99,
        least: float = 0.1,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decay, self.least = decay, least
        # Running means of how many vectors chose a code, and of their sum.
        self.register_buffer("counts", torch.ones(NUM_SEGS), persistent=False)
        sums = decoder.codebook._embedding.clone()
        self.register_buffer("sums", sums, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Both parts from a folder; FileNotFoundError where one is missing."""
        encoder = MaskEncoder.from_pretrained(folder)
        return cls(encoder, MaskDecoder.from_pretrained(folder)).eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the two files."""
        _save(folder, self.encoder, self.decoder)

    def forward(
        self, masks: Float[Tensor, "B 1 64 64"]
    ) -> tuple[Float[Tensor, "B 1 64 64"], Int[Tensor, "B 16"], Float[Tensor, ""]]:
        """Masks → what comes back, the codes between, and the commitment loss.

        Gradients jump over the choice of a code: the encoder gets the decoder's as if
        it had written the code's vector itself (straight-through). In training mode
        the codebook moves too.
        """
        features = self.encoder(masks)  # [B, 512, 4, 4]
        codebook = self.decoder.codebook
        codes = codebook.nearest(features)  # [B, 16]
        chosen = codebook.look_up(codes)  # [B, 512, 4, 4]
        commitment = F.mse_loss(features, chosen)
        passed = features + (chosen - features).detach()
        if self.training:
            self.move_codes(features.detach().float(), codes)
        return self.decoder.decoder(passed), codes, commitment

    @torch.no_grad()
    def move_codes(
        self, features: Float[Tensor, "B 512 4 4"], codes: Int[Tensor, "B 16"]
    ) -> None:
        """Move each code toward the mean of the vectors that chose it.

        A code that is dead, chosen too rarely on average, moves onto a random vector of
        the batch.
        """
        vectors = features.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * 16, 512]
        chose = F.one_hot(codes.flatten(), NUM_SEGS).to(vectors.dtype)  # [B * 16, 128]
        self.counts.lerp_(chose.sum(dim=0), 1 - self.decay)
        self.sums.lerp_(chose.T @ vectors, 1 - self.decay)
        dead = self.counts < self.least
        picks = torch.randint(len(vectors), (int(dead.sum()),), device=vectors.device)
        self.sums[dead] = vectors[picks]
        self.counts[dead] = 1.0
        self.decoder.codebook._embedding.copy_(self.sums / self.counts[:, None])

    @torch.no_grad()
    def encode_mask(self, mask: Bool[np.ndarray, "h w"]) -> list[int]:
        """A mask, cut out along its box → its sixteen codes; ValueError if empty."""
        square = crop_to_square(mask)[None].to(self.sums.device)  # [1, 1, 64, 64]
        return self.decoder.codebook.nearest(self.encoder(square))[0].tolist()


def _draw_polygon(rng: random.Random, side: int) -> Image.Image:
    "Corners around the middle, near and far from it: stars, triangles, splinters."
    corners = rng.randint(3, 14)
    turn = rng.uniform(0, 2 * np.pi)
    points = []
    for i in range(corners):
        angle = turn + 2 * np.pi * i / corners
        reach = rng.uniform(0.15, 0.5) * side
        x, y = reach * np.cos(angle), reach * np.sin(angle)
        points.append((side / 2 + x, side / 2 + y))
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).polygon(points, fill=255)
    return picture


def _draw_ellipses(rng: random.Random, side: int) -> Image.Image:
    "One to four ellipses; after the first, some cut a hole instead."
    picture = Image.new("L", (side, side))
    for i in range(rng.randint(1, 4)):
        x0, x1 = sorted(rng.uniform(0, side) for _ in range(2))
        y0, y1 = sorted(rng.uniform(0, side) for _ in range(2))
        value = 0 if i and rng.random() < 0.3 else 255
        ImageDraw.Draw(picture).ellipse((x0, y0, x1, y1), fill=value)
    return picture


def _draw_strokes(rng: random.Random, side: int) -> Image.Image:
    "One to three thick bent lines: handles, legs, letters."
    picture = Image.new("L", (side, side))
    for _ in range(rng.randint(1, 3)):
        points = [(rng.uniform(0, side), rng.uniform(0, side)) for _ in range(3)]
        width = max(1, round(rng.uniform(0.06, 0.25) * side))
        ImageDraw.Draw(picture).line(points, fill=255, width=width, joint="curve")
    return picture


def _draw_blob(rng: random.Random, side: int) -> Image.Image:
    "A few random cells, enlarged smoothly and cut at a level: clouds, lakes."
    cells = rng.choice((3, 4, 6))
    noise = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    smooth = noise.resize((side, side), Image.Resampling.BICUBIC)
    level = rng.uniform(90, 160)
    return smooth.point(lambda value: 255 * (value > level))


def draw_silhouette(rng: random.Random) -> Bool[np.ndarray, "h w"]:
    """A shape that is no sticker, cut out along its box: polygon, ellipses, line, blob.

    Drawn at 16 to 128 pixels, so that coarse and fine edges occur, as in pictures.
    """
    side = rng.randint(16, 128)
    while True:
        draw = rng.choice((_draw_polygon, _draw_ellipses, _draw_strokes, _draw_blob))
        picture = draw(rng, side)
        box = picture.getbbox()
        if box and min(box[2] - box[0], box[3] - box[1]) >= 4:
            return np.asarray(picture.crop(box)) > 0


def scene_masks(
    seed: int, image_size: int = 128, styles: Sequence[str] = STYLES
) -> Iterator[Bool[np.ndarray, "h w"]]:
    """The visible part of each thing in a scene, cut out along its box."""
    for thing in make_scene(seed, image_size, styles).objects:
        yield thing.cropped_mask


class MaskDataset(Dataset):
    """The masks of a scene and as many silhouettes; an item depends on its index."""

    def __init__(self, length: int, seed: int = 0):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Float[Tensor, "n 1 64 64"]:
        rng = random.Random(f"masks {self.seed} {index}")
        masks = list(scene_masks(rng.randrange(10**9), rng.choice((96, 128, 256))))
        masks += [draw_silhouette(rng) for _ in masks]
        return torch.stack([crop_to_square(mask) for mask in masks])


@torch.no_grad()
def judge_masks(
    vqvae: MaskVQVAE, masks: Sequence[Bool[np.ndarray, "_ _"]]
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n 16"]]:
    """How much of each mask survives sixteen tokens (IoU at 64 × 64), and its codes.

    The masks are cut out along their boxes, each of its own size.
    """
    squares = torch.stack([crop_to_square(mask) for mask in masks])  # [n, 1, 64, 64]
    squares = squares.to(vqvae.sums.device)
    ious, all_codes = [], []
    for part in squares.split(64):
        codes = vqvae.decoder.codebook.nearest(vqvae.encoder(part))  # [b, 16]
        back = vqvae.decoder(codes)  # [b, 1, 64, 64]
        ious.append(mask_iou(part[:, 0] > 0, back[:, 0] > 0))
        all_codes.append(codes)
    return torch.cat(ious), torch.cat(all_codes)


def train_mask_tokens(
    vqvae: MaskVQVAE,
    steps: int,
    scenes_per_step: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    num_workers: int = 0,
) -> list[dict[str, float]]:
    """Train on masks of scenes and silhouettes; returns the log, a dict a step.

    Adam with a short warm-up and half a cosine down to nothing. `used`: how many of
    the 128 codes the batch used. Raises ValueError for fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}: warming up and cooling down takes two")
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=max(0.05, 1.5 / steps)
    )
    loader = DataLoader(
        MaskDataset(steps * scenes_per_step, seed),
        batch_size=scenes_per_step,
        collate_fn=torch.cat,
        num_workers=num_workers,
    )
    log = []
    vqvae.train()
    for masks in tqdm(loader, desc="mask tokens", unit="step"):
        masks = masks.to(vqvae.sums.device)
        back, codes, commitment = vqvae(masks)
        loss = F.mse_loss(back, masks)
        (loss + 0.25 * commitment).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append(
            {
                "step": len(log) + 1,
                "loss": loss.item(),
                "commitment": commitment.item(),
                "iou": mask_iou(masks[:, 0] > 0, back[:, 0] > 0).mean().item(),
                "used": codes.unique().numel(),
            }
        )
    vqvae.eval()
    return log


def build_parser() -> argparse.ArgumentParser:
    """Where to write, and how long to train."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm.mask_tokens",
        description="Train the VQ-VAE behind the seg tokens on masks of scenes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, help="folder for the two files and log.jsonl")
    add("--steps", type=int, default=5000, help="updates")
    add("--scenes_per_step", type=int, default=8, help="a scene has about 3 masks")
    add("--learning_rate", type=float, default=1e-3, help="peak")
    add("--seed", type=int, default=0, help="of scenes and starting values")
    add("--num_workers", type=int, default=0, help="processes that draw masks")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 and one clear line for what a user can get wrong."""
    arguments = vars(build_parser().parse_args(argv))
    output = Path(arguments.pop("output"))
    try:
        torch.manual_seed(arguments["seed"])
        vqvae = MaskVQVAE(MaskEncoder(), MaskDecoder())
        output.mkdir(parents=True, exist_ok=True)
        require_space(output, sum(t.nbytes for t in vqvae.state_dict().values()))
        log = train_mask_tokens(vqvae, **arguments)
        vqvae.save_pretrained(output)
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        (output / "log.jsonl").write_text(lines, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"mask encoder and decoder in {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
