"""Pre-training: which setting leaks what, and how many passes each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pretraining_reference import GUIDES, NEGATIVES, options_of
from tiny import VOCABULARY, pair_batch, tiny_pretraining_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from trips.tasks.pretraining import TripsForPreTraining


@pytest.fixture
def seen() -> Iterator[Callable[[TripsForPreTraining], dict[str, list[Tensor]]]]:
    """Outputs of the projections and the MLM head of models that `watch` is told of."""
    outputs: dict[str, list[Tensor]] = {}
    hooks = []

    def watch(model: TripsForPreTraining) -> dict[str, list[Tensor]]:
        for name in ("image_projection", "mlm_head"):
            for side, prefix in ((model, ""), (model.momentum, "momentum_")):
                found = outputs.setdefault(prefix + name, [])
                hooks.append(getattr(side, name).register_forward_hook(lambda m, a, out, f=found: f.append(out)))
        return outputs

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("itc", ["image", "none", "text"])
@torch.no_grad()
def test_the_contrastive_feature_knows_its_caption_only_in_the_literal_reading(itc, seen) -> None:
    model, batch = tiny_pretraining_model({"itc_guide": itc}), pair_batch()
    outputs = seen(model)
    other = {**batch, "input_ids": batch["input_ids"].roll(1, 0), "attention_mask": torch.ones_like(batch["input_ids"])}
    for told in (batch, other):
        model(**told, negatives=NEGATIVES)
    own = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    for name in ("image_projection", "momentum_image_projection"):
        # how well each image fits its own caption, if that caption guided it and if another one did
        guided, misguided = ((F.normalize(out) * own).sum(dim=1) for out in outputs[name])
        assert torch.equal(guided, misguided) == (itc != "text")
        if itc == "text":
            assert float((guided - misguided).abs().max()) > 1e-3
    if itc == "image":  # what an index is made of
        assert torch.equal(F.normalize(outputs["image_projection"][0]), model.encode_image(batch["pixel_values"]))


@pytest.mark.parametrize("mlm", ["masked", "full"])
@torch.no_grad()
def test_predictions_know_the_masked_word_only_with_the_full_caption(mlm, seen) -> None:
    model, batch = tiny_pretraining_model({"mlm_guide": mlm}), pair_batch()
    outputs = seen(model)
    words = batch["input_ids"].clone()
    words.view(-1)[batch["mlm_positions"]] = 4 + (batch["mlm_labels"] - 3) % (VOCABULARY - 4)
    assert bool((words != batch["input_ids"]).view(-1)[batch["mlm_positions"]].all())
    for ids in (batch["input_ids"], words):
        model(**{**batch, "input_ids": ids}, negatives=NEGATIVES)
    for name in ("mlm_head", "momentum_mlm_head"):
        assert torch.equal(*outputs[name]) == (mlm == "masked")


# --- what it costs


def count_rows(model: TripsForPreTraining, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of every pass through text encoder, vision prefix and suffix, and fusion; the teacher's as momentum_..."""
    rows: dict[str, list[int]] = {}

    def count(part: nn.Module, method: str, name: str) -> None:
        found, call = rows.setdefault(name, []), getattr(part, method)

        def counted(*args, **kwargs):
            first = args[0] if args else kwargs["input_ids"]
            found.append(len(getattr(first, "states", first)))
            return call(*args, **kwargs)

        monkeypatch.setattr(part, method, counted)

    for side, start in ((model, ""), (model.momentum, "momentum_")):
        count(side.trips.text, "forward", start + "text")
        count(side.trips.vision, "prefix", start + "prefix")
        count(side.trips.vision, "suffix", start + "suffix")
        count(side.trips.fusion, "forward", start + "fusion")
    return rows


@pytest.mark.parametrize("guides", GUIDES, ids="-".join)
@torch.no_grad()
def test_no_more_passes_than_a_setting_needs(guides, monkeypatch) -> None:
    itc, itm, mlm = guides
    model = tiny_pretraining_model(options_of(*guides))
    rows = count_rows(model, monkeypatch)
    model(**pair_batch())
    extra = (itc != "text") + 2 * (itm == "anew") + (mlm == "masked")
    assert sum(rows["suffix"]) == 3 * (1 + extra) and len(rows["suffix"]) == 1 + (extra > 0)
    assert sum(rows["momentum_suffix"]) == 3 * (1 + (itc != "text" or mlm == "masked"))
    assert (rows["prefix"], rows["fusion"], rows["text"]) == ([3], [12], [6])
    assert (rows["momentum_prefix"], rows["momentum_fusion"], rows["momentum_text"]) == ([3], [3], [6])


@pytest.mark.parametrize(
    "changes",
    [{"guide": "none"}, {"keep_rate": 1.0}, {"layers": ()}, {"guide": "image"}, {"distill": True}],
    ids=str,
)
@torch.no_grad()
def test_one_vision_pass_where_no_text_removes_anything(changes, monkeypatch) -> None:
    distill = changes.pop("distill", False)
    model = tiny_pretraining_model(**changes)
    rows = count_rows(model, monkeypatch)
    model(**pair_batch(), distill=distill)
    assert rows["prefix"] == rows["suffix"] == rows["momentum_prefix"] == rows["momentum_suffix"] == [3]
    assert sum(rows["fusion"]) == 12 and rows["momentum_fusion"] == [3]


@torch.no_grad()
def test_a_teacher_of_features_alone_predicts_no_words(monkeypatch) -> None:
    model = tiny_pretraining_model({"alpha": 0.0})
    rows = count_rows(model, monkeypatch)
    model(**pair_batch())
    assert (rows["momentum_suffix"], rows["momentum_text"], rows["momentum_fusion"]) == ([3], [3], [])


@pytest.mark.parametrize("options", [{}, {"queue_size": 0, "negatives": "global"}], ids=str)
def test_no_value_is_read_back_from_the_device(options) -> None:
    """Forward, backward and the start of a step run on tensors that have shapes and no values."""
    model, mode = tiny_pretraining_model(options).train(), FakeTensorMode()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(value) for name, value in tensors.items() if value is not None})
    batch = {key: mode.from_tensor(value) for key, value in pair_batch().items()}
    with mode:
        model.start_step(3)
        loss = model(**batch).loss
        loss.backward()
        with pytest.raises(DataDependentOutputException):  # this is how a read would show
            loss.item()
