"""Retrieval: its losses pair by pair, what it shares with pre-training, and what a step costs."""

from __future__ import annotations

import pytest
import torch
from bench.test_flops import counted
from pretraining_reference import GUIDES, NEGATIVES, expected_losses, options_of
from safetensors.torch import load_file
from tasks.test_pretraining_passes import count_rows
from tiny import pair_batch, tiny_pretraining_model
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from trips import TripsForImageTextRetrieval, TripsForPreTraining
from trips.bench.flops import count_pretraining_flops
from trips.errors import ConfigError, ShapeError

SETTINGS = [{}, {"alpha": 0.0}, {"queue_size": 0}, {"alpha": 0.0, "queue_size": 0}, {"negatives": "global"}]


def retrieval_batch(count: int = 3) -> dict[str, Tensor]:
    return {name: value for name, value in pair_batch(count).items() if not name.startswith("mlm_")}


def both(options: dict | None = None, **kwargs) -> tuple[TripsForPreTraining, TripsForImageTextRetrieval]:
    """A pre-training model and a retrieval model of its weights, teacher and queue."""
    source = tiny_pretraining_model(options, **kwargs)
    model = TripsForImageTextRetrieval(source.config).eval()
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not missing and all(name.removeprefix("momentum.").startswith("mlm_head.") for name in unexpected)
    return source, model


def assert_same_losses(found, expected: dict[str, Tensor]) -> None:
    for name in ("loss_itc", "loss_itm"):
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(found.loss.detach(), expected["loss_itc"] + expected["loss_itm"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guides", GUIDES[::2], ids="-".join)
@torch.no_grad()
def test_losses_equal_pair_by_pair(guides) -> None:
    source, model = both(options_of(*guides), queue_ids=(51, 7, 50))  # captions of the batch's images wait there too
    found = model(**retrieval_batch(), negatives=NEGATIVES)
    assert_same_losses(found, expected_losses(source, pair_batch(), source.config.selection))
    assert set(found) == {"loss", "loss_itc", "loss_itm"}


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"distill": True}, {"selection": "whole"}], ids=str)
@torch.no_grad()
def test_losses_are_those_of_pretraining_without_masked_words(options, changes) -> None:
    changes = dict(changes)
    source, model = both(options, learning="distill")
    if changes.pop("selection", None):
        changes["selection"] = source.config.selection.replace(keep_rate=1.0)
    batch = pair_batch(4)
    runs = [
        side.train()(**given, **changes, generator=torch.Generator().manual_seed(1))
        for side, given in ((source, batch), (model, retrieval_batch(4)))
    ]
    for name in ("loss_itc", "loss_itm", "loss_distill"):
        theirs, ours = (getattr(run, name) for run in runs)
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(runs[1].loss, runs[0].loss - runs[0].loss_mlm, rtol=1e-5, atol=1e-5)
    if model.queue is not None:
        assert torch.equal(model.queue.image_ids, source.queue.image_ids)
        torch.testing.assert_close(model.queue.text_features, source.queue.text_features)


def test_every_part_learns_as_in_pretraining() -> None:
    source, model = both()
    for side, batch in ((source, pair_batch()), (model, retrieval_batch())):
        run = side.train()(**batch, negatives=NEGATIVES)
        run.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == [] and all(p.grad is None for p in model.momentum.parameters())
    # masked words reach neither projection, nor the head of matching, nor the temperature
    for name in ("image_projection.weight", "text_projection.weight", "itm_head.weight", "temperature"):
        ours, theirs = (dict(side.named_parameters())[name].grad for side in (model, source))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("guides", GUIDES, ids="-".join)
@torch.no_grad()
def test_a_step_costs_no_masked_pass(guides, monkeypatch) -> None:
    _, model = both(options_of(*guides))
    rows = count_rows(model, monkeypatch)
    model(**retrieval_batch())
    extra = (guides[0] != "text") + 2 * (guides[1] == "anew")
    assert sum(rows["suffix"]) == 3 * (1 + extra) and (rows["prefix"], rows["text"]) == ([3], [3])
    assert sum(rows["fusion"]) == 9 and rows["momentum_fusion"] == []
    assert rows["momentum_prefix"] == rows["momentum_suffix"] == rows["momentum_text"] == [3]


@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
@pytest.mark.parametrize("distill", [False, True])
@torch.no_grad()
def test_operations_equal_the_counter(options, distill) -> None:
    _, model = both(options)
    count = count_pretraining_flops(model.config, (4, 4), 6, batch_size=3, distill=distill, mlm=False)
    assert 3 * count.forward * 1e9 == pytest.approx(counted(model, **retrieval_batch(), distill=distill), rel=1e-9)


# --- folders


def test_starts_from_the_folder_of_a_pretraining_model(tmp_path) -> None:
    source, _ = both()
    source.save_pretrained(tmp_path / "pretrained")
    model, info = TripsForImageTextRetrieval.from_pretrained(tmp_path / "pretrained", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not hasattr(model, "mlm_head") and not hasattr(model.momentum, "mlm_head")
    for name, value in model.state_dict().items():
        if name.startswith("momentum."):  # anew, from the loaded weights
            name = name.removeprefix("momentum.")
        if not name.startswith("queue."):
            assert torch.equal(value, source.state_dict()[name]), name
    assert not bool((model.queue.image_ids >= 0).any())
    model.save_pretrained(tmp_path / "retrieval")
    names = load_file(tmp_path / "retrieval" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("mlm_head.", "momentum.", "queue."))]
    again = TripsForImageTextRetrieval.from_pretrained(tmp_path / "retrieval").eval()
    batch = retrieval_batch()
    with torch.no_grad():
        for found, expected in zip(inference(again, batch), inference(source, batch), strict=True):
            assert torch.equal(found, expected)
    _, info = TripsForPreTraining.from_pretrained(tmp_path / "retrieval", output_loading_info=True)
    assert info["missing_keys"] and all(name.startswith("mlm_head.") for name in info["missing_keys"])


def inference(model: TripsForImageTextRetrieval, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prefix = model.trips.encode_prefix(batch["pixel_values"])
    matched = model.match(prefix, torch.tensor([2, 0, 1]), ids, mask)
    return model.encode_image(batch["pixel_values"]), model.encode_texts(ids, mask), matched


# --- refusals, devices


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pixel_values", lambda t: t[:2]),
        ("attention_mask", lambda t: t[:, :5]),
        ("image_ids", lambda t: t[:2]),
        ("caption_ids", lambda t: t[:, None]),
    ],
)
def test_rows_that_do_not_fit_are_named(name, change) -> None:
    _, model = both()
    batch = retrieval_batch()
    with pytest.raises(ShapeError, match=name):
        model(**{**batch, name: change(batch[name])})
    with pytest.raises(ConfigError, match="distill"):
        model(**batch, selection=model.config.selection.replace(guide="random"), distill=True)


def test_no_value_is_read_back_from_the_device() -> None:
    model, mode = both()[1].train(), FakeTensorMode()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(value) for name, value in tensors.items() if value is not None})
    batch = {key: mode.from_tensor(value) for key, value in retrieval_batch().items()}
    with mode:
        model.start_step(3)
        loss = model(**batch).loss
        loss.backward()
        with pytest.raises(DataDependentOutputException):  # this is how a read would show
            loss.item()
