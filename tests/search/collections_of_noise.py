"""A collection of small pictures, a model that can search it, and what tests compare an index with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pipelines import picture, tiny_processor
from tiny import tiny_pretraining_model

from trips.images import FileSlice
from trips.pipeline import TripsPipeline
from trips.search.files import read_manifest, read_shard
from trips.search.index import ImageIndex


def tiny_pipeline(batch_size: int = 4, **kwargs: object) -> TripsPipeline:
    return TripsPipeline(tiny_pretraining_model(**kwargs), tiny_processor(), batch_size=batch_size)


def save_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, format="PNG")


def fill(folder: Path, count: int = 7) -> Path:
    """Pictures 0.png, sub/1.png, 2.png, ..."""
    for seed in range(count):
        save_picture(folder / ("sub" if seed % 2 else "") / f"{seed}.png", seed)
    return folder


def write_tar(path: Path, seeds: list[int]) -> Path:
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            buffer = io.BytesIO()
            picture(seed).save(buffer, format="PNG")
            for suffix, data in (("png", buffer.getvalue()), ("json", json.dumps({"seed": seed}).encode())):
                member = tarfile.TarInfo(f"photo{seed}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def features_of(index: ImageIndex) -> dict[str, np.ndarray]:
    """Key to stored feature, read from the shards that the manifest names."""
    found: dict[str, np.ndarray] = {}
    for name in read_manifest(index.folder)["shards"]:
        shard = read_shard(index.folder / "shards" / name)
        for (key, _, _), feature in zip(shard.rows, shard.features(), strict=True):
            assert key not in found
            found[key] = feature
    return found


@torch.no_grad()
def similarities(trained: TripsPipeline, images: dict[str, Path | FileSlice | Image.Image], text: str) -> list:
    """(cosine, key), best first, one picture at a time."""
    scores = {key: trained.similarity(image, text).item() for key, image in images.items()}
    return sorted(((score, key) for key, score in scores.items()), reverse=True)
