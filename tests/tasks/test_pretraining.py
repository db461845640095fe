"""Pre-training: the three losses against one pair at a time, what learns, negatives, inference, what is refused."""

from __future__ import annotations

import pytest
import torch
from pretraining_reference import GUIDES, NEGATIVES, expected_losses, features, options_of
from tiny import pair_batch, texts, tiny_pretraining_model

from trips.errors import ConfigError, DataError, ShapeError
from trips.losses import check_negatives
from trips.tasks import contrast, joint


def assert_losses(found, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found.loss.detach(), sum(expected.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guides", GUIDES, ids="-".join)
@torch.no_grad()
def test_losses_equal_those_of_one_pair_at_a_time(guides) -> None:
    """With queue and teacher; one image stands twice in the batch, and once in the queue."""
    model = tiny_pretraining_model(options_of(*guides), queue_ids=(51, 7))
    batch = pair_batch()
    expected = expected_losses(model, batch, model.config.selection)
    assert_losses(model(**batch, negatives=NEGATIVES), expected)
    # What the guides change is no rounding: another setting gives other losses.
    other = tiny_pretraining_model(options_of("text", "reuse", "full"), queue_ids=(51, 7))
    told = other(**batch, negatives=NEGATIVES)
    for name, changed in zip(expected, (guides[0] != "text", guides[1] == "anew", guides[2] == "masked"), strict=True):
        assert (float((expected[name] - getattr(told, name)).abs()) > 1e-4) == changed, name


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        ({"queue_size": 0, "alpha": 0.0}, {}),
        ({"queue_size": 0}, {}),
        ({"alpha": 0.0}, {}),
        ({"itc_guide": "none"}, {"guide": "image"}),
        ({}, {"guide": "none"}),
        ({}, {"keep_rate": 1.0}),
        ({}, {"inattentive": "drop", "learning": "gate", "score": "keys", "heads": "per_head"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_losses_without_queue_teacher_or_text_guidance(options, selection) -> None:
    model, batch = tiny_pretraining_model(options, **selection), pair_batch()
    assert (model.momentum is None) == (options == {"queue_size": 0, "alpha": 0.0})
    assert_losses(model(**batch, negatives=NEGATIVES), expected_losses(model, batch, model.config.selection))


@torch.no_grad()
def test_without_queue_and_teacher_it_is_plain_contrast() -> None:
    """InfoNCE written out, for pairs of different images."""
    model = tiny_pretraining_model({"queue_size": 0, "alpha": 0.0})
    batch = pair_batch(2)
    image, text = features(model, batch, model.config.selection, "image")
    logits = image @ text.T / model.temperature
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(model(**batch).loss_itc, expected)
    assert not [name for name in model.state_dict() if name.startswith(("momentum.", "queue."))]


@torch.no_grad()
def test_two_captions_of_one_image_share_its_mass() -> None:
    model = tiny_pretraining_model({"alpha": 0.0, "queue_size": 0})
    batch = {key: value[1:] if len(value) == 3 else value for key, value in pair_batch().items()}
    batch |= {"mlm_positions": torch.tensor([1]), "mlm_labels": torch.tensor([4])}
    image, text = features(model, batch, model.config.selection, "image")
    logits = image @ text.T / model.temperature
    expected = -(logits.log_softmax(1).mean() + logits.T.log_softmax(1).mean()) / 2  # half of the mass each
    negatives = (torch.tensor([1, 0]), torch.tensor([1, 0]))
    torch.testing.assert_close(model(**batch, negatives=negatives).loss_itc, expected)
    with pytest.raises(DataError, match="no hard negative"):
        check_negatives(batch["image_ids"], batch["caption_ids"])


# --- what learns


def test_every_part_learns_and_the_teacher_does_not(monkeypatch) -> None:
    model = tiny_pretraining_model().train()
    guides, suffix = [], model.trips.vision.suffix

    def watched(prefix, text_cls=None, *args, **kwargs):
        if text_cls is not None:
            text_cls = text_cls.clone()  # what arrives here came through the selection alone
            text_cls.retain_grad()
            guides.append(text_cls)
        return suffix(prefix, text_cls, *args, **kwargs)

    monkeypatch.setattr(model.trips.vision, "suffix", watched)
    model(**pair_batch()).loss.backward()
    assert len(guides) == 1 and guides[0].shape == (12, 32)
    assert bool((guides[0].grad.abs().amax(dim=1) > 1e-7).all())  # every row of the four blocks
    assert all(not p.requires_grad and p.grad is None for p in model.momentum.parameters())
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("learning", ["gate", "distill"])
def test_distillation_teaches_the_guide_of_the_positive_pairs(learning) -> None:
    model, batch = tiny_pretraining_model(learning=learning, distill_temperature=0.5, distill_weight=3.0), pair_batch()
    selection = model.config.selection
    out = model(**batch, negatives=NEGATIVES, distill=True)
    plain = model.trips(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], observe=True)
    teacher = plain.image_attention.square() / plain.image_attention.square().sum(dim=1, keepdim=True)
    expected = 0.0
    for record in plain.selections:
        p, q = teacher, record.logits.softmax(dim=1)
        expected = expected + (p * (p / q).log()).sum(dim=1).mean() / len(plain.selections)
    torch.testing.assert_close(out.loss_distill, expected.detach())
    losses = expected_losses(model, batch, selection.replace(guide="none"))
    for name, value in losses.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.detach(), sum(losses.values()) + 3 * out.loss_distill, rtol=1e-4, atol=1e-5)
    assert model(**batch).loss_distill is None


# --- negatives


@pytest.mark.parametrize("negatives", ["local", "global"])
@torch.no_grad()
def test_negatives_are_of_another_image_and_caption_and_hard(negatives, monkeypatch) -> None:
    model, batch = tiny_pretraining_model({"negatives": negatives}), pair_batch(4)
    batch["caption_ids"][3] = batch["caption_ids"][0]
    drawn, told = [], []
    fuse, draw = joint.fuse_pairs, contrast.sample_hard_negatives
    monkeypatch.setattr(joint, "fuse_pairs", lambda *args: drawn.append(args[7]) or fuse(*args))
    monkeypatch.setattr(contrast, "sample_hard_negatives", lambda *args: told.append(args[0]) or draw(*args))
    for _ in range(20):
        model(**batch)
    allowed = [{1, 2}, {0, 3}, {0, 3}, {1, 2}]
    for side in zip(*drawn, strict=True):
        for row, columns in enumerate(torch.stack(side).T.tolist()):
            assert set(columns) == allowed[row]
    # drawn by the similarity of the model's features to the teacher's of this step
    own = features(model, batch, model.config.selection, "image")
    taught = features(model.momentum, batch, model.config.selection, "image")
    torch.testing.assert_close(told[0], own[1] @ taught[0].T / model.temperature)  # the image of every text
    torch.testing.assert_close(told[1], own[0] @ taught[1].T / model.temperature)  # the text of every image


@torch.no_grad()
def test_a_generator_decides_the_draws() -> None:
    model, batch = tiny_pretraining_model(), pair_batch(4)
    first, second = (model(**batch, generator=torch.Generator().manual_seed(3)).loss for _ in range(2))
    assert torch.equal(first, second)


# --- inference, precision, refusals


@torch.no_grad()
def test_inference_equals_one_pair_at_a_time() -> None:
    batch, (ids, mask) = pair_batch(), texts(4, seed=9)
    index = torch.tensor([2, 0, 0, 1])
    for itc in ("image", "none", "text"):
        model = tiny_pretraining_model({"itc_guide": itc})
        selection = model.config.selection
        prefix = model.trips.encode_prefix(batch["pixel_values"])
        image, text = features(model, batch, selection, "image" if itc == "text" else itc)
        torch.testing.assert_close(model.encode_image(batch["pixel_values"]), image)
        torch.testing.assert_close(model.encode_image(prefix=prefix), image)
        torch.testing.assert_close(model.encode_texts(batch["input_ids"], batch["attention_mask"]), text)
    scores = model.match(prefix, index, ids, mask)
    assert torch.equal(scores, model.match(prefix, index, None, mask, text_states=model.trips.encode_text(ids, mask)))
    for row, image in enumerate(index.tolist()):
        pixels = batch["pixel_values"][image : image + 1]
        fused = model.trips(ids[row : row + 1], mask[row : row + 1], pixels).last_hidden_state
        torch.testing.assert_close(scores[row], model.itm_head(fused[0, 0])[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="encode_image"):
        model.encode_image()


@pytest.mark.parametrize("guide", ["text", "random"])
def test_bfloat16_autocast_stays_near_float32(guide) -> None:
    model, batch = tiny_pretraining_model(guide=guide), pair_batch()
    with torch.no_grad():
        exact = model(**batch, negatives=NEGATIVES, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**batch, negatives=NEGATIVES, generator=torch.Generator().manual_seed(0))
    rough.loss.backward()
    for name in ("loss_itc", "loss_itm", "loss_mlm"):
        assert getattr(rough, name).dtype == torch.float32
        assert float(getattr(rough, name) - getattr(exact, name)) == pytest.approx(0, abs=0.1), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pixel_values", lambda t: t[:2]),
        ("attention_mask", lambda t: t[:, :5]),
        ("mlm_input_ids", lambda t: t[:, :5]),
        ("mlm_positions", lambda t: t[None]),
        ("mlm_labels", lambda t: t[:2]),
        ("image_ids", lambda t: t[:2]),
        ("caption_ids", lambda t: t[:, None]),
    ],
)
def test_rows_that_do_not_fit_are_named(name, change) -> None:
    model, batch = tiny_pretraining_model(), pair_batch()
    with pytest.raises(ShapeError, match=name):
        model(**{**batch, name: change(batch[name])})


@pytest.mark.parametrize("guide", ["random", "none"])
def test_there_must_be_a_guide_to_teach(guide) -> None:
    with pytest.raises(ConfigError, match="distill"):
        tiny_pretraining_model(guide=guide)(**pair_batch(), distill=True)
