"""Checkpoints that transformers saved load exactly, damaged ones are refused by name, every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BOS, EOS, FAMILIES, images, randomise, texts, tiny_bert_config, tiny_vision_config
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTForImageClassification,
    ViTModel,
)

from trips.config import SelectionConfig
from trips.errors import CheckpointError, ConfigError, UnsupportedModelError
from trips.importers import ImportReport, build_model_from_towers, load_text_tower, load_vision_tower
from trips.model import TripsModel
from trips.tasks.vqa import TripsForQuestionAnswering

LAYERS = 4
HALF = SelectionConfig(layers=(2, 3), keep_rate=0.5)


def clip_model() -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tiny_vision_config().to_dict()))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    randomise(model).save_pretrained(folder)
    return folder


@pytest.fixture
def vision_dir(tmp_path: Path) -> Path:
    return saved(ViTModel(tiny_vision_config("vit")), tmp_path / "vit")


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    return saved(BertModel(tiny_bert_config(num_layers=LAYERS)), tmp_path / "bert")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the weights of a folder."""
    path = folder / "model.safetensors"
    tensors = change({key: value.clone() for key, value in load_file(path).items()})
    save_file(tensors, path, metadata={"format": "pt"})


VISION_MODELS = {
    "clip-full": clip_model,
    "clip-vision": lambda: CLIPVisionModel(tiny_vision_config("clip")),
    "vit": lambda: ViTModel(tiny_vision_config("vit")),
    "vit-classifier": lambda: ViTForImageClassification(tiny_vision_config("vit")),
    "dinov2": lambda: Dinov2Model(tiny_vision_config("dinov2")),
}


@pytest.mark.parametrize("kind", VISION_MODELS)
@torch.no_grad()
def test_vision_checkpoints_load_exactly(tmp_path, kind) -> None:
    model = VISION_MODELS[kind]()
    saved(model, tmp_path)
    report = ImportReport()
    tower = load_vision_tower(tmp_path, report).eval()
    source = {"clip-full": "vision_model", "vit-classifier": "vit"}.get(kind)
    source = getattr(model, source) if source else model
    kwargs = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    theirs, ours = source(images(2, 24, 40), **kwargs), tower(images(2, 24, 40), **kwargs)
    assert torch.equal(theirs.last_hidden_state, ours.last_hidden_state)
    # what the tower holds and what was ignored are together what the file holds, each once
    stored = load_file(tmp_path / "model.safetensors")
    assert len(set(report.ignored)) == len(report.ignored)
    assert set(report.ignored) <= {f"vision: {key}" for key in stored}
    assert len(report.ignored) + len([k for k in tower.state_dict() if "position_ids" not in k]) == len(stored)
    assert all(parameter.dtype == torch.float32 for parameter in tower.parameters())


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
@torch.no_grad()
def test_text_checkpoints_load_exactly(tmp_path, kind) -> None:
    model = kind(tiny_bert_config())
    saved(model, tmp_path)
    tower = load_text_tower(tmp_path).eval()
    bert = model if kind is BertModel else model.bert
    ids, mask = texts(2)
    theirs, ours = bert(input_ids=ids, attention_mask=mask), tower(input_ids=ids, attention_mask=mask)
    assert torch.equal(theirs.last_hidden_state, ours.last_hidden_state)


def test_half_precision_files_become_float32(tmp_path) -> None:
    model = randomise(ViTModel(tiny_vision_config("vit"))).half()
    model.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path)
    for name, parameter in tower.state_dict().items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, model.state_dict()[name].float())


def test_missing_key_is_named(vision_dir, text_dir) -> None:
    for folder, load in ((vision_dir, load_vision_tower), (text_dir, load_text_tower)):
        name = sorted(key for key in load_file(folder / "model.safetensors") if "1" in key and "bias" in key)[0]
        edit(folder, lambda tensors, gone=name: {key: value for key, value in tensors.items() if key != gone})
        with pytest.raises(CheckpointError, match="missing") as caught:
            load(folder)
        assert str(folder) in str(caught.value)
        # transformers may name it by its place in the module; the last parts are the same
        assert name.split(".")[-1] in str(caught.value) and len(caught.value.found) == 1


