"""The card of a saved model: what it is, what it costs, what it was trained on and how well it does (README.md).

Not part of the paper. `TripsPreTrainedModel.save_pretrained` leaves one where none is, a run replaces it by one with
its figures, and `push_to_hub` takes it along. A card that a person has written is never touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from trips.bench.flops import FlopCount, count_flops, count_reasoning_flops
from trips.config import SelectionConfig, TripsConfig, token_counts
from trips.errors import TripsError

CARD_FILE = "README.md"

_MARK = "<!-- Written by trips. Without this line a later run leaves the card as it is. -->"
_TEXT_LENGTH = 40  # tokens that operations are counted with where nothing else is known: the processor's default
# By class: the tag of the hub, and what is done with the model.
_USES: dict[str, tuple[str | None, str]] = {
    "TripsForQuestionAnswering": ("visual-question-answering", 'model.ask("street.jpg", "What colour is the bus?")'),
    "TripsForImageTextRetrieval": ("feature-extraction", 'model.score(["a.jpg", "b.jpg"], "a man at the beach")'),
    "TripsForPreTraining": ("feature-extraction", 'model.score(["a.jpg", "b.jpg"], "a man at the beach")'),
    "TripsForVisualReasoning": (None, 'model.verify(["a.jpg", "b.jpg"], "both images show a dog")'),
}
_METRICS = {"accuracy": "accuracy", "consistency": "accuracy", "text_recall": "recall", "image_recall": "recall",
            "mean_recall": "recall"}  # fmt: skip
_NOT_MEASURED = frozenset(("environment", "recipe", "untrained", "bad_samples", "losses", "test_losses"))


def model_card(
    config: TripsConfig,
    model_class: str,
    *,
    results: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    text_length: int = _TEXT_LENGTH,
) -> ModelCard:
    """A card from a configuration and, where there are any, the results of a run.

    The licence is left to its owner. Absolute paths are cut to their last part: they say nothing elsewhere.

    Args:
        config: of the model. model_class: name of its class.
        results: what results.json of a run holds.
        image_size, text_length: that operations are counted with; by default the tower's and 40 tokens.
    """
    tag, use = _USES.get(model_class, ("feature-extraction", ""))
    results = results or {}
    recipe = _portable(results.get("recipe") or {})
    data = ModelCardData(
        model_name=model_class,
        library_name="trips",
        pipeline_tag=tag,
        tags=["trips", "vision-language", "patch-selection"],
        eval_results=list(_eval_results(results, recipe, tag or "image-text-to-text")) or None,
    )
    size = image_size or _pair(config.vision_config.image_size)
    blocks = [
        f"# {model_class}",
        _MARK,
        "A vision-language model with text-relevant image patch selection (TRIPS, EMNLP 2022), made with "
        "the library `trips` (`pip install trips-vlm`).",
        "## Use",
        _code("python", _loading(model_class, use)),
        "## Model",
        _table(("part", "what"), _parts(config)),
        _selection(config, size),
        "## Operations",
        _operations(config, model_class, size, text_length),
    ]
    if results:
        blocks += _training(results, recipe)
    blocks += ["## Licence", "Not stated. Add `license:` to the header of this file; the towers have theirs."]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n")


def write_model_card(
    folder: str | Path,
    config: TripsConfig,
    model_class: str,
    *,
    results: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    text_length: int = _TEXT_LENGTH,
) -> bool:
    """Write `model_card` into a model's folder, and say whether that was done.

    Without results only where no card is, so that nothing measured is lost; with results also over a generated one.
    """
    file = Path(folder) / CARD_FILE
    if file.exists() and not (results and _MARK in file.read_text(encoding="utf-8", errors="replace")):
        return False
    card = model_card(config, model_class, results=results, image_size=image_size, text_length=text_length)
    file.write_text(str(card), encoding="utf-8")
    return True


def take_card(source: str | Path, folder: str | Path) -> None:
    """Replace the generated card of a folder by that of the saved model it comes from, if that has one."""
    card, config = Path(source) / CARD_FILE, Path(source) / "config.json"
    if str(source) and card.is_file() and config.is_file():
        shutil.copyfile(card, Path(folder) / CARD_FILE)


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool | None, token: str | bool | None, **commit: Any
) -> str:
    """Upload a model's folder to the hub; a card that the repository has already is kept.

    Args:
        commit: ``commit_message``, ``commit_description``, ``revision``, ``create_pr``.
    Returns:
        Address of the commit.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    has_card = api.file_exists(repo_id, CARD_FILE, revision=commit.get("revision"), token=token)
    done = api.upload_folder(
        repo_id=repo_id, folder_path=folder, token=token, ignore_patterns=[CARD_FILE] if has_card else None, **commit
    )
    return str(done)


