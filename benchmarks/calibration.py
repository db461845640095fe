"""What calibration makes of a question answering model that was trained without selection.

    python benchmarks/calibration.py --model runs/daquar_none --train 'data/daquar-train-*.tar' \
        --test 'data/daquar-test-*.tar' --out benchmarks/results/calibration.json

The model is calibrated on the training questions without their answers. Test questions are then answered with all
patches and with each guide at equal keep rates: accuracy, and how often the answer is that of the model with all
patches, which tells guides apart where accuracies are low.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import trips
from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.question_files import read_questions
from trips.data.records import BadSamples
from trips.environment import describe_environment
from trips.train.vqa_evaluation import evaluate_vqa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run or folder of a model trained without selection")
    parser.add_argument("--train", required=True, help="entry to calibrate with")
    parser.add_argument("--test", required=True, help="entry to measure on")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--images", type=int, help="test images; all if not given")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    found = trips.calibrate(args.model, args.train, layers=args.layers, keep_rate=args.keep_rate, pairs=args.pairs)
    print(json.dumps(found.to_dict(), indent=2), flush=True)
    model, processor = found.pipeline.model, found.pipeline.processor
    bad_samples = BadSamples()
    records = read_questions(args.test, bad_samples=bad_samples)[: args.images]
    dataset, candidates = VqaDataset(records, processor, bad_samples), AnswerList(found.pipeline.answers)
    literal = found.selection.replace(guide_query="layer")
    settings = {
        "all patches": literal.replace(guide="none"),
        "literal": literal,
        "calibrated": found.selection,
        "image": literal.replace(guide="image"),
        "random": literal.replace(guide="random"),
    }
    rows, answers = {}, {}
    for name, selection in settings.items():
        torch.manual_seed(0)  # the random guide's
        model.config.selection = selection
        begun = time.perf_counter()
        scores = evaluate_vqa(model, dataset, VqaCollator(processor), candidates, top_k=8)
        answers[name] = scores.answers
        same = [said == answers["all patches"][key] for key, said in scores.answers.items()]
        rows[name] = {
            "accuracy": scores.accuracy,
            "same_answer": sum(same) / len(same),
            "num_questions": scores.num_questions,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        print(name, rows[name], flush=True)
    result = {"environment": describe_environment(), "calibration": found.to_dict(), "answers": rows}
    result["pixels"], result["arguments"] = list(processor.image_size), {"pairs": args.pairs, "images": args.images}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
