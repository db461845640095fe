"""Public towers read whole: CLIP, SigLIP, ViT, DeiT or DINOv2 for vision, BERT for text (section 3.1, 4.1).

A folder or hub name in the form of transformers is read by transformers; a file, or a folder in another form, by the
names of its tensors.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from trips.errors import CheckpointError, ConfigError, TripsError, UnsupportedModelError
from trips.importers.files import TensorFile, check_floating, check_floating_files, read_tensors
from trips.importers.originals import HEAD_WIDTH, Activation, original_file, read_original
from trips.importers.positions import resize_positions
from trips.importers.report import ImportReport, first_names
from trips.processor_checks import positive_int
from trips.towers import family_of

# Parts of public checkpoints that a tower has no place for, by prefix: named in the report, not an error.
_IGNORED_VISION = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "pooler.",
                   "classifier.", "vit.pooler.", "embeddings.mask_token", "mask_token", "head.",
                   "vision_model.head.")  # fmt: skip
_IGNORED_TEXT = ("pooler.", "bert.pooler.", "cls.", "embeddings.position_ids", "bert.embeddings.position_ids")
Source = str | Path | TensorFile
_BERT_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


def read_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Configuration of a tower; `CheckpointError` names a folder without one or a name that cannot be reached."""
    if isinstance(name_or_path, Path) and not name_or_path.is_dir():
        raise CheckpointError("no such folder", item=str(name_or_path))
    try:
        return AutoConfig.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration to be read ({str(error).splitlines()[0]})", item=str(name_or_path)
        ) from error


def find_tensors(source: Source, *, pickled: bool = False) -> TensorFile | None:
    """The tensors of a file, or of the one in a folder; None for what transformers reads itself.

    Raises:
        CheckpointError: see `read_tensors` and `original_file`.
    """
    if isinstance(source, TensorFile):
        return source
    path = Path(source)
    file = original_file(path, pickled=pickled) if path.is_dir() else path
    if path.is_dir() and file is None and not pickled and not any(path.glob("*.safetensors")):
        if old := sorted(path.glob("pytorch_model*.bin")):
            raise CheckpointError(
                "is a pickle, which is only read to be converted",
                item=old[0],
                expected=".safetensors",
                hint=f'"trips import {path.name} FOLDER" writes them',
            )
    if file is None or not (file.is_file() or file.suffix == ".safetensors"):
        return None
    return read_tensors(file, pickled=pickled)


def load_vision_tower(
    name_or_path: Source,
    report: ImportReport | None = None,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pickled: bool = False,
) -> PreTrainedModel:
    """A CLIP, SigLIP, ViT, DeiT or DINOv2 tower in float32, every weight read.

    The distillation token of a DeiT is left out, as the tower of this library has one token before its patches. SigLIP
    is loaded without its pooling head; it has no [CLS] and so cannot be the tower of a `TripsModel`.

    Args:
        name_or_path: local folder, hub name, a .safetensors file, or what `read_tensors` has read; a full CLIP model
            gives its vision half. Tensors may have the names of transformers, OpenAI, open_clip, timm or Meta.
        report: receives what was ignored and resized.
        image_size: pixels of the square that the position table shall be of; it is interpolated. As stored by default.
        num_heads, activation, pickled: see `read_original` and `read_tensors`; only for files.
    Raises:
        CheckpointError: unreadable, or keys missing or unexpected. UnsupportedModelError: another family.
        ConfigError: an image size that holds no patch, or see `read_original`.
    """
    tensors = find_tensors(name_or_path, pickled=pickled)
    if tensors is not None:
        original = read_original(tensors, num_heads=num_heads, activation=activation)
        if report is not None:
            report.ignored += [f"vision: {name}" for name in original.ignored]
        tower = load_state(original.config, original.state, tensors.path)
    else:
        config = read_config(name_or_path)
        if config.model_type == "deit":
            tower = _load_deit(config, name_or_path, report)
        else:
            config = config.vision_config if config.model_type in ("clip", "siglip") else config
            family = family_of(config)
            if config.model_type == "siglip_vision_model":
                config.vision_use_head = False
            tower = _load(family.model_class, config, name_or_path, dict(family.model_kwargs), _IGNORED_VISION, report)
    return tower if image_size is None else resize_tower(tower, image_size, report)


def _load_deit(config: PreTrainedConfig, name: str | Path, report: ImportReport | None) -> PreTrainedModel:
    """A distilled DeiT that transformers saved, as the ViT that it is without its distillation token."""
    file = Path(name) / "model.safetensors"
    if not file.is_file():
        raise UnsupportedModelError(
            "a distilled DeiT is only read from a folder with model.safetensors", item=str(name), found="deit"
        )
    original = read_original(read_tensors(file), num_heads=config.num_attention_heads)
    original.config.layer_norm_eps, original.config.hidden_act = config.layer_norm_eps, config.hidden_act
    if report is not None:
        report.ignored += [f"vision: {name}" for name in original.ignored]
    return load_state(original.config, original.state, file)


def load_state(config: PreTrainedConfig, state: dict[str, Tensor], item: Path) -> PreTrainedModel:
    """A vision tower from tensors under the names that transformers stores; `CheckpointError` if they do not fit."""
    family = family_of(config)
    return _load(family.model_class, config, item, dict(family.model_kwargs), (), None, state)


