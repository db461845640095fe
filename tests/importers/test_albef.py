"""ALBEF's checkpoints compute here what their tensors say, and every key of them is accounted for."""

from __future__ import annotations

from pathlib import Path

import albef_checkpoints as albef
import pytest
import torch
from safetensors.torch import save_file
from tiny import images, texts
from torch import Tensor

from trips.config import PretrainingConfig, SelectionConfig
from trips.errors import CheckpointError, UnsupportedModelError
from trips.importers import load_albef
from trips.tasks.nlvr2 import TripsForVisualReasoning
from trips.tasks.pretraining import TripsForPreTraining
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.tasks.vqa import TripsForQuestionAnswering

PIXELS = images(2)
IDS, MASK = texts(2)
WHOLE = SelectionConfig(guide="none", layers=())
HALF = SelectionConfig(layers=(2, 3), keep_rate=0.5)
CLASSES = {"pretraining": TripsForPreTraining, "retrieval": TripsForImageTextRetrieval,
           "vqa": TripsForQuestionAnswering, "nlvr": TripsForVisualReasoning}  # fmt: skip


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    path = path / "albef.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    return path


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) < 1e-5


def real(fused: Tensor) -> Tensor:
    """Padding has states too, but nobody reads them."""
    return fused * MASK[..., None]


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_every_key_is_accounted_for(tmp_path, kind) -> None:
    """The file as the training script writes it: loaded where there is a place, named where there is none."""
    tensors = albef.checkpoint(kind)
    torch.save(albef.wrapped(tensors), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="pickle.*trips import"):
        load_albef(tmp_path / "checkpoint.pth", selection=HALF)
    model, report = load_albef(tmp_path / "checkpoint.pth", selection=HALF, pickled=True)
    assert type(model) is CLASSES[kind] and model.config.selection == HALF
    assert report.initialised == [] and report.resized == []
    assert sorted(report.loaded) == sorted(model.state_dict())
    ignored = {name.removeprefix("file: ") for name in report.ignored}
    assert len(ignored) == len(report.ignored) and {"optimizer", "lr_scheduler", "config", "epoch"} <= ignored
    left = ignored - {"optimizer", "lr_scheduler", "config", "epoch"}
    tied = {name for name in tensors if ".cls.predictions.decoder." in name or name.endswith("position_ids")}
    copies = {name for name in tensors if name.split(".")[0].endswith("_m")} if kind in ("vqa", "nlvr") else set()
    assert left == tied | copies
    # whatever is not ignored is in the model, value by value (fused projections piece by piece)
    held = {value.sum().item() for value in model.state_dict().values()}
    for name in sorted(set(tensors) - left):
        if "visual_encoder" not in name and name not in ("queue_ptr", "idx_queue"):
            value = tensors[name].T.contiguous() if name.endswith("_queue") else tensors[name]
            assert value.sum().item() in held, name


@torch.no_grad()
def test_pretraining_states_and_logits(tmp_path) -> None:
    tensors = albef.checkpoint("pretraining")
    model, _ = load_albef(written(tensors, tmp_path), selection=WHOLE)
    image = albef.image_states(tensors, PIXELS)
    text = albef.text_states(tensors, IDS, MASK)
    fused = albef.fused_states(tensors, text, MASK, [image])
    output = model.trips(IDS, MASK, PIXELS)
    assert close(output.image_states, image)
    assert close(real(output.text_states), real(text)) and close(real(output.last_hidden_state), real(fused))
    assert close(model.itm_head(output.last_hidden_state[:, 0]), albef.itm_logits(tensors, fused))
    logits = model.mlm_head(output.last_hidden_state, model.get_input_embeddings().weight)
    assert close(real(logits), real(albef.mlm_logits(tensors, fused)))
    feature = torch.nn.functional.normalize(albef.linear(tensors, "vision_proj", image[:, 0]), dim=-1)
    assert close(model.encode_image(PIXELS), feature) and model.temperature.tolist() == pytest.approx([0.06])
    layer = model.trips.vision(PIXELS, output_hidden_states=True).hidden_states
    states = albef.timm_vit(albef.part(tensors, "visual_encoder."), PIXELS)
    assert len(layer) == albef.VISION_LAYERS + 1 and all(close(a, b) for a, b in zip(layer, states))


@pytest.mark.parametrize("kind", ["pretraining", "retrieval"])
@torch.no_grad()
def test_momentum_copies_and_queue(tmp_path, kind) -> None:
    tensors = albef.checkpoint(kind)
    model, _ = load_albef(written(tensors, tmp_path), selection=WHOLE)
    teacher = model.momentum.trips(IDS, MASK, PIXELS)
    image = albef.image_states(tensors, PIXELS, "visual_encoder_m.")
    text = albef.text_states(tensors, IDS, MASK, "text_encoder_m.")
    fused = albef.fused_states(tensors, text, MASK, [image], "text_encoder_m.")
    assert close(teacher.image_states, image) and close(real(teacher.last_hidden_state), real(fused))
    if kind == "pretraining":
        words = model.momentum.trips.get_input_embeddings().weight
        logits = model.momentum.mlm_head(teacher.last_hidden_state, words)
        assert close(real(logits), real(albef.mlm_logits(tensors, fused, "text_encoder_m.")))
    assert torch.equal(model.queue.image_features, tensors["image_queue"].T)
    assert torch.equal(model.queue.text_features, tensors["text_queue"].T) and int(model.queue.pointer) == 4
    expected = [0, 1, 2, 3, *[-1] * 8] if kind == "retrieval" else [-1] * 12
    assert model.queue.image_ids.tolist() == expected


