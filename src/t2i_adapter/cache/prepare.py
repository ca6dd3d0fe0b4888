"""Finds what is known of a source's pairs and makes what is missing, then hands out a reader.

Records lie under `root`/images/FINGERPRINT and `root`/texts/FINGERPRINT. The fingerprint covers the weights and the
options of that stage alone; within a folder an image record is keyed by its pictures' bytes and a text record by its
caption. So other weights at the same path are a miss, and another learning rate, output folder, caption dropout or
batch size is a hit.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from t2i_adapter.cache.records import (
    IMAGE_VERSION,
    TEXT_VERSION,
    ImageRecord,
    TextRecord,
    fingerprint,
    pack_image,
    pack_text,
    text_key,
    unpack_image,
    unpack_text,
)
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base, release
from t2i_adapter.sources.geometry import Resample, apply, plan
from t2i_adapter.sources.table import Identity, Source
from t2i_adapter.types import Geometry, Sample

IMAGE_FILTER: Resample = "bicubic"
TEXT_BATCH = 32
IMAGE_BATCH_PIXELS = 4 * 1024**2
PATIENCE_SECONDS = 1800.0
"""How long a process waits for another's next record before it gives up."""
ROOM_TO_LEAVE = 256 * 2**20

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Prepared:
    """The prepared pairs of a source, by number; reading is memory-mapped. It can be sent to loader processes."""

    pairs: tuple[Identity, ...]
    images: Shards
    texts: Shards
    text_fingerprint: str

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ImageRecord:
        """Raises UserError where the record's file is damaged."""
        pair = self.pairs[index]
        captions = tuple(self.text_key(caption) for caption in pair.captions)
        return unpack_image(self.images[pair.digest], pair.key, captions)

    def text_key(self, caption: str) -> str:
        return text_key(caption, self.text_fingerprint)

    def text(self, key: str) -> TextRecord:
        """The caption's record, by its key. Raises UserError where the record's file is damaged."""
        return unpack_text(self.texts[key])


def prepare(
    source: Source,
    *,
    resolution: int,
    in_channels: int,
    base: Base,
    device: torch.device | str,
    dtype: torch.dtype,
    root: Path,
    extra_captions: Sequence[str] = ("",),
    condition_filter: Resample = "bilinear",
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
    patience: float = PATIENCE_SECONDS,
) -> Prepared:
    """Everything a run needs of its pairs, from the cache where it is there.

    Args:
        resolution: side of the training crop, a multiple of the VAE's 8.
        in_channels: of the condition, 1 (grey) or 3.
        dtype: arithmetic of the text encoders; the VAE runs in float32.
        root: folder of all prepared records, shared by runs.
        extra_captions: captions to have besides the source's, "" for dropped ones.
        condition_filter: "nearest" for label maps.
        rank, world: processes that share this disk and prepare together: all, or those of one machine where `root` is
            not shared between machines. Each makes its share and waits for the others' by looking at the files: no
            collective call that could time out.
        patience: seconds without any new record after which waiting ends in an error.

    Every row is read once, so a damaged or missing picture is found here. Raises UserError.
    """
    assert resolution % 8 == 0 and in_channels in (1, 3)
    started = time.monotonic()
    stage = Stage(resolution, in_channels, condition_filter)
    image_folder = root / "images" / stage.fingerprint(base.vae_fingerprint)
    text_fingerprint = fingerprint(weights=base.text_fingerprint, dtype=dtype, version=TEXT_VERSION)
    text_folder = root / "texts" / text_fingerprint
    make_folders(image_folder, text_folder)
    images, texts = Shards(image_folder), Shards(text_folder)
    show = progress and rank == 0

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pairs = tuple(bar(run_ahead(pool, source.identify, range(len(source)), 256), len(source), "reading", show))
        numbers = {pair.digest: number for number, pair in enumerate(pairs)}
        captions = {text_key(text, text_fingerprint): text for text in all_captions(pairs, extra_captions)}
        new = missing(numbers, images), missing(captions, texts)
        check_room(root, least_bytes(len(new[0]), len(new[1]), resolution, base))
        share = [number for number in new[0].values() if number % world == rank]
        if share:
            build_images(pool, source, share, stage, base, device, image_folder, show)
    share = [new[1][key] for key in sorted(new[1]) if int(key, 16) % world == rank]
    if share:
        build_texts(share, text_fingerprint, base, device, dtype, text_folder, show)

    wait_for(numbers, images, patience)
    wait_for(captions, texts, patience)
    if rank == 0:
        print(
            f"prepared: {len(pairs)} pairs ({len(new[0])} new), {len(captions)} captions ({len(new[1])} new) "
            f"in {time.monotonic() - started:.0f} s at {root}",
            flush=True,
        )
    return Prepared(pairs, images, texts, text_fingerprint)


