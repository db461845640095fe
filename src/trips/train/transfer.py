"""Fine-tuning starts from a pre-trained model: which of its parts go where (section 5.1, after ALBEF)."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from trips.errors import CheckpointError, TripsError
from trips.model import TripsPreTrainedModel
from trips.tasks.pretraining import TripsForPreTraining

logger = logging.getLogger("trips")


def start_from(model: TripsPreTrainedModel, folder: Path) -> None:
    """Give a new model the weights of a pre-trained one, in place.

    Text encoder, vision tower and fusion encoder are taken as they are. A pre-training model also takes projections
    and heads; an answer decoder starts from the fusion encoder, the word embeddings and the head for masked tokens, as
    far as it has no more layers than the fusion encoder.

    Args:
        model: of any task, of the same towers.
        folder: where `TripsForPreTraining.save_pretrained` wrote.
    Raises:
        CheckpointError: no such model, or another architecture; names the first parameters that do not fit.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError("is not a saved model", item=folder, expected="config.json and model.safetensors in it")
    try:
        source, info = TripsForPreTraining.from_pretrained(folder, output_loading_info=True)
    except TripsError:
        raise
    except Exception as error:  # transformers and safetensors raise many types for damaged files
        raise CheckpointError(f"model cannot be read ({str(error).splitlines()[0]})", item=folder) from error
    if missing := sorted(info["missing_keys"]):  # they would be random here, without a word
        raise CheckpointError(
            "is not a pre-trained model",
            item=folder,
            found=f"{missing[0]} and {len(missing) - 1} more parameters missing",
            expected="the model folder of a run whose task is pretrain",
        )
    if isinstance(model, TripsForPreTraining):
        for name in ("trips", "image_projection", "text_projection", "itm_head", "mlm_head"):
            _copy(getattr(source, name), getattr(model, name), folder)
        model.temperature.data.copy_(source.temperature.data)
        model.reset_momentum()
        return
    _copy(source.trips, model.trips, folder)
    if (decoder := getattr(model, "decoder", None)) is not None:
        layers = decoder.bert.encoder.layer
        if len(layers) > len(source.trips.fusion.layer):
            raise CheckpointError(
                "has fewer fusion layers than the decoder needs",
                item=folder,
                found=len(source.trips.fusion.layer),
                expected=len(layers),
            )
        for theirs, ours in zip(list(source.trips.fusion.layer)[-len(layers) :], layers, strict=True):
            _copy(theirs, ours, folder)
        _copy(source.trips.text.embeddings, decoder.bert.embeddings, folder)
        _copy(source.mlm_head.transform, decoder.cls.predictions.transform, folder)
        decoder.cls.predictions.bias.data.copy_(source.mlm_head.bias.data)
    logger.info("started from %s", folder)


def _copy(source: nn.Module, target: nn.Module, folder: Path) -> None:
    theirs, ours = source.state_dict(), target.state_dict()
    wrong = [f"{name} missing" for name in ours if name not in theirs]
    wrong += [f"{name} unexpected" for name in theirs if name not in ours]
    wrong += [
        f"{name} of shape {tuple(theirs[name].shape)} for {tuple(value.shape)}"
        for name, value in ours.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(
            "is of another architecture",
            item=folder,
            found="; ".join(wrong[:3]),
            hint="the recipe's towers and numbers of layers must be those of the pre-training run",
        )
    target.load_state_dict(theirs)