def _loading(model_class: str, use: str) -> str:
    if use:
        return f'import trips\n\nmodel = trips.load("path/or/name")\n{use}'
    return f'import trips\n\nmodel = trips.{model_class}.from_pretrained("path/or/name")'


def _parts(config: TripsConfig) -> list[tuple[str, str]]:
    vision, text = config.vision_config, config.text_config
    rows = [
        ("architecture", "one stack reads words and patches (TRIPS-S)" if config.architecture == "single" else "dual"),
        (
            "vision tower",
            f"{vision.model_type}, {vision.num_hidden_layers} layers, width {vision.hidden_size}, patches of "
            f"{vision.patch_size} pixels",
        ),
    ]
    if config.architecture != "single":
        rows.append(("text encoder", f"BERT, {text.num_hidden_layers} layers, width {text.hidden_size}"))
        rows.append(("fusion encoder", f"BERT, {config.fusion_encoder_config.num_hidden_layers} layers"))
    return rows


def _selection(config: TripsConfig, size: tuple[int, int]) -> str:
    selection, vision = config.selection, config.vision_config
    if not selection.active:
        return "No patches are removed."
    rates = ", ".join(f"{rate:g} at layer {layer}" for layer, rate in zip(selection.layers, selection.rates))
    patches = (size[0] // vision.patch_size) * (size[1] // vision.patch_size)
    try:
        last = token_counts(patches, vision.num_hidden_layers, selection)[-1][1]
    except TripsError:  # a configuration that can be saved, but not run
        return f"Selection by the guide `{selection.guide}`: keep rate {rates}."
    return (
        f"Selection by the guide `{selection.guide}`: keep rate {rates}; at {size[0]} x {size[1]} pixels "
        f"{patches + 1} image tokens become {last}."
    )


def _operations(config: TripsConfig, model_class: str, size: tuple[int, int], text_length: int) -> str:
    """Baseline and selection side by side."""
    count = count_reasoning_flops if model_class == "TripsForVisualReasoning" else count_flops
    patch = config.vision_config.patch_size
    grid = (size[0] // patch, size[1] // patch)
    try:
        before: FlopCount = count(config, grid, text_length, SelectionConfig(guide="none"))
        after: FlopCount = count(config, grid, text_length)
    except TripsError as error:
        return f"Not counted: {error}."
    unit = "statement with its images" if count is count_reasoning_flops else "image and text"
    rows = [
        (name, *(f"{value:.4g}" for value in (found.vision, found.text, found.fusion, found.total)))
        for name, found in (("without selection", before), ("as configured", after))
    ]
    return (
        f"Forward operations of one {unit} at {size[0]} x {size[1]} pixels and {text_length} tokens, in units of 1e9 "
        f"(one multiply-add is two), without heads and answer decoder.\n\n"
        + _table(("setting", "vision", "text", "fusion", "total"), rows)
        + f"\n\nRatio {before.total / after.total:.3f}."
    )


def _training(results: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    blocks = []
    data = recipe.get("data") or {}
    if named := [(key, _names(data[key])) for key in ("train", "test") if data.get(key)]:
        blocks += ["## Data", _table(("share", "files"), named)]
    if figures := [(name, f"{value:.4f}") for name, value, _ in _figures(results)]:
        more = [(name, str(results[name])) for name in ("metric", "num_questions", "num_images", "num_texts", "steps")
                if name in results]  # fmt: skip
        blocks += ["## Results", _table(("figure", "value"), [*figures, *more])]
    if environment := results.get("environment"):
        measured = ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)
        blocks.append(f"Measured with {measured}.")
    if recipe:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
        blocks += ["## Training", _code("sh", "trips train recipe.yaml"), "recipe.yaml:", _code("yaml", text)]
    return blocks


def _eval_results(results: Mapping[str, Any], recipe: Mapping[str, Any], task: str) -> Iterator[EvalResult]:
    test = _names((recipe.get("data") or {}).get("test") or "unnamed")
    for name, value, kind in _figures(results):
        yield EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=test,
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )


def _figures(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, float, str]]:
    """What was measured, however deep: name with the keys above it, value, kind of metric."""
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and key not in _NOT_MEASURED:
            yield from _figures(value, here)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if kind := next((_METRICS[part] for part in reversed(here) if part in _METRICS), None):
                yield " ".join(here), float(value), kind


def _portable(value: Any) -> Any:
    """Plain values for YAML, absolute paths cut to their last part."""
    if isinstance(value, Mapping):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    if isinstance(value, PurePath):
        value = str(value)
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
