"""Mask tokens: the VQ-VAE that writes a mask as sixteen codes and reads it back.

Built in notebooks/19_mask_tokens.ipynb: edit it there, then run `make export`.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .processing import NUM_SEGS

__all__ = [
    "DECODER_FILE", "crop_to_square", "mask_iou", "MaskEncoder", "Codebook",
    "MaskDecoder", "MaskVQVAE", "evaluate_reconstruction",
]  # fmt: skip

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
    mean that stays, and revives a code that is chosen less than `dead_threshold`
    times a batch on average (0: never).
    Source: van den Oord et al. 2017, the running means in its appendix.
    """

    def __init__(
        self,
        encoder: MaskEncoder,
        decoder: MaskDecoder,
        decay: float = 0.99,
        dead_threshold: float = 0.1,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decay, self.dead_threshold = decay, dead_threshold
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
            self.update_codebook(features.detach().float(), codes)
        return self.decoder.decoder(passed), codes, commitment

    @torch.no_grad()
    def update_codebook(
        self, features: Float[Tensor, "B 512 4 4"], codes: Int[Tensor, "B 16"]
    ) -> None:
        """Move each code toward the mean of the vectors that chose it.

        A code that is dead, chosen too rarely on average, moves onto a random vector of
        the batch. Several processes count together; all use the first one's table.
        """
        vectors = features.flatten(2).transpose(1, 2).flatten(0, 1)  # [B * 16, 512]
        chose = F.one_hot(codes.flatten(), NUM_SEGS).to(vectors.dtype)  # [B * 16, 128]
        counts, sums = chose.sum(dim=0), chose.T @ vectors  # [128], [128, 512]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.counts < self.dead_threshold
        # By the CPU's generator, whose state a saved run keeps.
        picks = torch.randint(len(vectors), (int(dead.sum()),))
        self.sums[dead] = vectors[picks.to(vectors.device)]
        self.counts[dead] = 1.0
        self.decoder.codebook._embedding.copy_(self.sums / self.counts[:, None])

    @torch.no_grad()
    def encode_mask(self, mask: Bool[np.ndarray, "h w"]) -> list[int]:
        """A mask, cut out along its box → its sixteen codes; ValueError if empty."""
        square = crop_to_square(mask)[None].to(self.sums.device)  # [1, 1, 64, 64]
        return self.decoder.codebook.nearest(self.encoder(square))[0].tolist()


@torch.no_grad()
def evaluate_reconstruction(
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
        drawn = vqvae.decoder(codes)  # [b, 1, 64, 64]
        ious.append(mask_iou(part[:, 0] > 0, drawn[:, 0] > 0))
        all_codes.append(codes)
    return torch.cat(ious), torch.cat(all_codes)
