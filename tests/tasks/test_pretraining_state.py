"""Pre-training: moving average, queue, ramp and bounds; saving, resuming, loading; building from towers."""

from __future__ import annotations

import copy

import pytest
import torch
from pretraining_reference import NEGATIVES, features
from safetensors.torch import load_file, save_file
from tiny import BOS, images, pair_batch, randomise, texts, tiny_bert_config, tiny_pretraining_model, tiny_vision_config
from transformers import BertForMaskedLM, BertModel, ViTModel

from trips import TripsForPreTraining, TripsForQuestionAnswering, TripsModel
from trips.config import PretrainingConfig, SelectionConfig
from trips.errors import CheckpointError
from trips.importers import build_model_from_towers

SMALL = {"projection_dim": 8, "queue_size": 7}


def assert_copies_equal(model: TripsForPreTraining) -> None:
    for name, copied in model.momentum.named_parameters():
        assert torch.equal(copied, model.get_parameter(name)) and not copied.requires_grad, name
    for name, copied in model.momentum.named_buffers():
        assert torch.equal(copied, model.get_buffer(name)), name


# --- once per step


def test_a_step_starts_with_the_moving_average() -> None:
    model = tiny_pretraining_model({"momentum": 0.9})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.start_step(5)
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name.startswith("momentum."):
            expected = 0.9 * before[name] + 0.1 * before[name.removeprefix("momentum.")]
        torch.testing.assert_close(parameter, expected, msg=name)
    copied = {name for name, _ in model.momentum.named_parameters()}
    own = {name for name, _ in model.named_parameters() if not name.startswith("momentum.")}
    heads = {"itm_head.weight", "itm_head.bias", "temperature"}
    assert own - copied == heads and copied <= own


def test_the_first_step_takes_the_weights_as_they_are() -> None:
    model = tiny_pretraining_model()
    model.start_step(0)
    assert_copies_equal(model)


@pytest.mark.parametrize(
    ("step", "ramp", "expected"), [(0, 0, 0.4), (9, 0, 0.4), (0, 8, 0.0), (2, 8, 0.1), (8, 8, 0.4), (99, 8, 0.4)]
)
@torch.no_grad()
def test_alpha_ramps_up(step, ramp, expected) -> None:
    model, batch = tiny_pretraining_model({"alpha_ramp_steps": ramp}), pair_batch()
    assert float(model.alpha) == pytest.approx(0.4 if ramp == 0 else 0.0)
    model.start_step(step)
    assert float(model.alpha) == pytest.approx(expected)
    teacher_of_now = copy.deepcopy(model.momentum)
    plain = tiny_pretraining_model({"alpha": expected})
    plain.momentum = teacher_of_now
    for name in ("loss_itc", "loss_mlm"):
        found, told = (getattr(one(**batch, negatives=NEGATIVES), name) for one in (model, plain))
        torch.testing.assert_close(found, told)


@pytest.mark.parametrize(("value", "expected"), [(-3.0, 0.001), (0.2, 0.2), (7.0, 0.5)])
def test_the_temperature_is_learnt_and_kept_in_bounds(value, expected) -> None:
    model = tiny_pretraining_model()
    parameter = model.temperature
    parameter.data.fill_(value)
    model.start_step(1)
    assert model.temperature is parameter and float(parameter.detach()) == pytest.approx(expected)
    model.train()(**pair_batch()).loss.backward()
    assert float(parameter.grad.abs()) > 0


# --- queue


def test_the_queue_takes_the_teachers_features_once_per_pass_in_training() -> None:
    model, batch = tiny_pretraining_model(), pair_batch()
    selection = model.config.selection
    before = copy.deepcopy(model.queue)
    model(**batch)
    assert int(model.queue.pointer) == 0 and torch.equal(model.queue.image_features, before.image_features)
    model.train()(**batch).loss.backward()
    image, text = features(model.momentum, batch, selection, "image")
    torch.testing.assert_close(model.queue.image_features, torch.cat([image, before.image_features[3:]]))
    torch.testing.assert_close(model.queue.text_features, torch.cat([text, before.text_features[3:]]))
    assert model.queue.image_ids.tolist() == [50, 51, 51, -1, -1, -1, -1] and int(model.queue.pointer) == 3


@torch.no_grad()
def test_an_image_seen_again_is_positive_with_its_queued_features() -> None:
    """What the first pass queued takes part of the mass in the second."""
    model, batch = tiny_pretraining_model({"alpha": 0.0}), pair_batch(2)
    model.train()(**batch)
    image, text = features(model, batch, model.config.selection, "image")
    taught = features(model.momentum, batch, model.config.selection, "image")
    losses = []
    for own, pool, queued in (
        (image, taught[1], model.queue.text_features),
        (text, taught[0], model.queue.image_features),
    ):
        logits = (own @ torch.cat([pool, queued]).T / model.temperature).log_softmax(1)
        losses += [-(logits[row, row] + logits[row, 2 + row]) / 2 for row in range(2)]
    torch.testing.assert_close(model(**batch).loss_itc, torch.stack(losses).mean())


# --- saving, resuming, loading