@dataclass(frozen=True)
class Stage:
    """All that decides an image record besides its pictures and the VAE."""

    resolution: int
    in_channels: int
    condition_filter: Resample

    def fingerprint(self, vae_fingerprint: str) -> str:
        return fingerprint(
            vae=vae_fingerprint,
            resolution=self.resolution,
            in_channels=self.in_channels,
            filters=f"{IMAGE_FILTER},{self.condition_filter}",
            version=IMAGE_VERSION,
        )

    def cut(self, sample: Sample) -> Cut:
        """Both pictures of a pair cut to size by one map."""
        if sample.condition is None:
            raise UserError(f"{sample.key}: has no condition picture, and one is needed to train.")
        geometry = plan((sample.image.height, sample.image.width), self.resolution)
        condition = sample.condition.convert("L" if self.in_channels == 1 else "RGB")
        return Cut(
            sample.key,
            sample.digest,
            channels_first(apply(sample.image, geometry, IMAGE_FILTER)),
            channels_first(apply(condition, geometry, self.condition_filter)),
            geometry,
        )


@dataclass(frozen=True)
class Cut:
    """A pair ready for the encoder: image (3,H,W) u8 and condition (C,H,W) u8 of one crop."""

    key: str
    digest: str
    image: np.ndarray
    condition: np.ndarray
    geometry: Geometry


def build_images(
    pool: Executor,
    source: Source,
    numbers: Sequence[int],
    stage: Stage,
    base: Base,
    device: torch.device | str,
    folder: Path,
    show: bool,
) -> None:
    """Encodes the pairs `numbers` and appends their records; decoding runs ahead of the encoder."""
    encoder = base.latent_encoder(device)
    size = max(1, min(32, IMAGE_BATCH_PIXELS // stage.resolution**2))
    with ShardWriter(folder) as writer:
        cuts = run_ahead(pool, lambda number: stage.cut(source[number]), numbers, 2 * size)
        for batch in batched(bar(cuts, len(numbers), "encoding pictures", show), size):
            pixels = torch.from_numpy(np.stack([cut.image for cut in batch])).to(device)
            moments = encoder.encode(pixels.float() / 255).float().cpu().numpy()
            for cut, moment in zip(batch, moments, strict=True):
                writer.add(cut.digest, pack_image(moment, cut.condition, cut.geometry, name=cut.key))
    del encoder
    release(device)


def build_texts(
    captions: Sequence[str],
    text_fingerprint: str,
    base: Base,
    device: torch.device | str,
    dtype: torch.dtype,
    folder: Path,
    show: bool,
) -> None:
    """Encodes the captions and appends their records."""
    encoder = base.text_encoder(device, dtype)
    with ShardWriter(folder) as writer:
        for batch in batched(bar(captions, len(captions), "encoding captions", show), TEXT_BATCH):
            states, pooled = (part.float().cpu().numpy() for part in encoder.encode(batch))
            for caption, state, pool in zip(batch, states, pooled, strict=True):
                writer.add(text_key(caption, text_fingerprint), pack_text(state, pool, name=f"caption {caption!r}"))
    del encoder
    release(device)


def wait_for(keys: Iterable[str], shards: Shards, patience: float) -> None:
    """Returns when every key is there, made by whichever process. Raises UserError after `patience` seconds in
    which nothing new appeared."""
    pause, left, last_news = 0.05, None, time.monotonic()
    while True:
        shards.refresh()
        absent = sum(key not in shards for key in keys)
        if not absent:
            return
        if absent != left:
            left, last_news = absent, time.monotonic()
        if time.monotonic() - last_news > patience:
            raise UserError(
                f"{shards.folder}: {absent} records that other processes should make did not appear in "
                f"{patience:.0f} s. Look at the other processes' messages, then start again: what is there is kept."
            )
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)


def make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(
                f"--data.prepared_dir: {folder} cannot be made ({fault.strerror}). Name a folder that can be written."
            ) from fault


def least_bytes(pairs: int, captions: int, resolution: int, base: Base) -> int:
    """What new records take at least on disk: moments and text states, without the compressed conditions."""
    config = base.unet_config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    moments = 8 * (resolution // 8) ** 2
    return 2 * (pairs * moments + captions * (77 * config["cross_attention_dim"] + pooled))


def check_room(root: Path, need: int, free: int | None = None) -> None:
    """Raises UserError where `need` bytes do not fit on the disk of `root`."""
    free = shutil.disk_usage(root).free if free is None else free
    if need and need + ROOM_TO_LEAVE > free:
        raise UserError(
            f"--data.prepared_dir {root}: at least {gigabytes(need)} are needed for prepared pictures and captions and "
            f"{gigabytes(free)} are free. Make room, or name a folder on another disk."
        )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def all_captions(pairs: Iterable[Identity], extra: Iterable[str]) -> Iterator[str]:
    """Every distinct caption, in order of appearance."""
    yield from dict.fromkeys([*extra, *(caption for pair in pairs for caption in pair.captions)])


def missing(wanted: dict[str, Any], shards: Shards) -> dict[str, Any]:
    return {key: value for key, value in wanted.items() if key not in shards}


def channels_first(picture: Any) -> np.ndarray:
    """(H,W) or (H,W,C) u8 -> (C,H,W) u8, contiguous.

    Not a transposed view: torch would take it for channels_last, whose GroupNorm on the CPU forms the variance as
    E[x^2] - E[x]^2 and is off by 1e-3 where a picture is flat.
    """
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def run_ahead(pool: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """map() in the pool, in order, at most `ahead` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batched(items: Iterable[In], size: int) -> Iterator[list[In]]:
    batch: list[In] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def bar(items: Iterable[In], total: int, what: str, show: bool) -> Iterable[In]:
    return tqdm(items, total=total, desc=what, disable=not show, leave=False, delay=0.5)