def test_training_state_without_a_place(tmp_path) -> None:
    """Another length of queue, no teacher, no copies in the file: named, and the teacher starts as the model."""
    tensors = albef.checkpoint("retrieval")
    path = written(tensors, tmp_path)
    model, report = load_albef(path, selection=HALF, pretraining=PretrainingConfig(queue_size=5))
    assert {"file: image_queue", "file: text_queue", "file: idx_queue", "file: queue_ptr"} <= set(report.ignored)
    assert set(report.initialised) == {name for name in model.state_dict() if name.startswith("queue.")}
    assert model.config.pretraining.projection_dim == albef.PROJECTION
    bare, report = load_albef(path, selection=HALF, pretraining=PretrainingConfig(queue_size=0, alpha=0.0))
    assert bare.momentum is None and "file: text_encoder_m.encoder.layer.0.output.dense.bias" in report.ignored
    alone = {name: value for name, value in tensors.items() if not name.split(".")[0].endswith("_m")}
    model, report = load_albef(written(alone, tmp_path), selection=HALF)
    for name, value in model.momentum.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@torch.no_grad()
def test_vqa_answers(tmp_path) -> None:
    tensors = albef.checkpoint("vqa")
    model, _ = load_albef(written(tensors, tmp_path), selection=WHOLE, bos_token_id=2, eos_token_id=3)
    image = albef.image_states(tensors, PIXELS)
    fused = albef.fused_states(tensors, albef.text_states(tensors, IDS, MASK), MASK, [image])
    output = model(PIXELS, IDS, MASK)
    assert close(real(output.question_states), real(fused))
    answers = torch.tensor([[2, 7, 8, 3], [2, 9, 10, 11]])
    logits = model.decoder(
        input_ids=answers, encoder_hidden_states=output.question_states, encoder_attention_mask=MASK
    ).logits
    assert close(logits, albef.answer_logits(tensors, answers, fused, MASK))
    assert (model.config.decoder_config.bos_token_id, model.config.decoder_config.eos_token_id) == (2, 3)


@torch.no_grad()
def test_nlvr_truth(tmp_path) -> None:
    tensors = albef.checkpoint("nlvr")
    model, report = load_albef(written(tensors, tmp_path), selection=WHOLE)
    pairs = images(4).unflatten(0, (2, 2))
    seen = [albef.image_states(tensors, pairs[:, i]) for i in range(2)]
    fused = albef.fused_states(tensors, albef.text_states(tensors, IDS, MASK), MASK, seen)
    assert close(real(model.trips(IDS, MASK, pairs).last_hidden_state), real(fused))
    assert close(model(pairs, IDS, MASK).logits, albef.reasoning_logits(tensors, fused))
    assert (model.config.reasoning.fusion, model.config.reasoning.num_images) == ("stacked", 2)
    # of text assignment: the same towers, a classifier of three that no class has
    assignment = {name: value for name, value in tensors.items() if not name.startswith("cls_head")}
    assignment |= {"ta_head.weight": torch.ones(3, albef.WIDTH), "ta_head.bias": torch.ones(3)}
    model, report = load_albef(written(assignment, tmp_path), selection=WHOLE)
    assert {"file: ta_head.weight", "file: ta_head.bias"} <= set(report.ignored)
    assert {name.split(".")[0] for name in report.initialised} == {"reasoning_head"}


def test_another_resolution_and_a_guide(tmp_path) -> None:
    model, report = load_albef(written(albef.checkpoint("vqa"), tmp_path), selection=HALF, image_size=48)
    assert report.resized == ["trips.vision.tower.embeddings.position_embeddings"]
    assert model.config.vision_config.image_size == 48
    output = model(images(2, 48, 48), IDS, MASK)
    assert len(output.selections) == 2 and bool(output.question_states.isfinite().all())
    model.save_pretrained(tmp_path / "out")
    again = TripsForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert torch.equal(again(images(2, 48, 48), IDS, MASK).question_states, output.question_states)


