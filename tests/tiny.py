"""Tiny configurations, weights and batches for tests: width 32, 4 vision layers, 8-pixel patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, CLIPVisionConfig, Dinov2Config, PreTrainedConfig, ViTConfig

from trips.config import PretrainingConfig, SelectionConfig, TripsConfig
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.vision import VisionEncoder

FAMILIES = ("clip", "vit", "dinov2")
BOS, EOS, VOCABULARY = 2, 3, 40

# [CLS] pieces [SEP] padding; the first two share their first token, the last two differ in length only at the end
ANSWERS = torch.tensor([[BOS, 7, EOS, 0, 0], [BOS, 7, 8, EOS, 0], [BOS, 9, 10, 11, EOS], [BOS, 9, 10, EOS, 0]])
ANSWER_MASK = (ANSWERS != 0).long()


def tiny_vision_config(family: str = "clip", width: int = 32, num_layers: int = 4) -> PreTrainedConfig:
    """A tower of 4 heads trained at 32 x 32 pixels in patches of 8."""
    shared = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    if family == "clip":
        return CLIPVisionConfig(intermediate_size=2 * width, **shared)
    if family == "vit":
        return ViTConfig(intermediate_size=2 * width, **shared)
    return Dinov2Config(mlp_ratio=2, **shared)


def tiny_bert_config(width: int = 32, num_layers: int = 2, **changes: object) -> BertConfig:
    """A BERT without dropout, so that training mode computes what evaluation computes."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return BertConfig(**{**values, **changes})


def tiny_config(
    family: str = "clip",
    *,
    width: int = 32,
    text_width: int = 32,
    num_layers: int = 4,
    architecture: str = "dual",
    **selection: object,
) -> TripsConfig:
    """A whole model; `selection` holds fields of `SelectionConfig`, by default half the patches at layers 2 and 3."""
    return TripsConfig(
        vision_config=tiny_vision_config(family, width, num_layers),
        text_config=tiny_bert_config(text_width),
        selection=SelectionConfig(**{"layers": (2, 3), "keep_rate": 0.5, **selection}),
        architecture=architecture,
    )


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value of its own: norms, LayerScale and biases too, which start as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name or "token" in name:
            value = 0.4 * noise
        elif parameter.ndim >= 2:
            value = noise / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:  # a norm's weight, LayerScale
            value = 1 + 0.3 * noise
        parameter.data.copy_(value)
    return module.eval()


def tiny_encoder(family: str, selection: SelectionConfig, **kwargs: int) -> VisionEncoder:
    """ViT-TRIPS with random weights; `kwargs` as in `tiny_vision_config`."""
    encoder = VisionEncoder(tiny_vision_config(family, **kwargs), selection).eval()
    randomise(encoder.tower)
    return encoder


def tiny_vqa_model(**kwargs: object) -> TripsForQuestionAnswering:
    """With random weights; `kwargs` as in `tiny_config`."""
    model = randomise(TripsForQuestionAnswering(tiny_config(**kwargs)))
    model.decoder.get_output_embeddings().weight.data.mul_(0.5)  # tied: keeps likelihoods away from 0 and 1
    return model


def images(count: int = 2, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    """(count, 3, height, width) noise."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def texts(count: int = 2, length: int = 6, seed: int = 2) -> tuple[Tensor, Tensor]:
    """(count, length) ids behind a [CLS] and their mask; row i ends in i places of padding (id 0)."""
    ids = torch.randint(4, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    mask = torch.ones_like(ids)
    for row in range(1, count):
        mask[row, length - min(row, length - 1) :] = 0
    return ids * mask, mask


def tiny_pretraining_model(
    pretraining: dict[str, object] | None = None, *, queue_ids: tuple[int, ...] = (), **kwargs: object
) -> TripsForPreTraining:
    """With random weights, a teacher of its own random weights and a filled queue of 7.

    Args:
        pretraining: fields of `PretrainingConfig`. queue_ids: ids of the last rows of the queue.
        kwargs: as in `tiny_config`.
    """
    config = tiny_config(**kwargs)
    config.pretraining = PretrainingConfig(**{"projection_dim": 8, "queue_size": 7, **(pretraining or {})})
    model = randomise(TripsForPreTraining(config))
    with torch.no_grad():
        model.temperature.fill_(0.3)
        for head in (model.mlm_head, *([] if model.momentum is None else [model.momentum.mlm_head])):
            head.transform.LayerNorm.weight.mul_(0.5)  # keeps the predictions away from 0 and 1
        if model.queue is not None:
            generator = torch.Generator().manual_seed(4)
            for features in (model.queue.image_features, model.queue.text_features):
                features.copy_(nn.functional.normalize(torch.randn(features.shape, generator=generator)))
            if queue_ids:
                model.queue.image_ids[-len(queue_ids) :] = torch.tensor(queue_ids)
    return model


def pair_batch(count: int = 3, seed: int = 2) -> dict[str, Tensor]:
    """`count` pairs, the second and third of one image; two tokens of the first row are masked, one of the others."""
    ids, mask = texts(count, seed=seed)
    places = torch.tensor([1, 2, *(6 * row + 1 for row in range(1, count))])
    masked = ids.flatten().index_fill(0, places, 1).view_as(ids)
    pixels = images(count, seed=seed)
    if count > 2:
        pixels[2] = pixels[1]
    image_ids = torch.arange(50, 50 + count)
    image_ids[2:3] = image_ids[1]
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": masked,
        "mlm_positions": places,
        "mlm_labels": ids.flatten()[places],
        "image_ids": image_ids,
        "caption_ids": torch.arange(90, 90 + count),
    }
