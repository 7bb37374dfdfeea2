"""Mask tokens: the VQ-VAE that writes a mask as sixteen codes and reads it back.

Built in notebooks/19_mask_tokens.ipynb: edit it there, then run `make export`.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from .processing import NUM_SEGS

CODES_PER_MASK = 16  # for 4 × 4 cells, row by row
CODE_WIDTH = 512
DECODER_FILE = "mask_decoder.safetensors"
ENCODER_FILE = "mask_encoder.safetensors"


def crop_to_square(mask: Bool[np.ndarray, "h w"]) -> Float[Tensor, "1 64 64"]:
    """A mask cut out along its box → 64 × 64 values from -1 (outside) to 1 (inside).

    Both sides are stretched to 64. Raises ValueError for what isn't a mask with pixels.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or mask.size == 0:
        found = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"a mask is a bool array [h, w] with pixels, not {found}")
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image = image.resize((64, 64), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image, np.float32) / 127.5 - 1)[None]


def mask_iou(
    a: Bool[Tensor, "*B h w"], b: Bool[Tensor, "*B h w"]
) -> Float[Tensor, "*B"]:
    """Intersection over union of masks, pair by pair; 1 where both are empty."""
    intersection = (a & b).sum(dim=(-2, -1))  # [*B]
    union = (a | b).sum(dim=(-2, -1))  # [*B]
    return torch.where(union == 0, 1.0, intersection / union.clamp(min=1))


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


class MaskModule(nn.Module):
    """What encoder and decoder share: how they are read from a file."""

    file_name: str

    @classmethod
    def _from_bytes(
        cls, path: str | os.PathLike, content: bytes, parse: Callable[[bytes], Mapping]
    ) -> Self:
        "Filled strictly from what `parse` finds, which may hold other tensors, too."
        module = cls()
        try:
            arrays = parse(content)
            names = [name for name in module.state_dict() if name in arrays]
            # The error names each tensor that is missing or doesn't fit.
            module.load_state_dict({n: torch.as_tensor(arrays[n]) for n in names})
        except Exception as error:  # of zip, zlib, NumPy, safetensors or PyTorch
            why = f"{path} can't be read as {cls.__name__}: {error}"
            raise ValueError(why) from error
        return module.eval()

    @classmethod
    def from_npz(cls, path: str | os.PathLike, sha256: str | None = None) -> Self:
        """Read Google's `vae-oid.npz`, or a file with the same names; no pickle.

        Raises ValueError for another hash, a damaged file, a tensor missing or misfit.
        """
        content = Path(path).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise ValueError(f"{path}: SHA-256 {found}, not {sha256}; fetch it again")
        return cls._from_bytes(path, content, lambda data: np.load(io.BytesIO(data)))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Read this part's file in `folder`; raises as `from_npz` does."""
        path = Path(folder, cls.file_name)
        return cls._from_bytes(path, path.read_bytes(), load)


class MaskEncoder(MaskModule):
    """Mask → a vector for each of 4 × 4 cells; not needed to read masks.

    Its layers are inferred from the size of `vae-oid.npz`. Source: Ning et al. 2023
    (the masks as tokens), van den Oord et al. 2017 (the VQ-VAE).
    """

    file_name = ENCODER_FILE

    def __init__(self):
        super().__init__()
        layers = []
        for before, after in pairwise((1, 16, 32, 64, 128)):  # 64 → 32 → 16 → 8 → 4
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        layers += [ResidualBlock(128), ResidualBlock(128)]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(128, CODE_WIDTH, 1))

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
        return vectors.transpose(1, 2).unflatten(2, (4, 4))  # [B, 512, 4, 4]

    def nearest(self, features: Float[Tensor, "B 512 4 4"]) -> Int[Tensor, "B 16"]:
        """For each cell the code whose vector is nearest."""
        vectors = features.flatten(2).transpose(1, 2)  # [B, 16, 512]
        return torch.cdist(vectors, self._embedding).argmin(dim=-1)  # [B, 16]