def test_extra_key_is_named(vision_dir, text_dir) -> None:
    for folder, load in ((vision_dir, load_vision_tower), (text_dir, load_text_tower)):
        edit(folder, lambda tensors: {**tensors, "adapter.weight": torch.ones(2)})
        with pytest.raises(CheckpointError, match="unexpected.*adapter.weight"):
            load(folder)


def test_key_of_another_shape_is_refused(vision_dir) -> None:
    edit(vision_dir, lambda t: {**t, "layernorm.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"layernorm\.weight"):
        load_vision_tower(vision_dir)


def test_weights_that_match_nothing_are_refused(vision_dir) -> None:
    edit(vision_dir, lambda tensors: {f"other.{key}": value for key, value in tensors.items()})
    with pytest.raises(CheckpointError, match="missing keys.*more"):
        load_vision_tower(vision_dir)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_file_is_refused(vision_dir, size) -> None:
    path = vision_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_vision_tower(vision_dir)
    assert str(vision_dir) in str(caught.value)


def test_folders_without_a_model_are_refused(tmp_path, vision_dir, text_dir) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "none", str(tmp_path / "none")):
        for load in (load_vision_tower, load_text_tower):
            with pytest.raises(CheckpointError, match=str(place)):
                load(place)
    (vision_dir / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match="configuration"):
        load_vision_tower(vision_dir)
    (text_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_text_tower(text_dir)


def test_other_families_are_refused(tmp_path, vision_dir, text_dir) -> None:
    with pytest.raises(UnsupportedModelError, match="bert"):
        load_vision_tower(text_dir)
    with pytest.raises(UnsupportedModelError, match="vit"):
        load_text_tower(vision_dir)
    roberta = RobertaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    RobertaModel(roberta).save_pretrained(tmp_path / "roberta")
    with pytest.raises(UnsupportedModelError, match="roberta"):
        load_text_tower(tmp_path / "roberta")


def same_layer(ours: torch.nn.Module, public: torch.nn.Module) -> bool:
    """Whether all public weights of a layer are in ours."""
    state = ours.state_dict()
    return all(torch.equal(state[key], value) for key, value in public.state_dict().items())


@pytest.mark.parametrize(("first", "last", "decoder"), [(2, 2, None), (3, 3, 2), (4, 4, 4), (1, 2, 3)])
def test_layers_are_split_as_promised(vision_dir, text_dir, first, last, decoder) -> None:
    """First n to the text encoder, last n to the fusion encoder; copies where they overlap; the decoder as fusion."""
    model, _ = build_model_from_towers(
        vision_dir,
        text_dir,
        TripsForQuestionAnswering,
        num_text_layers=first,
        num_fusion_layers=last,
        num_decoder_layers=decoder,
        selection=HALF,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    public, trips = BertModel.from_pretrained(text_dir).encoder.layer, model.trips
    decoder = last if decoder is None else decoder
    for layers, start in (
        (trips.text.encoder.layer, 0),
        (trips.fusion.layer, LAYERS - last),
        (model.decoder.bert.encoder.layer, LAYERS - decoder),
    ):
        assert [same_layer(ours, public[start + i]) for i, ours in enumerate(layers)] == [True] * len(layers)
    assert (len(trips.text.encoder.layer), len(trips.fusion.layer)) == (first, last)
    assert len(model.decoder.bert.encoder.layer) == decoder
    embeddings = load_file(text_dir / "model.safetensors")["embeddings.word_embeddings.weight"]
    for weight in (
        trips.get_input_embeddings().weight,
        model.decoder.get_input_embeddings().weight,
        model.decoder.get_output_embeddings().weight,
    ):
        assert torch.equal(weight, embeddings)
    if first + last > LAYERS:  # a copy: training one leaves the other alone
        assert trips.text.encoder.layer[-1].output.dense.weight is not trips.fusion.layer[0].output.dense.weight


@pytest.mark.parametrize("task", [TripsModel, TripsForQuestionAnswering])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_report_accounts_for_every_tensor_once(tmp_path, text_dir, family, task) -> None:
    """What the report calls loaded is equal to a tensor of the files, and nothing else is."""
    vision_dir = saved(VISION_MODELS["clip-full" if family == "clip" else family](), tmp_path / "vision")
    model, report = build_model_from_towers(
        vision_dir, text_dir, task, num_text_layers=2, num_fusion_layers=2, selection=HALF
    )
    state = model.state_dict()
    assert sorted(report.loaded + report.initialised) == sorted(state)
    files = [*load_file(vision_dir / "model.safetensors").values(), *load_file(text_dir / "model.safetensors").values()]
    for name in report.loaded:
        if "position_ids" not in name and "token_type_ids" not in name:
            assert any(torch.equal(state[name], tensor) for tensor in files), name
    for name in report.initialised:
        assert not any(torch.equal(state[name], tensor) for tensor in files), name
    stored = {f"vision: {key}" for key in load_file(vision_dir / "model.safetensors")}
    stored |= {f"text: {key}" for key in load_file(text_dir / "model.safetensors")}
    assert set(report.ignored) <= stored and len(set(report.ignored)) == len(report.ignored)
    assert str(len(report.loaded)) in str(report)
    trips = model if task is TripsModel else model.trips
    assert bool(trips(*texts(2), images()).last_hidden_state.isfinite().all())


def test_unlike_widths_need_the_map(tmp_path, vision_dir) -> None:
    text_dir = saved(BertModel(tiny_bert_config(48, num_layers=2)), tmp_path / "wide")
    counts = {"num_text_layers": 1, "num_fusion_layers": 1}
    with pytest.raises(ConfigError, match="text_config.hidden_size"):
        build_model_from_towers(vision_dir, text_dir, selection=HALF, **counts)
    model, report = build_model_from_towers(
        vision_dir, text_dir, selection=HALF.replace(width_map="orthogonal"), **counts
    )
    assert "vision.guide_map" in report.initialised
    assert len([name for name in report.initialised if "image_projection" in name]) == 4
    assert sorted(report.loaded + report.initialised) == sorted(model.state_dict())


@pytest.mark.parametrize(
    "counts",
    [{"num_text_layers": 5}, {"num_text_layers": 0}, {"num_fusion_layers": 9}, {"num_decoder_layers": 0}],
    ids=str,
)
def test_layer_counts_must_exist(vision_dir, text_dir, counts) -> None:
    both = {"num_text_layers": 2, "num_fusion_layers": 2}
    with pytest.raises(ConfigError, match=next(iter(counts))):
        build_model_from_towers(vision_dir, text_dir, selection=HALF, **{**both, **counts})


def test_dropout_and_start_tokens_are_set_where_asked(vision_dir, text_dir) -> None:
    counts = {"num_text_layers": 2, "num_fusion_layers": 2}
    model, _ = build_model_from_towers(
        vision_dir, text_dir, selection=HALF, dropout=0.25, bos_token_id=BOS, eos_token_id=EOS, **counts
    )
    for name in ("text_config", "fusion_encoder_config", "decoder_config"):
        config = getattr(model.config, name)
        assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25
    assert (model.config.decoder_config.bos_token_id, model.config.decoder_config.eos_token_id) == (BOS, EOS)
    assert model.config.vision_config.hidden_size == 32


def test_real_towers(dinov2_dir, minilm_dir) -> None:
    """The public checkpoints of the tests: 12 layers at width 384 and 6 at 384."""
    selection = SelectionConfig(layers=(5, 10), keep_rate=0.7)
    model, report = build_model_from_towers(
        dinov2_dir, minilm_dir, num_text_layers=3, num_fusion_layers=3, selection=selection
    )
    assert sorted(report.loaded + report.initialised) == sorted(model.state_dict())
    assert not report.initialised
    for layer in model.fusion.layer:  # cross-attention starts as the layer's own self-attention
        for name, value in layer.attention.state_dict().items():
            assert torch.equal(layer.crossattention.state_dict()[name], value), name
    public = load_file(dinov2_dir / "model.safetensors")
    ours = model.vision.tower.state_dict()
    assert torch.equal(ours["layernorm.weight"], public["layernorm.weight"].float())
