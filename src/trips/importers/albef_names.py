"""ALBEF's own checkpoints: what their names mean in this library's models (section 4.1: the paper builds on ALBEF).

One BERT holds text encoder and fusion encoder: its layers without cross-attention are the first, those with it the
second. For two images every fusion layer is two blocks, image 0 then image 1, with one key and one value projection
between them. Names that end their first word in "_m" are the momentum copies.

Legend: T text layers, F fusion layers, n images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trips.errors import CheckpointError, UnsupportedModelError
from trips.importers.files import TensorFile, check_floating
from trips.importers.report import first_names

Kind = Literal["albef", "albef_retrieval", "albef_vqa", "albef_nlvr"]

VISION, TEXT = "visual_encoder.", "text_encoder."
_LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.(.+)")
_MOMENTUM = re.compile(r"^([a-z_]+)_m\.")
_QUEUE = {"image_queue": "image_features", "text_queue": "text_features", "idx_queue": "image_ids",
          "queue_ptr": "pointer"}  # fmt: skip
_RENAMED = (
    (re.compile(r"text_encoder\.(?:bert\.)?embeddings\.(.+)"), r"trips.text.embeddings.\1"),
    (re.compile(r"text_encoder\.cls\.predictions\.(bias|transform\..+)"), r"mlm_head.\1"),
    (re.compile(r"text_decoder\.(bert|cls)\.(.+)"), r"decoder.\1.\2"),
    (re.compile(r"vision_proj\.(.+)"), r"image_projection.\1"),
    (re.compile(r"text_proj\.(.+)"), r"text_projection.\1"),
    (re.compile(r"itm_head\.(.+)"), r"itm_head.\1"),
    (re.compile(r"cls_head\.(.+)"), r"reasoning_head.\1"),
    (re.compile(r"temp"), "temperature"),
)
_TIED = re.compile(r"(.+cls\.predictions\.)decoder\.(weight|bias)")
_LEFT_OUT = re.compile(r".*\.position_ids|ta_head\..+")


@dataclass
class AlbefModel:
    """A checkpoint sorted.

    Attributes:
        kind: which of ALBEF's models.
        num_text_layers: T. num_blocks: F, or n F for several images.
        state: by the names of this library; of the vision tower none.
        vision: its tensors without prefix, under timm's names.
        queue: by the names of `FeatureQueue`.
        source: name in the file of every name in `state`. names: all names in the file that `state` holds.
        ignored: names that have no place.
        momentum: the same of the momentum copies, None where the file has none.
    """

    kind: Kind
    num_text_layers: int
    num_blocks: int
    state: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    queue: dict[str, Tensor] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    momentum: AlbefModel | None = None

    def name_in_file(self, name: str) -> str:
        """What the file would call a tensor of this library's model; for messages."""
        bert = TEXT + ("bert." if any(".bert.embeddings." in known for known in self.source.values()) else "")
        if match := re.fullmatch(r"trips\.(text\.encoder|fusion)\.layer\.(\d+)\.(.+)", name):
            shift = self.num_text_layers if match[1] == "fusion" else 0
            return f"{bert}encoder.layer.{int(match[2]) + shift}.{match[3]}"
        for ours, theirs in (("trips.text.", bert), ("mlm_head.", TEXT + "cls.predictions."), ("temperature", "temp"),
                             ("decoder.", "text_decoder."), ("image_projection.", "vision_proj."),
                             ("text_projection.", "text_proj."), ("reasoning_head.", "cls_head.")):  # fmt: skip
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def is_albef(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of ALBEF or its kin: a vision tower and a BERT side by side."""
    return any(name.startswith(VISION) for name in tensors) and any(name.startswith(TEXT) for name in tensors)


def sort_albef(file: TensorFile) -> AlbefModel:
    """Sort the tensors of a checkpoint of ALBEF, momentum copies apart.

    Raises:
        CheckpointError: a name that ALBEF does not have, or tensors that it ties and that differ; names them.
        UnsupportedModelError: a model of ALBEF's kin that has no counterpart here, as BLIP.
    """
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, value in file.tensors.items():
        plain = _MOMENTUM.sub(r"\1.", name)
        (own if plain == name else copies)[plain] = value
    model = _sort(own, file, "")
    model.ignored += file.others
    if copies:
        model.momentum = _sort(copies, file, "_m", model)
    return model


def _sort(tensors: Mapping[str, Tensor], file: TensorFile, mark: str, original: AlbefModel | None = None) -> AlbefModel:
    if original is None:
        model = AlbefModel(*_kind(tensors, file))
    else:
        model = AlbefModel(original.kind, original.num_text_layers, original.num_blocks)
    unexpected = []
    for name, value in tensors.items():
        source = re.sub(r"^([a-z_]+)\.", rf"\1{mark}.", name) if mark else name
        if name.startswith(VISION):
            model.vision[name.removeprefix(VISION)] = value
        elif name in _QUEUE:
            model.queue[_QUEUE[name]] = value
        elif _LEFT_OUT.fullmatch(name):
            model.ignored.append(source)
        elif (tied := _TIED.fullmatch(name)) is not None:
            _check_tied(tensors, name, tied, file)
            model.ignored.append(source)
        elif (ours := _our_name(name, model)) is not None:
            if ours in model.state and not torch.equal(model.state[ours], value):
                raise CheckpointError(
                    "the two images of a layer have keys or values of their own, where ALBEF's share them",
                    item=file.path,
                    found=[model.source[ours], source],
                )
            model.state[ours], model.source[ours] = value, source
            model.names.append(source)
        else:
            unexpected.append(source)
    if unexpected:
        raise CheckpointError("unexpected keys", item=file.path, found=first_names(unexpected))
    check_floating({model.source[name]: value for name, value in model.state.items()}, file.path)
    check_floating({name: tensors[name] for name in ("image_queue", "text_queue") if name in tensors}, file.path)
    return model


def _kind(tensors: Mapping[str, Tensor], file: TensorFile) -> tuple[Kind, int, int]:
    """Which model, T, and the number of blocks with cross-attention."""
    numbers, crossed = set(), set()
    for name in tensors:
        if match := _LAYER.fullmatch(name):
            numbers.add(int(match[1]))
            if match[2].startswith("crossattention."):
                crossed.add(int(match[1]))
    if not crossed:
        raise CheckpointError("the text encoder has no layers with cross-attention", item=file.path)
    first, total = min(crossed), max(numbers) + 1
    if gaps := set(range(total)) - numbers:
        root = TEXT + ("bert." if any(name.startswith(f"{TEXT}bert.") for name in tensors) else "")
        raise CheckpointError(
            "missing keys", item=file.path, found=first_names(f"{root}encoder.layer.{n}" for n in gaps)
        )
    if first == 0:
        raise UnsupportedModelError(
            "every layer of the text encoder has cross-attention: this is BLIP's form, not ALBEF's",
            item=file.path,
            expected="text layers first, then fusion layers",
            hint="trips.accelerate takes the BLIP of transformers as it is",
        )
    classes = len(tensors["cls_head.2.weight"]) if "cls_head.2.weight" in tensors else None
    if any(name.startswith("text_decoder.") for name in tensors):
        kind: Kind = "albef_vqa"
    elif classes not in (None, 2):
        raise UnsupportedModelError(
            "a classifier that no task here has", item=f"{file.path}: cls_head.2.weight", found=f"{classes} classes"
        )
    elif classes == 2 or any(name.startswith("ta_head.") for name in tensors):
        kind = "albef_nlvr"
        if (total - first) % 2:
            raise CheckpointError(
                "blocks do not come in pairs, one for each image", item=file.path, found=total - first
            )
    elif any(name.startswith(TEXT + "cls.") for name in tensors):
        kind = "albef"
    else:
        kind = "albef_retrieval"
    return kind, first, total - first


def _our_name(name: str, model: AlbefModel) -> str | None:
    if match := _LAYER.fullmatch(name):
        layer, rest = int(match[1]), match[2]
        if layer < model.num_text_layers:
            return f"trips.text.encoder.layer.{layer}.{rest}"
        block = layer - model.num_text_layers
        if model.kind == "albef_nlvr" and (shared := rest.removeprefix("crossattention.self.")) != rest:
            if shared.startswith(("key.", "value.")):
                return f"trips.fusion.keys_and_values.{block // 2}.{shared}"
        return f"trips.fusion.layer.{block}.{rest}"
    return next((pattern.sub(ours, name) for pattern, ours in _RENAMED if pattern.fullmatch(name)), None)


def _check_tied(tensors: Mapping[str, Tensor], name: str, tied: re.Match[str], file: TensorFile) -> None:
    """The output layer of a head is the word embeddings, or its bias the head's: one tensor under two names."""
    if tied[2] == "bias":
        partner = f"{tied[1]}bias"
    else:
        root = tied[1].removesuffix("cls.predictions.")
        places = (f"{root}bert.embeddings.word_embeddings.weight", f"{root}embeddings.word_embeddings.weight")
        partner = next((place for place in places if place in tensors), places[0])
    if partner in tensors and not torch.equal(tensors[partner], tensors[name]):
        raise CheckpointError(
            "is a layer of its own, where ALBEF's is one with another", item=f"{file.path}: {name}", expected=partner
        )
