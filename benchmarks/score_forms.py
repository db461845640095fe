"""What Eq. 2 should score on a real tower: sharpness of a_cls and how much of the choice is the text's.

    python benchmarks/score_forms.py --vision ../shared/weights/dinov2-small --text MINILM_FOLDER \\
        --shards '../shared/data/flickr8k-mini-val-*.tar'

Untrained pairing of a vision tower with a text tower of the same width; `--images` photos, each with the captions of
all of them. Per score form, query norm and location it prints

- the standard deviation of the logits over patches,
- effective patches, exp(entropy of a_cls),
- overlap: share of the best `--rate` of the patches that two captions have in common on one image (1: the text is
  ignored; chance is the rate),
- gain, the fall of that overlap below 1 in units of what chance would give.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import json
import statistics
import tarfile
from pathlib import Path

import torch
from transformers import BertTokenizerFast

from trips.config import SelectionConfig, num_kept
from trips.environment import describe_environment
from trips.importers import build_model_from_towers
from trips.processor import TripsProcessor
from trips.selection import top_patches


def read_pairs(patterns: list[str], count: int) -> tuple[list, list[str]]:
    """The first `count` pictures and the first caption of each."""
    images, captions = [], []
    for path in sorted(itertools.chain.from_iterable(glob.glob(pattern) for pattern in patterns)):
        with tarfile.open(path) as tar:
            names = {member.name for member in tar.getmembers()}
            for name in sorted(names):
                if name.endswith(".json") and len(images) < count:
                    picture = next(n for n in (name[:-4] + "jpg", name[:-4] + "png") if n in names)
                    images.append(tar.extractfile(picture).read())
                    captions.append(json.load(io.BytesIO(tar.extractfile(name).read()))["captions"][0])
    return images, captions


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, _ = build_model_from_towers(args.vision, args.text, num_text_layers=6, num_fusion_layers=1)
    model.eval()
    tokenizer = BertTokenizerFast.from_pretrained(args.text)
    processor = TripsProcessor.for_vision_tower(args.vision, tokenizer, args.pixels)
    images, captions = read_pairs(args.shards, args.images)
    pixels, text = processor(images=images)["pixel_values"], processor(text=captions)
    guides = model.encode_text(text["input_ids"], text["attention_mask"])[:, 0]
    rows = []
    for score, query_norm in itertools.product(("raw_states", "states", "keys"), ("none", "layer")):
        selection = SelectionConfig(layers=tuple(args.layers), keep_rate=1.0, score=score, query_norm=query_norm)
        figures = {layer: ([], [], []) for layer in args.layers}
        for image in range(len(images)):
            prefix = model.vision.prefix(pixels[image : image + 1], selection)
            prefix = prefix.take(torch.zeros(len(captions), dtype=torch.long))
            for record in model.vision.suffix(prefix, guides, selection, observe=True).selections:
                spread, effective, overlap = figures[record.layer]
                spread.append(record.logits.std(dim=1).mean().item())
                a_cls = record.scores.clamp_min(1e-12)
                effective.append(torch.exp(-(a_cls * a_cls.log()).sum(dim=1)).mean().item())
                k = num_kept(a_cls.shape[1], args.rate)
                kept = torch.zeros_like(a_cls).scatter(1, top_patches(a_cls, k), 1.0)
                common = (kept @ kept.T / k).fill_diagonal_(0).sum() / (len(captions) * (len(captions) - 1))
                overlap.append(common.item())
        for layer, (spread, effective, overlap) in figures.items():
            mean_overlap = statistics.mean(overlap)
            rows.append(
                {
                    "score": score,
                    "query_norm": query_norm,
                    "layer": layer,
                    "logit_sd": round(statistics.mean(spread), 3),
                    "effective_patches": round(statistics.mean(effective), 1),
                    "overlap": round(mean_overlap, 3),
                    "gain": round((1 - mean_overlap) / (1 - args.rate), 3),
                }
            )
            print(json.dumps(rows[-1]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": describe_environment(), "images": len(images), "pixels": args.pixels, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