LAYER = "text_encoder.bert.encoder.layer."
INTEGERS = torch.ones(128, dtype=torch.int8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("pretraining", {"adapter.weight": torch.ones(2)}, "unexpected keys.*adapter.weight"),
        ("pretraining", {"visual_encoder.blocks.0.extra": torch.ones(2)}, "unexpected keys.*visual_encoder.*extra"),
        ("pretraining", {f"{LAYER}3.output.dense.bias": None}, rf"missing keys.*{LAYER}3\.output\.dense\.bias"),
        ("pretraining", {f"{LAYER}3.crossattention.": None}, rf"missing keys.*{LAYER}3\.crossattention"),
        ("pretraining", {f"{LAYER}1.": None}, rf"missing keys.*{LAYER}1"),
        ("pretraining", {"visual_encoder.blocks.1.": None}, r"missing keys.*visual_encoder\.blocks\.1"),
        ("pretraining", {"visual_encoder_m.norm.bias": None}, r"missing keys.*visual_encoder_m\.norm\.bias"),
        ("pretraining", {"text_encoder_m.bert.embeddings.LayerNorm.bias": None}, "missing keys.*LayerNorm.bias"),
        ("pretraining", {"text_encoder.bert.embeddings.word": None}, "missing keys.*word_embeddings"),
        ("pretraining", {"temp": None}, "missing keys.*temp"),
        ("pretraining", {"itm_head.": None}, "missing keys.*itm_head"),
        ("pretraining", {"itm_head.weight": torch.ones(2, 64)}, r"another shape.*itm_head\.weight.*\(2, 64\)"),
        ("pretraining", {"text_encoder_m.bert.embeddings.LayerNorm.bias": INTEGERS}, "_m.*bias: holds no.*int8"),
        ("pretraining", {"temp": torch.ones(1, dtype=torch.int64)}, "temp: holds no floating-point numbers.*int64"),
        ("pretraining", {"image_queue": torch.ones(16, 12, dtype=torch.int8)}, "image_queue: holds no floating-point"),
        ("vqa", {"text_decoder.bert.encoder.layer.0.output.dense.bias": INTEGERS}, "text_decoder.*bias: holds no"),
        ("pretraining", {"text_encoder.cls.predictions.decoder.weight": torch.ones(40, 128)}, "layer of its own"),
        ("pretraining", {"text_queue": torch.ones(16, 5)}, "text_queue.*queues do not fit"),
        ("vqa", {"text_decoder.cls.predictions.decoder.bias": torch.ones(40)}, "decoder.bias.*layer of its own"),
        ("vqa", {"text_decoder.bert.encoder.layer.0.output.dense.bias": None}, "missing keys.*text_decoder.bert"),
        ("nlvr", {"text_encoder.encoder.layer.3.crossattention.self.key.bias": torch.ones(128)}, "share them"),
        ("nlvr", {"text_encoder.encoder.layer.5.": None}, "pairs"),
        ("nlvr", {"text_encoder.": None}, "not a checkpoint of ALBEF"),
    ],
)  # fmt: skip
def test_bad_checkpoints_name_the_key(tmp_path, kind, change, message) -> None:
    tensors = albef.checkpoint(kind)
    for name, value in change.items():
        if value is None:
            tensors = {known: kept for known, kept in tensors.items() if not known.startswith(name)}
        else:
            tensors[name] = value
    path = written(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_albef(path, selection=HALF)
    assert str(path) in str(caught.value)


def test_kin_without_a_counterpart(tmp_path) -> None:
    blip = albef.checkpoint("retrieval")
    for name in [name for name in blip if ".layer.2.crossattention." in name]:
        for layer in (0, 1):
            blip[name.replace("layer.2", f"layer.{layer}")] = blip[name]
    with pytest.raises(UnsupportedModelError, match="BLIP.*trips.accelerate"):
        load_albef(written(blip, tmp_path), selection=HALF)
    entailment = albef.checkpoint("nlvr") | {"cls_head.2.weight": torch.ones(3, 128), "cls_head.2.bias": torch.ones(3)}
    with pytest.raises(UnsupportedModelError, match="cls_head.2.weight.*3 classes"):
        load_albef(written(entailment, tmp_path), selection=HALF)
    unlike = albef.checkpoint("vqa")
    for name, value in unlike.items():
        if name.startswith("visual_encoder."):
            value = torch.cat([value, value], -1) if value.ndim == 3 else value
            unlike[name] = value
    narrow = {name: value for name, value in unlike.items() if not name.startswith("visual_encoder.")}
    wide = {"cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "patch_embed.proj.weight": (64, 3, 8, 8),
            "patch_embed.proj.bias": (64,), "norm.weight": (64,), "norm.bias": (64,)}  # fmt: skip
    wide |= {f"blocks.0.{norm}.{leaf}": (64,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    for name, rows, columns in (("attn.qkv", 192, 64), ("attn.proj", 64, 64), ("mlp.fc1", 96, 64), ("mlp.fc2", 64, 96)):
        wide |= {f"blocks.0.{name}.weight": (rows, columns), f"blocks.0.{name}.bias": (rows,)}
    narrow |= {f"visual_encoder.{name}": torch.ones(shape) for name, shape in wide.items()}
    with pytest.raises(UnsupportedModelError, match="unlike width"):
        load_albef(written(narrow, tmp_path), selection=HALF)
