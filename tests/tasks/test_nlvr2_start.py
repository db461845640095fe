"""What a model of several images starts from: pre-training, its own kind, public towers; and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reasoning_models import reasoning_batch, reasoning_config, tiny_reasoning_model
from tiny import (
    randomise,
    tiny_bert_config,
    tiny_config,
    tiny_pretraining_model,
    tiny_vision_config,
    tiny_vqa_model,
)
from torch import nn
from transformers import BertModel, CLIPVisionModel

from trips.config import ReasoningConfig
from trips.errors import CheckpointError
from trips.importers import build_model_from_towers
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.transfer import start_from

BOTH = pytest.mark.parametrize("fusion", ["merge", "stacked"])


def folder_of(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n", [1, 3])
@BOTH
@torch.no_grad()
def test_starting_from_pretraining_copies_every_block_to_every_path(tmp_path, fusion, n) -> None:
    source = tiny_pretraining_model(width=16, width_map="orthogonal")  # the images pass a map of their own
    model = tiny_reasoning_model({"fusion": fusion, "num_images": n}, width=16, width_map="orthogonal")
    before = {name: value.clone() for name, value in model.reasoning_head.state_dict().items()}
    start_from(model, folder_of(source, tmp_path))
    for part in ("text", "vision"):
        theirs, ours = (getattr(one.trips, part).state_dict() for one in (source, model))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert all(torch.equal(value, before[name]) for name, value in model.reasoning_head.state_dict().items())
    inputs = reasoning_batch(3, n)
    inputs["pixel_values"] = inputs["pixel_values"][:, :1].expand(-1, n, -1, -1, -1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ours = model.trips(ids, mask, inputs["pixel_values"]).last_hidden_state
    single = source.trips(ids, mask, inputs["pixel_values"][:, 0])
    if fusion == "merge" or n == 1:
        torch.testing.assert_close(ours, single.last_hidden_state, rtol=1e-4, atol=1e-5)
        return
    states, memory = single.text_states, source.trips.fusion.image_projection(single.image_states)
    open_ = (1 - mask.float())[:, None, None] * torch.finfo(torch.float32).min
    for layer in source.trips.fusion.layer:  # every block n times on the same image
        for _ in range(n):
            states = layer(states, open_.expand(-1, 1, ids.shape[1], -1), memory)
    torch.testing.assert_close(ours, states, rtol=1e-4, atol=1e-5)


@BOTH
def test_starting_from_its_own_kind(tmp_path, fusion) -> None:
    truth, assignment = ({"fusion": fusion, "objective": objective} for objective in ("truth", "assignment"))
    for source, target, same in ((truth, truth, True), (assignment, assignment, True), (assignment, truth, False)):
        theirs = tiny_reasoning_model(source)
        ours = randomise(TripsForVisualReasoning(reasoning_config(target)), seed=5)
        last = ours.reasoning_head[2].weight.clone()
        start_from(ours, folder_of(theirs, tmp_path / "model"))
        state, expected = ours.state_dict(), theirs.state_dict()
        for name, value in state.items():
            if same or not name.startswith("reasoning_head.2."):
                assert torch.equal(value, expected[name]), name
        assert torch.equal(ours.reasoning_head[2].weight, last) != same


def test_what_it_cannot_start_from_is_named(tmp_path) -> None:
    pair = folder_of(tiny_reasoning_model(), tmp_path / "pair")
    for reasoning in ({"num_images": 3}, {"fusion": "stacked"}):
        model = tiny_reasoning_model(reasoning)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"another architecture.*crossattention.*images"):
            start_from(model, pair)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="another architecture"):
        start_from(tiny_reasoning_model(), folder_of(tiny_pretraining_model(num_layers=3), tmp_path / "shallow"))
    with pytest.raises(CheckpointError, match="is not a pre-trained model"):
        start_from(tiny_reasoning_model(), folder_of(tiny_vqa_model(), tmp_path / "vqa"))
    for other in (tiny_vqa_model(), tiny_pretraining_model()):  # nor does it serve them
        with pytest.raises(CheckpointError, match="is not a pre-trained model"):
            start_from(other, pair)


@pytest.mark.parametrize("width", [32, 16])
@BOTH
def test_building_from_towers(tmp_path, fusion, width) -> None:
    vision, text = CLIPVisionModel(tiny_vision_config(width=width)), BertModel(tiny_bert_config(num_layers=4))
    for name, tower in (("vision", vision), ("text", text)):
        randomise(tower).save_pretrained(tmp_path / name)
    config = reasoning_config(width=width, width_map="orthogonal")
    model, report = build_model_from_towers(
        *(tmp_path / "vision", tmp_path / "text", TripsForVisualReasoning),
        num_text_layers=2, num_fusion_layers=2, selection=config.selection,
        reasoning=ReasoningConfig(num_images=3, fusion=fusion),
    )  # fmt: skip
    assert model.config.reasoning == ReasoningConfig(3, fusion)
    names = set(model.state_dict())
    assert not set(report.loaded) & set(report.initialised)
    assert sorted([*report.loaded, *report.initialised]) == sorted(names)
    new = {name for name in names if name.startswith(("reasoning_head.", "trips.fusion.image_projection."))}
    assert set(report.initialised) == new | {name for name in names if name == "trips.vision.guide_map"}
    public, state = text.state_dict(), model.trips.fusion.state_dict()
    for layer in (0, 1):
        source = f"encoder.layer.{layer + 2}.attention"
        for part in ("weight", "bias"):
            query, key = public[f"{source}.self.query.{part}"], public[f"{source}.self.key.{part}"]
            dense = public[f"{source}.output.dense.{part}"]
            for i in range(3):
                block = f"layer.{layer}" if fusion == "merge" else f"layer.{3 * layer + i}"
                cross, path = f"{block}.crossattention", f".{i}" if fusion == "merge" else ""
                keys = f"{cross}.self" if fusion == "merge" else f"keys_and_values.{layer}"
                assert torch.equal(state[f"{cross}.self.query{path}.{part}"], query)
                assert torch.equal(state[f"{cross}.output{path}.dense.{part}"], dense)
                assert torch.equal(state[f"{keys}.key.{part}"], key)
                assert torch.equal(state[f"{block}.attention.self.query.{part}"], query)
    assert model(**reasoning_batch(2, 3)).loss is not None


def test_starting_from_retrieval(tmp_path) -> None:
    source = randomise(TripsForImageTextRetrieval(tiny_config()), seed=7)
    model = tiny_reasoning_model()
    start_from(model, folder_of(source, tmp_path))
    query = source.trips.fusion.layer[1].crossattention.self.query.weight
    for path in model.trips.fusion.layer[1].crossattention.self.query:
        assert torch.equal(path.weight, query)
