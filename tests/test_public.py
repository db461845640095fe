"""The public face: what `import trips` gives, and that it costs nothing until it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import images, randomise, texts, tiny_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import trips
from trips import errors

SOURCE = Path(trips.__file__).resolve().parents[1]
PROMISED = {
    "ImageIndex",
    "TripsConfig",
    "SelectionConfig",
    "PretrainingConfig",
    "ReasoningConfig",
    "TripsModel",
    "TripsForImageTextRetrieval",
    "TripsForPreTraining",
    "TripsForQuestionAnswering",
    "TripsForVisualReasoning",
    "TripsPipeline",
    "TripsProcessor",
    "TripsSingleStreamModel",
    "benchmark",
    "build_model_from_towers",
    "calibrate",
    "import_checkpoint",
    "load",
    "restore",
    "accelerate",
    "explain_last",
    "export_model",
    "__version__",
}


def run_python(code: str) -> str:
    """Output of a fresh interpreter that finds this source."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, trips\n"
        "trips.__version__, trips.ConfigError, dir(trips)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'accelerate'} & set(sys.modules)))\n"
        "trips.SelectionConfig\n"
        "print('trips.model' in sys.modules)"
    )
    assert run_python(code).splitlines() == ["[]", "False"]


def test_all_is_what_is_promised_and_every_name_resolves() -> None:
    declared = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.TripsError)
    }
    assert set(trips.__all__) == PROMISED | declared and len(trips.__all__) == len(set(trips.__all__))
    assert list(trips.__all__) == sorted(trips.__all__) and set(trips.__all__) <= set(dir(trips))
    for name in trips.__all__:
        value = getattr(trips, name)
        if name != "__version__":
            assert value.__module__.startswith("trips.") and value.__name__ == name and value.__doc__
    assert trips.ConfigError is errors.ConfigError


def test_names_are_imported_once_and_star_gives_them_all() -> None:
    code = (
        "import trips\n"
        "first = trips.SelectionConfig\n"
        "assert 'SelectionConfig' in vars(trips) and trips.SelectionConfig is first\n"
        "from trips import *\n"
        "print(all(name in globals() for name in trips.__all__))"
    )
    assert run_python(code) == "True"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'trips' has no attribute 'TripsForEverything'"):
        trips.TripsForEverything  # noqa: B018
    with pytest.raises(ImportError):
        exec("from trips import TripsForEverything", {})


def test_version_is_that_of_the_project_or_says_that_there_is_none() -> None:
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert trips.__version__ in (project["version"], "0+unknown")


def tiny_processor() -> trips.TripsProcessor:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    vocabulary = {piece: i for i, piece in enumerate([*special.values(), "what", "is", "it", "?"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return trips.TripsProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), 32, patch_size=8)


def test_auto_classes_open_a_saved_folder(tmp_path: Path) -> None:
    model = randomise(trips.TripsModel(tiny_config()))
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is trips.TripsConfig
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is trips.TripsProcessor and processor.image_size == (32, 32)
    assert PROCESSOR_MAPPING[trips.TripsConfig] is trips.TripsProcessor  # not only by the name in the file
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is trips.TripsModel
    ids, mask = texts()
    with torch.no_grad():
        ours, theirs = (one(ids, mask, images()).last_hidden_state for one in (model, loaded))
    assert torch.equal(ours, theirs)
