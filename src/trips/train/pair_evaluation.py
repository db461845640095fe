"""How good a pre-trained model is, without any fine-tuning: zero-shot retrieval and the losses on held-out pairs.

Retrieval is the first stage of section 5.1.3: contrastive features of every image and every text, text-free on the
image's side, so that nothing is computed per pair. What the text guide is worth shows in the losses of matching and
masked words, whose image states it selects.

Dimensions: I images, B texts of the test part, P projection width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trips.data.pair_batches import PairCollator
from trips.data.pair_records import PairRecord
from trips.data.pairs import PairDataset
from trips.data.records import BadSamples
from trips.errors import DataError
from trips.metrics import recall_at_k
from trips.processor import TripsProcessor
from trips.tasks.pretraining import TripsForPreTraining


@torch.no_grad()
def evaluate_retrieval(
    model: TripsForPreTraining,
    records: Sequence[PairRecord],
    processor: TripsProcessor,
    bad_samples: BadSamples,
    batch_size: int = 32,
) -> dict[str, Any]:
    """R@1, 5 and 10 from images to texts and back, by contrastive features alone.

    Args:
        model: put into evaluation mode, and back if it was training.
        records: I images with all their texts; one that cannot be read is left out with its texts, and counted.
        batch_size: images per batch; four times as many texts.
    Returns:
        ``text_recall`` (image to text) and ``image_recall`` (text to image), {k: share}, ``mean_recall`` of the six,
        ``num_images``, ``num_texts``.
    Raises:
        DataError: no image can be read.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    images, texts, owners, count = [], [], [], 0
    for start in range(0, len(records), batch_size):
        arrays = []
        for record in records[start : start + batch_size]:
            with bad_samples.guard(record.source):
                arrays.append(processor.resize(record.image, name=record.source))
                owners += [count] * len(record.texts)
                texts += record.texts
                count += 1
        if arrays:
            images.append(model.encode_image(processor.normalise(arrays).to(device)).cpu())
    if not images:
        raise DataError("no image can be read", item="data.test", found=f"{len(records)} samples")
    features = []
    for start in range(0, len(texts), 4 * batch_size):
        batch = processor(text=texts[start : start + 4 * batch_size]).to(device)
        features.append(model.encode_texts(batch["input_ids"], batch["attention_mask"]).cpu())
    similarity = torch.cat(images) @ torch.cat(features).T  # (I, B)
    relevant = torch.arange(len(similarity))[:, None] == torch.tensor(owners)[None]
    text_recall, image_recall = recall_at_k(similarity, relevant), recall_at_k(similarity.T, relevant.T)
    model.train(was_training)
    return {
        "text_recall": text_recall,
        "image_recall": image_recall,
        "mean_recall": sum([*text_recall.values(), *image_recall.values()]) / 6,
        "num_images": len(similarity),
        "num_texts": len(texts),
    }


@torch.no_grad()
def evaluate_losses(model: TripsForPreTraining, pairs: PairDataset, batch_size: int = 32) -> dict[str, float]:
    """Mean losses of held-out pairs: hard labels, the same masks and draws of negatives at every call.

    Hard negatives come from the batch, so figures compare only at one batch size; a last short batch is left out.

    Args:
        model: put into evaluation mode, and back if it was training; its queue stays as it is.
        pairs: one text of each image.
        batch_size: pairs per batch, as many as there are at most.
    Returns:
        ``itm`` (chance 0.637: a third of the pairs match) and ``mlm``, in nats.
    """
    was_training, device, alpha = model.training, next(model.parameters()).device, model.alpha.clone()
    model.eval()
    model.alpha.zero_()  # what the teacher would have said is no ground truth
    collate, batch_size = PairCollator(pairs.processor), min(batch_size, len(pairs))
    generator = torch.Generator(device).manual_seed(0)
    totals, count = {"itm": 0.0, "mlm": 0.0}, len(pairs) // batch_size
    for start in range(0, count * batch_size, batch_size):
        batch = collate([pairs[0, position] for position in range(start, start + batch_size)])
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        output = model(**tensors, generator=generator)
        totals["itm"] += float(output.loss_itm) / count
        totals["mlm"] += float(output.loss_mlm) / count
    model.alpha.copy_(alpha)
    model.train(was_training)
    return totals
