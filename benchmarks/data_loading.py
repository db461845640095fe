"""Speed of the loader of image-text pairs on one core, against what Pillow alone needs for the same files.

    python benchmarks/data_loading.py ../shared/data/flickr8k-mini-train-*.tar ../shared/data/daquar-train-*.tar
    python benchmarks/data_loading.py --quick SHARDS      # few images, to see that it runs

Three things take turns on the same images, in the same order: Pillow decodes to RGB (with the same draft scaling);
Pillow decodes and resizes to the model's input, which no loader can spare; the loader makes whole batches (reading the
tar, parsing, drawing a text, decoding, resizing, tokens, masking, normalising). With augmentation the resize is that
of the random crop, and RandAugment is Pillow's work too. Each set is measured as it is and, to stand for larger photos,
enlarged to 640 pixels; with and without augmentation. Time is that of the processor, not of the clock, so that a busy
machine does not blur it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trips.data.pair_batches import PairCollator
from trips.data.pairs import Corpus, PairDataset
from trips.data.records import BadSamples
from trips.data.remote import ShardCache
from trips.data.shards import Members, Shard, load_index
from trips.data.transforms import TrainTransform, crop_box, randaugment
from trips.environment import describe_environment
from trips.processor import TripsProcessor
from trips.train.pretraining import read_pairs
from trips.train.recipe import DataSection, ModelSection
from trips.train.towers import build_processor

ENLARGED = 640  # the longer side of COCO's photos


def make_processor(files: list[str], pixels: int) -> TripsProcessor:
    """As in training, with the words of these texts: a vocabulary of the size of BERT's need not be at hand."""
    texts = [text for record in read_pairs(files, ShardCache(), BadSamples()) for text in record.texts]
    section = DataSection(image_size=pixels, max_text_length=25)
    processor = build_processor(ModelSection(vision="tiny", text="tiny"), section, texts)
    processor.jpeg_draft = True
    return processor


def enlarge(file: Path, folder: Path, count: int) -> Path:
    """A tar with the first samples of another, their images enlarged and encoded anew as JPEG."""
    shard, target = Shard(str(file), load_index(file)), folder / file.name
    with file.open("rb") as stream, tarfile.open(target, "w") as tar:
        for sample in range(min(count, len(shard))):
            members: Members = shard.read(sample, stream)
            image = Image.open(io.BytesIO(members.image)).convert("RGB")
            factor, buffer = ENLARGED / max(image.size), io.BytesIO()
            image.resize((round(image.width * factor), round(image.height * factor))).save(buffer, "JPEG", quality=90)
            for suffix, content in (("jpg", buffer.getvalue()), ("json", members.json)):
                info = tarfile.TarInfo(f"{sample:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return target


def pillow(data: bytes, index: int, pixels: int, transform: TrainTransform | None, resize: bool) -> None:
    """What Pillow has to do for one image, by itself."""
    image = Image.open(io.BytesIO(data))
    rng, (width, height) = np.random.default_rng((0, 0, index, 0)), image.size
    box = (0, 0, width, height) if transform is None else crop_box(width, height, transform.scale, rng)
    image.draft(None, (math.ceil(pixels * width / (box[2] - box[0])), math.ceil(pixels * height / (box[3] - box[1]))))
    image = image.convert("RGB")
    if resize:
        across, down = image.width / width, image.height / height
        scaled = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
        image = image.resize((pixels, pixels), Image.Resampling.BICUBIC, box=scaled)
        if transform is not None:
            randaugment(image, rng, *transform.randaugment)


def measure(files: list[Path], args: argparse.Namespace, transform: TrainTransform | None) -> dict[str, object]:
    """Images per second of processor time, medians over the batches of all rounds."""
    names = [str(file) for file in files]
    dataset = PairDataset([Corpus("benchmark", names)], make_processor(names, args.pixels), transform, BadSamples())
    collator = PairCollator(dataset.processor)
    count = min(args.images, len(dataset)) // args.batch * args.batch
    encoded = [dataset.read(dataset.locate(0, i)).image for i in range(count)]

    def alone(start: int, resize: bool) -> None:
        for i in range(start, start + args.batch):
            pillow(encoded[i], i, args.pixels, transform, resize)

    def load(start: int) -> None:
        collator(dataset.__getitems__([(0, i) for i in range(start, start + args.batch)]))

    subjects: dict[str, Callable[[int], None]] = {
        "decode": lambda start: alone(start, False),
        "decode and resize": lambda start: alone(start, True),
        "loader": load,
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_number in range(args.rounds + 1):
        for start in range(0, count, args.batch):
            for name, subject in subjects.items():
                begin = time.process_time()
                subject(start)
                if round_number:  # the first warms up
                    seconds[name].append((time.process_time() - begin) / args.batch)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "images": count,
        "images_per_second": {name: round(1 / value, 1) for name, value in median.items()},
        "loader_over_decode": round(median["decode"] / median["loader"], 3),
        "loader_over_decode_and_resize": round(median["decode and resize"] / median["loader"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path, help="local WebDataset tars, measured set by set")
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.quick:
        args.images, args.rounds = 64, 1
    torch.set_num_threads(1)
    sets: dict[str, list[Path]] = {}
    for file in args.shards:
        sets.setdefault(file.stem.rstrip("0123456789").rstrip("-"), []).append(file)
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in list(sets.items()):
            sets[f"{name}, {ENLARGED} px"] = [enlarge(file, Path(folder), args.images) for file in files]
        for name, files in sets.items():
            results[name] = measure(files, args, None)
            results[f"{name}, augmented"] = measure(files, args, TrainTransform(args.pixels))
    result = {
        "environment": describe_environment(),
        "pixels": args.pixels,
        "batch": args.batch,
        "rounds": args.rounds,
        "sets": results,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