def run(model: TripsForPreTraining, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        model.start_step(step)
        batch, generator = pair_batch(4, seed=step + 10), torch.Generator().manual_seed(step)
        loss = model(**batch, generator=generator).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path) -> None:
    options = {"alpha_ramp_steps": 5, "momentum": 0.5}
    model = tiny_pretraining_model(options).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    run(model, optimizer, range(2))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    expected = run(model, optimizer, range(2, 5))
    other = randomise(tiny_pretraining_model(options), seed=9).train()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    optimizer = torch.optim.SGD((p for p in other.parameters() if p.requires_grad), lr=0.05)
    assert all(map(torch.equal, expected, run(other, optimizer, range(2, 5))))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_saving_leaves_the_training_state_out_and_loading_starts_it_anew(tmp_path) -> None:
    model = tiny_pretraining_model({"alpha_ramp_steps": 4}, width=48, text_width=32, width_map="orthogonal").train()
    model(**pair_batch())
    model.start_step(3)
    model.save_pretrained(tmp_path)
    loaded, told = TripsForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()) and loaded.config.pretraining == model.config.pretraining
    for name, value in loaded.state_dict().items():
        if not name.startswith(("momentum.", "queue.")):
            assert torch.equal(value, model.state_dict()[name]), name
    assert_copies_equal(loaded)
    assert float(loaded.alpha) == 0.0 and not loaded.training
    assert loaded.queue.image_ids.tolist() == [-1] * 7 and int(loaded.queue.pointer) == 0
    torch.testing.assert_close(loaded.queue.image_features.norm(dim=1), torch.ones(7))
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images()), model.eval().encode_image(images()))


@pytest.mark.parametrize("kind", [TripsModel, TripsForQuestionAnswering])
@torch.no_grad()
def test_other_models_take_the_trunk_of_a_saved_folder(tmp_path, kind) -> None:
    model = tiny_pretraining_model()
    model.save_pretrained(tmp_path)
    loaded, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith("decoder.") for name in told["missing_keys"])
    ids, mask = texts()
    trunk = loaded if kind is TripsModel else loaded.trips
    assert torch.equal(trunk(ids, mask, images()).last_hidden_state, model.trips(ids, mask, images()).last_hidden_state)


@torch.no_grad()
def test_a_trunk_is_enough_to_start_from(tmp_path) -> None:
    trunk = tiny_pretraining_model().trips
    trunk.config.pretraining = PretrainingConfig(**SMALL, temperature=0.2)
    trunk.save_pretrained(tmp_path)
    model = TripsForPreTraining.from_pretrained(tmp_path)
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, model.trips.state_dict()[name]), name
    assert_copies_equal(model)
    # New heads start as they would in a new model.
    assert float(model.temperature) == pytest.approx(0.2) and not model.mlm_head.bias.any()
    assert 0.005 < float(model.itm_head.weight.std()) < 0.04 and not model.itm_head.bias.any()
    assert bool(model(**pair_batch()).loss.isfinite())


# --- from towers


def towers(folder, bert: type) -> tuple:
    randomise(ViTModel(tiny_vision_config("vit"))).save_pretrained(folder / "vit")
    text = randomise(bert(tiny_bert_config(num_layers=4)))
    text.save_pretrained(folder / "bert")
    return folder / "vit", folder / "bert", text


def build(vision, text):
    return build_model_from_towers(
        vision,
        text,
        TripsForPreTraining,
        num_text_layers=2,
        num_fusion_layers=2,
        selection=SelectionConfig(layers=(2, 3), keep_rate=0.5),
        pretraining=PretrainingConfig(**SMALL),
    )


@torch.no_grad()
def test_built_from_towers_with_the_head_of_a_bert(tmp_path) -> None:
    vision, text, bert = towers(tmp_path, BertForMaskedLM)
    model, report = build(vision, text)
    states = torch.randn(3, 32)
    found = model.mlm_head(states, model.get_input_embeddings().weight)
    torch.testing.assert_close(found, bert.cls(states))
    assert_copies_equal(model)
    assert sorted([*report.loaded, *report.initialised]) == sorted(model.state_dict())
    heads = {"mlm_head.bias", "momentum.mlm_head.bias", "mlm_head.transform.dense.weight"}
    assert heads <= set(report.loaded) and not [name for name in report.ignored if "cls.predictions.t" in name]
    new = {"temperature", "itm_head.weight", "image_projection.weight", "text_projection.bias", "queue.pointer"}
    assert new <= set(report.initialised)
    ids, mask = texts()
    assert ids[0, 0] == BOS and torch.equal(model.trips.text.embeddings(ids), bert.bert.embeddings(ids))


def test_built_from_towers_without_such_a_head(tmp_path) -> None:
    vision, text, _ = towers(tmp_path, BertModel)
    model, report = build(vision, text)
    assert {"mlm_head.bias", "mlm_head.transform.dense.weight"} <= set(report.initialised)
    assert sorted([*report.loaded, *report.initialised]) == sorted(model.state_dict())
    model.train()(**pair_batch()).loss.backward()


def test_half_a_head_is_refused(tmp_path) -> None:
    vision, text, _ = towers(tmp_path, BertForMaskedLM)
    tensors = load_file(text / "model.safetensors")
    tensors.pop("cls.predictions.transform.LayerNorm.weight")
    save_file(tensors, text / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.LayerNorm\.weight"):
        build(vision, text)