class MaskDecoder(MaskModule):
    """Sixteen codes → a mask of 64 × 64: the half of the VQ-VAE that answers need."""

    file_name = DECODER_FILE

    def __init__(self):
        super().__init__()
        self._vq_vae = Codebook()  # its name in Google's file
        layers = [nn.Conv2d(CODE_WIDTH, 128, 1), nn.ReLU()]
        layers += [ResidualBlock(128), ResidualBlock(128)]
        for before, after in pairwise((128, 128, 64, 32, 16)):  # 4 → 8 → 16 → 32 → 64
            doubling = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
            layers += [doubling, nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(16, 1, 1))

    @property
    def codebook(self) -> Codebook:
        """The codes' vectors."""
        return self._vq_vae

    def forward(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 1 64 64"]:
        """Codes 0…127, row by row → values nominally -1…1; a pixel over 0 is inside.

        Raises ValueError for another number of codes, type, or one out of range.
        """
        whole = getattr(codes, "dtype", None) in (torch.int64, torch.int32)
        shaped = whole and codes.shape[1:] == (CODES_PER_MASK,)
        if not shaped or ((codes < 0) | (codes >= NUM_SEGS)).any():
            wanted = "a tensor [B, 16] of whole numbers 0…127"
            raise ValueError(f"codes must be {wanted}, not {codes!r:.99}")
        return self.decoder(self.codebook.look_up(codes))


class MaskVQVAE(nn.Module):
    """Encoder and decoder, new ones unless given, with the codebook between them.

    Training moves the codebook to running means, `decay` being the fraction of the old
    mean that stays, and revives a code that is chosen less than `dead_threshold` times
    a batch on average (0: never).
    Source: van den Oord et al. 2017, the running means in its appendix.
    """

    def __init__(self, encoder=None, decoder=None, decay=0.99, dead_threshold=0.1):
        super().__init__()
        self.encoder, self.decoder = encoder or MaskEncoder(), decoder or MaskDecoder()
        self.decay, self.dead_threshold = decay, dead_threshold
        # Running means of how many vectors chose a code, and of their sum.
        table = self.decoder.codebook._embedding
        self.register_buffer("counts", torch.ones(NUM_SEGS), persistent=False)
        self.register_buffer("sums", table.clone(), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Both parts from a folder; FileNotFoundError where one is missing."""
        encoder = MaskEncoder.from_pretrained(folder)
        return cls(encoder, MaskDecoder.from_pretrained(folder)).eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write two files; neither is replaced before both are complete. Or OSError."""
        parts = (self.encoder, self.decoder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for part in parts:
                Path(scratch, part.file_name).write_bytes(save(part.state_dict()))
            for part in parts:
                os.replace(Path(scratch, part.file_name), Path(folder, part.file_name))

    def forward(
        self, masks: Float[Tensor, "B 1 64 64"]
    ) -> tuple[Float[Tensor, "B 1 64 64"], Int[Tensor, "B 16"], Float[Tensor, ""]]:
        """Masks → their reconstructions, the codes between, and the commitment loss.

        Straight-through: the encoder gets the gradient of the decoder's input. In
        training mode the codebook moves, too.
        """
        features = self.encoder(masks)  # [B, 512, 4, 4]
        codebook = self.decoder.codebook
        codes = codebook.nearest(features)  # [B, 16]
        chosen = codebook.look_up(codes)  # [B, 512, 4, 4]
        commitment = F.mse_loss(features, chosen)
        passed = features + (chosen - features).detach()
        if self.training:  # in float32 in autocast, too
            with torch.autocast(features.device.type, enabled=False):
                self.update_codebook(features.detach().float(), codes)
        return self.decoder.decoder(passed), codes, commitment

    @torch.no_grad()
    def update_codebook(
        self, features: Float[Tensor, "B 512 4 4"], codes: Int[Tensor, "B 16"]
    ) -> None:
        """Move each code toward the mean of the vectors that chose it.

        Dead ones, chosen too rarely, move onto random vectors of the batch. Several
        processes count together; all use the first one's codebook.
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
    def encode_masks(self, masks: Sequence[Bool[np.ndarray, "_ _"]]) -> list[list[int]]:
        """Masks, cut out along their boxes → sixteen codes each. Or ValueError."""
        squares = torch.stack([crop_to_square(m) for m in masks])  # [n, 1, 64, 64]
        features = self.encoder(squares.to(self.sums.device))  # [n, 512, 4, 4]
        return self.decoder.codebook.nearest(features).tolist()


@torch.no_grad()
def evaluate_reconstruction(
    vqvae: MaskVQVAE, masks: Sequence[Bool[np.ndarray, "_ _"]]
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n 16"]]:
    """Masks, cut out along boxes → IoU (64 × 64) after sixteen tokens, and codes."""
    squares = torch.stack([crop_to_square(mask) for mask in masks])  # [n, 1, 64, 64]
    ious, all_codes = [], []
    for part in squares.to(vqvae.sums.device).split(64):  # as many as fit in any memory
        codes = vqvae.decoder.codebook.nearest(vqvae.encoder(part))  # [b, 16]
        drawn = vqvae.decoder(codes)  # [b, 1, 64, 64]
        ious.append(mask_iou(part[:, 0] > 0, drawn[:, 0] > 0))
        all_codes.append(codes)
    return torch.cat(ious), torch.cat(all_codes)
