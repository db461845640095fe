"""Public weights written anew as a folder that this library opens: safetensors, configuration, processor.

The only place where pickles of `torch.save` are read. What a source is, is told by the names of its tensors or, of a
folder or hub name in the form of transformers, by its configuration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trips.config import SelectionConfig
from trips.errors import CheckpointError, ConfigError, UnsupportedModelError
from trips.importers.albef import TASKS, load_albef
from trips.importers.albef_names import is_albef, sort_albef
from trips.importers.build import build_model_from_towers
from trips.importers.files import TensorFile
from trips.importers.naming import family_of_parts, identify, read_parts
from trips.importers.originals import Activation
from trips.importers.report import ImportReport, first_names
from trips.importers.towers import Source, find_tensors, load_text_tower, load_vision_tower, read_config
from trips.model import TripsPreTrainedModel
from trips.processor import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, TripsProcessor

ImportKind = Literal["clip", "siglip", "vit", "dinov2", "bert", "albef", "albef_retrieval", "albef_vqa", "albef_nlvr"]
Pixels = Literal["clip", "imagenet", "half"]
Task = Literal["pretraining", "retrieval", "vqa", "nlvr2"]

_TASK_KINDS = dict(zip(("pretraining", "retrieval", "vqa", "nlvr2"), TASKS))
_HALF = (0.5, 0.5, 0.5)
_PIXELS = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (_HALF, _HALF)}
# What each family was trained with. Of ViTs most were trained with ImageNet's (DeiT, MAE, DINO), Google's with halves.
_USUAL_PIXELS: dict[str, Pixels] = {"siglip": "half", "vit": "imagenet", "dinov2": "imagenet"}
_MODEL_TYPES = {"clip": "clip", "clip_vision_model": "clip", "siglip": "siglip", "siglip_vision_model": "siglip",
                "vit": "vit", "deit": "vit", "dinov2": "dinov2", "bert": "bert"}  # fmt: skip
_PREPROCESSOR = "preprocessor_config.json"


@dataclass
class ImportResult:
    """What was imported and where it lies.

    Attributes:
        kind: what the source is. model: class of what was written. written_to: its folder.
        processor: whether a processor, which needs a tokenizer, was written too.
        pixels: mean and deviation of the images: "clip", "imagenet", "half", or "as stored" beside the source.
        report: what became of every tensor.
    """

    kind: ImportKind
    model: str
    written_to: str
    processor: bool
    pixels: str
    report: ImportReport


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    kind: ImportKind | Literal["auto"] = "auto",
    text: str | Path | None = None,
    task: Task = "pretraining",
    tokenizer: str | Path | None = None,
    selection: SelectionConfig | None = None,
    num_text_layers: int = 6,
    num_fusion_layers: int = 6,
    image_size: int | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pixels: Pixels | None = None,
) -> ImportResult:
    """Read public weights in any of the known forms and write them as a folder of safetensors.

    A checkpoint of ALBEF becomes a model of its task. A vision tower together with a `text` tower becomes a model of
    `task`; alone, or where the source is a text tower, it becomes a tower's folder, which a recipe names as its
    ``model.vision`` or ``model.text``.

    Args:
        source: a file (.safetensors, .pth, .pt, .bin, .ckpt), a folder, or a hub name.
        out: folder to write; it must not exist, or be empty.
        kind: what the source has to be; "auto" takes what it is.
        text: BERT for a vision tower.
        task: class of the model that a vision and a text tower become.
        tokenizer: folder or hub name; that of `text`, or of a text tower, where there is one.
        selection: default setting of the model.
        num_text_layers, num_fusion_layers: first and last layers of the BERT; see `build_model_from_towers`.
        image_size: pixels of the square that the position table shall be of; as stored by default.
        num_heads, activation: of a vision tower's file, see `read_original`.
        pixels: mean and deviation of the images, where no preprocessor_config.json lies beside the source.
    Raises:
        CheckpointError: unreadable, another kind, keys missing or unexpected. UnsupportedModelError: another family.
        ConfigError: `out` is in use; arguments that do not fit the source.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("is in use", item=str(out), expected="a new or empty folder")
    if (file := next((above for above in out.parents if above.is_file()), None)) is not None:
        raise ConfigError("lies below a file", item=str(out), found=str(file), expected="a new or empty folder")
    tensors = find_tensors(source, pickled=True)
    found = _kind_of(source if tensors is None else tensors)
    if kind not in ("auto", found):
        raise CheckpointError("is of another kind", item=str(source), found=found, expected=kind)
    if text is not None and (found == "bert" or found in TASKS):
        raise ConfigError("is for a vision tower alone", item="text", found=str(text), expected=f"none for {found}")
    words = _tokenizer(tokenizer, text if text is not None else source if found == "bert" else None)
    special = {} if words is None else {"bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
    read: Source = source if tensors is None else tensors
    report = ImportReport()
    if found in TASKS:
        model, report = load_albef(read, selection=selection, image_size=image_size, pickled=True, **special)
    elif found == "bert":
        model = load_text_tower(read, report, num_heads=num_heads, pickled=True)
    elif text is None:
        model = load_vision_tower(
            read, report, image_size=image_size, num_heads=num_heads, activation=activation, pickled=True
        )
    else:
        model, report = build_model_from_towers(
            read, text, TASKS[_TASK_KINDS[task]], num_text_layers=num_text_layers, num_fusion_layers=num_fusion_layers,
            selection=selection, image_size=image_size, num_heads=num_heads, activation=activation, pickled=True,
            **special,
        )  # fmt: skip
    if not isinstance(model, TripsPreTrainedModel):
        report.loaded = [name for name in model.state_dict() if name not in report.resized]
    return _write(model, out, found, words, source, pixels, report)


def _kind_of(source: Source) -> ImportKind:
    if isinstance(source, TensorFile):
        if is_albef(source.tensors):
            return sort_albef(source).kind
        if (known := identify(source.tensors)) is not None:
            return family_of_parts(read_parts(source.tensors, source.path, known))
        if any(name.endswith("embeddings.word_embeddings.weight") for name in source.tensors):
            return "bert"
        raise CheckpointError(
            "the names of its tensors are those of no model that trips knows",
            item=source.path,
            found=first_names(source.tensors),
            expected="CLIP, SigLIP, ViT, DeiT, DINOv2, BERT or ALBEF",
        )
    model_type = read_config(source).model_type
    if model_type not in _MODEL_TYPES:
        hint = "trips.accelerate takes the BLIP of transformers as it is" if model_type.startswith("blip") else None
        raise UnsupportedModelError(
            "no tower that trips knows",
            item=str(source),
            found=model_type,
            expected=" | ".join(_MODEL_TYPES),
            hint=hint,
        )
    return _MODEL_TYPES[model_type]


def _tokenizer(given: str | Path | None, beside: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer asked for, or the one that lies with a text tower, or None."""
    name = given if given is not None else beside
    if name is None or (given is None and Path(name).is_file()):
        return None
    files = ("tokenizer.json", "vocab.txt")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        if given is None:
            return None
        # transformers would make one without words
        raise CheckpointError("holds no tokenizer", item=str(name), expected=" or ".join(files))
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # transformers and tokenizers raise many types for missing and damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"tokenizer cannot be read ({reason})", item=str(name)) from error


def _write(
    model: PreTrainedModel,
    out: Path,
    kind: ImportKind,
    words: PreTrainedTokenizerBase | None,
    source: str | Path,
    pixels: Pixels | None,
    report: ImportReport,
) -> ImportResult:
    whole = isinstance(model, TripsPreTrainedModel)
    config = model.config.vision_config if whole else model.config
    beside = Path(source) / _PREPROCESSOR if Path(source).is_dir() else Path(source).parent / _PREPROCESSOR
    stored = pixels is None and kind not in TASKS and beside.is_file()
    chosen = pixels or _USUAL_PIXELS.get(kind, "clip")
    mean, std = _PIXELS[chosen]
    processor = None
    if whole and words is not None:
        if len(words) > model.config.text_config.vocab_size:
            raise ConfigError(
                "the tokenizer has more words than the model",
                item="tokenizer",
                found=len(words),
                expected=f"at most {model.config.text_config.vocab_size}",
            )
        size, patch = config.image_size, config.patch_size
        if stored:
            processor = TripsProcessor.for_vision_tower(beside, words, size, patch_size=patch)
        else:
            processor = TripsProcessor(words, size, patch, mean, std)
    model.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    elif kind == "bert" and words is not None:
        words.save_pretrained(out)
    elif not whole and kind != "bert":  # a recipe reads it beside the tower
        values = {"image_mean": list(mean), "image_std": list(std), "resample": 3, "do_rescale": True,
                  "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
        content = beside.read_text(encoding="utf-8") if stored else json.dumps(values, indent=2) + "\n"
        (out / _PREPROCESSOR).write_text(content, encoding="utf-8")
    told = "" if kind == "bert" else "as stored" if stored else chosen
    return ImportResult(kind, type(model).__name__, str(out), processor is not None, told, report)