def load_text_tower(
    name_or_path: Source,
    report: ImportReport | None = None,
    *,
    num_heads: int | None = None,
    pickled: bool = False,
) -> BertModel:
    """A BERT text tower of any depth in float32, all its layers; arguments and errors as `load_vision_tower`."""
    if (tensors := find_tensors(name_or_path, pickled=pickled)) is not None:
        state, prefix = bert_state(tensors)
        config = bert_config(state, tensors, num_heads=num_heads)
        if report is not None:
            report.ignored += [f"text: {name}" for name in tensors.others]
        beside = {name: value for name, value in tensors.tensors.items() if not name.startswith(prefix)}
        state |= {name: value for name, value in beside.items() if prefix}
        return _load(BertModel, config, tensors.path, {"add_pooling_layer": False}, _IGNORED_TEXT, report, state)
    config = read_config(name_or_path)
    if not isinstance(config, BertConfig):
        raise UnsupportedModelError(
            "not a BERT text tower", item=str(name_or_path), found=config.model_type, expected="bert"
        )
    return _load(BertModel, config, name_or_path, {"add_pooling_layer": False}, _IGNORED_TEXT, report)


def bert_state(file: TensorFile) -> tuple[dict[str, Tensor], str]:
    """The tensors of a BERT without their prefix, and the prefix; transformers itself knows the older names of norms.

    Raises:
        CheckpointError: there is no BERT among them, or one of integers.
    """
    mark = "embeddings.word_embeddings.weight"
    prefix = next((name for name in ("", "bert.") if name + mark in file.tensors), None)
    if prefix is None or prefix + "encoder.layer.0.attention.self.query.weight" not in file.tensors:
        raise CheckpointError(
            "the names of its tensors are not those of a BERT",
            item=file.path,
            found=first_names(file.tensors),
            expected=f"{mark}, encoder.layer.0.attention.self.query.weight and so on",
        )
    check_floating({name: v for name, v in file.tensors.items() if name.startswith((prefix, "cls."))}, file.path)
    named = file.tensors.items()
    state = {name.removeprefix(prefix): value for name, value in named if name.startswith(prefix)}
    return state, prefix


def bert_config(
    state: dict[str, Tensor], file: TensorFile, *, num_heads: int | None = None, **more: object
) -> BertConfig:
    """The configuration that follows from the shapes of a BERT's tensors; heads of 64 unless told otherwise.

    Raises:
        CheckpointError: a layer or a table is missing. ConfigError: the width is no multiple of the heads.
    """
    numbers = {int(match[1]) for name in state if (match := _BERT_LAYER.match(name))}
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    missing = [f"encoder.layer.{n}" for n in sorted(set(range(max(numbers) + 1)) - numbers)]
    missing += [name for name in (*tables, "encoder.layer.0.intermediate.dense.weight") if name not in state]
    if missing:
        raise CheckpointError("missing keys", item=file.path, found=first_names(missing))
    words, places, kinds = (state[name] for name in tables)
    width = words.shape[1]
    num_heads = max(width // HEAD_WIDTH, 1) if num_heads is None else positive_int(num_heads, "num_heads")
    if width % num_heads:
        raise ConfigError("width is no multiple of the heads", item="num_heads", found=(width, num_heads))
    return BertConfig(
        vocab_size=words.shape[0],
        hidden_size=width,
        num_hidden_layers=max(numbers) + 1,
        num_attention_heads=num_heads,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=places.shape[0],
        type_vocab_size=kinds.shape[0],
        **more,
    )


def resize_tower(tower: PreTrainedModel, image_size: int, report: ImportReport | None = None) -> PreTrainedModel:
    """The same tower with the position table of another square of pixels; `ConfigError` if that holds no patch."""
    config = tower.config
    if positive_int(image_size, "image_size") < config.patch_size:
        raise ConfigError(
            "no patch fits", item="image_size", found=image_size, expected=f"at least {config.patch_size}"
        )
    if image_size == config.image_size:
        return tower
    state = tower.state_dict()
    name = next(name for name in state if ".position_embedding" in name and "ids" not in name)
    sides = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    grid, side = tuple(pixels // config.patch_size for pixels in sides), image_size // config.patch_size
    state[name] = resize_positions(state[name], grid, (side, side))
    config = type(config).from_dict({**config.to_dict(), "image_size": image_size})
    config._attn_implementation = tower.config._attn_implementation
    family = family_of(config)
    resized = family.model_class._from_config(config, **dict(family.model_kwargs))
    resized.load_state_dict(state)
    if report is not None:
        report.resized.append(name)
    return resized.eval()


def _load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    name_or_path: str | Path,
    kwargs: dict,
    ignored: tuple[str, ...],
    report: ImportReport | None,
    state: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """By transformers, from its own folder or from tensors under the names that it stores."""
    if state is None:  # transformers would take integers for what they are worth
        check_floating_files(Path(name_or_path))
    try:
        model, info = model_class.from_pretrained(
            None if state is not None else str(name_or_path),
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, so that the error below can name the key
            **kwargs,
        )
    except TripsError:
        raise
    except pickle.UnpicklingError as error:  # torch advises to run what it has refused
        raise CheckpointError(
            "holds objects that are no data, and may run code when read",
            item=str(name_or_path),
            hint="nothing of it was run",
        ) from error
    except Exception as error:  # transformers, safetensors and the hub client raise what they like here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"weights cannot be read ({reason})", item=str(name_or_path)) from error
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(ignored)]
    for problem, keys in (
        ("missing keys", info["missing_keys"]),
        ("keys of another shape", info.get("mismatched_keys", ())),
        ("unexpected keys", unexpected),
    ):
        if keys:
            raise CheckpointError(problem, item=str(name_or_path), found=first_names(keys))
    if report is not None:
        part = "text" if model_class is BertModel else "vision"  # both may have a "pooler.dense.weight"
        report.ignored += [f"{part}: {key}" for key in sorted(set(info["unexpected_keys"]) - set(unexpected))]
    return model
