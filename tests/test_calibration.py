"""Calibration of a text guide: a fit against its closed-form goal, what it keeps on held-out pairs, what it leaves."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CANDIDATES, tiny_processor
from reasoning_models import tiny_reasoning_model
from tiny import randomise, tiny_config, tiny_pretraining_model, tiny_vqa_model

import trips
from trips import cli
from trips.calibration import calibrate
from trips.calibration.fit import Observed, fit_query
from trips.calibration.measure import overlap
from trips.config import SelectionConfig
from trips.data.scene_batches import scene_processor
from trips.data.scenes import SceneCorpus
from trips.errors import ConfigError, DataError, UnsupportedModelError
from trips.pipeline import TripsPipeline
from trips.tasks.retrieval import TripsForImageTextRetrieval
from trips.train.transfer import start_from

TEXTS = ["red cat", "a blue sofa", "two green lamp", "what is the tree", "man on the car", "is it a small bus ?"]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Blocks of plain colours, so that patches differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(one.repeat(8, axis=0).repeat(8, axis=1)) for one in noise]


def pairs(count: int = 60) -> list[tuple[Image.Image, str]]:
    """Three texts about each picture."""
    return [(picture, TEXTS[(i + j) % 6]) for i, picture in enumerate(pictures(count)) for j in (0, 2, 3)]


def looking_model(**kwargs: object) -> trips.TripsForQuestionAnswering:
    """Random, but its cross-attention tells patches apart: with plain random weights it is all but uniform."""
    model = tiny_vqa_model(**kwargs)
    for layer in model.trips.fusion.layer:
        layer.crossattention.self.query.weight.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def found() -> tuple[trips.TripsForQuestionAnswering, object]:
    """The model as it was, and its calibration."""
    model = looking_model(guide="none")
    before = copy.deepcopy(model)
    return before, calibrate(TripsPipeline(model, tiny_processor(), CANDIDATES), pairs())


def test_a_known_query_is_found_again() -> None:
    """Teachers made by an affine map of the text are matched, on texts and images that were not fitted to."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = 0.4 * torch.randn(6, 8, generator=generator), torch.randn(8, generator=generator)

    def observed(rows: int) -> Observed:
        patches = torch.randn(rows, 10, 8, generator=generator) * torch.linspace(0.1, 3, 8)
        text = torch.randn(rows, 6, generator=generator) + 2
        teacher = torch.softmax(torch.einsum("rnd,rd->rn", patches.half().float(), text @ weight + bias) / 8**0.5, -1)
        return Observed(text, teacher, torch.arange(rows), {1: patches.half()}, text)

    train, validation, test = observed(400), observed(50), observed(50)
    fitted, shift, _ = fit_query(train, validation, 1, 1, 1.0)
    logits = torch.einsum("rnd,rd->rn", test.scored[1].float(), test.text_cls @ fitted + shift) / 8**0.5
    got = torch.softmax(logits, -1)
    assert (got - test.teacher).abs().sum(dim=1).mean() < 0.05
    uniform = (test.teacher - 0.1).abs().sum(dim=1).mean()
    assert uniform > 0.5  # the test can fail


def test_overlap_of_other_texts_by_a_loop() -> None:
    kept = (torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    index = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    shares = [
        (kept[i] * kept[j]).sum() / kept[i].sum() for i in range(7) for j in range(7) if i != j and index[i] == index[j]
    ]
    assert overlap(kept, index) == pytest.approx(torch.stack(shares).mean().item(), abs=1e-6)
    assert overlap(kept, torch.arange(7)) is None


def test_more_of_the_teachers_attention_is_kept_on_held_out_pairs(found) -> None:
    _, result = found
    literal, calibrated = result.guides["literal"], result.guides["calibrated"]
    for name in ("literal", "image", "random"):
        assert calibrated.teacher_mass[-1] > result.guides[name].teacher_mass[-1] + 0.05, name
    assert all(new < old for new, old in zip(calibrated.kl, literal.kl))
    assert all(own >= got for own, got in zip(result.teachers_own[:1], calibrated.teacher_mass[:1]))
    assert result.num_held_out == 36 and result.num_texts == 108 and result.chance == (0.5, 0.3125)


def test_nothing_but_the_text_guide_changes(found) -> None:
    before, result = found
    after, processor = result.pipeline.model, result.pipeline.processor
    assert all(torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))
    inputs = processor(images=pictures(3, seed=5), text=TEXTS[:3])
    literal = result.selection.replace(guide_query="layer")
    same = [result.selection.replace(keep_rate=1.0), literal, literal.replace(guide="none")]
    same += [result.selection.replace(guide="image"), result.selection.replace(guide="none")]
    with torch.no_grad():
        for selection in same:
            old = literal.replace(guide=selection.guide, keep_rate=selection.keep_rate)
            want = before(**inputs, selection=old).question_states
            assert torch.equal(after(**inputs, selection=selection).question_states, want)
        kept = [after(**inputs, selection=one).selections[-1].kept for one in (result.selection, literal)]
    assert not torch.equal(*kept)


def test_a_saved_model_selects_as_the_calibrated_one(found, tmp_path) -> None:
    model = looking_model()
    TripsPipeline(model, tiny_processor())
    run = tmp_path / "run"
    model.save_pretrained(run), tiny_processor().save_pretrained(run)
    result = calibrate(run, pairs(), tmp_path / "out", keep_rate=0.4)
    opened = trips.load(tmp_path / "out")
    assert opened.model.config.selection == result.selection and opened.model.config.calibrated_layers == (2, 3)
    inputs = opened.processor(images=pictures(3, seed=5), text=TEXTS[:3])
    with torch.no_grad():
        ours, theirs = opened.model(**inputs), result.pipeline.model(**inputs)
    assert torch.equal(ours.question_states, theirs.question_states)
    assert torch.equal(ours.selections[-1].kept, theirs.selections[-1].kept)
    with pytest.raises(ConfigError, match="in use"):
        calibrate(run, pairs(), tmp_path / "out")


def test_the_same_seed_gives_the_same_guide(found) -> None:
    _, first = found
    again = calibrate(TripsPipeline(looking_model(guide="none"), tiny_processor()), pairs())
    assert again.guides == first.guides
    ours, theirs = (one.pipeline.model.trips.vision.calibration.state_dict() for one in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and len(ours) == 4


def test_other_tasks_and_widths() -> None:
    several = [([one, two], text) for (one, text), (two, _) in zip(pairs(), pairs(61)[3:])]
    reasoning = calibrate(TripsPipeline(tiny_reasoning_model(), tiny_processor()), several)
    assert reasoning.guides["calibrated"].kl[0] < reasoning.guides["literal"].kl[0]
    pretraining = tiny_pretraining_model(width=48, width_map="orthogonal")
    result = calibrate(TripsPipeline(pretraining, tiny_processor()), pairs())
    assert result.pipeline.model.trips.vision.calibration.weight_2.shape == (32, 48)
    assert result.guides["calibrated"].kl[0] < result.guides["literal"].kl[0]


def test_the_embedded_scenes_by_the_command_line(tmp_path, capsys) -> None:
    corpus = SceneCorpus()
    processor = scene_processor(corpus)
    config = tiny_config()
    config.text_config.vocab_size = config.fusion_encoder_config.vocab_size = len(processor.tokenizer)
    config.decoder_config.vocab_size = len(processor.tokenizer)
    model = randomise(trips.TripsForQuestionAnswering(config))
    model.save_pretrained(tmp_path / "run"), processor.save_pretrained(tmp_path / "run")
    rows = []
    for i in range(40):
        scene = corpus.scene(i)
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "question": one.text} for one in corpus.questions(scene, 4)]
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["calibrate", str(tmp_path / "run"), "--data", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--json", "--layers=[2,3]", "--keep_rate=0.5"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [name.split(":")[-1] for name in got["bad_samples"]] and len(got["bad_samples"]) == 1
    assert got["guides"]["calibrated"]["teacher_mass"][-1] > got["guides"]["literal"]["teacher_mass"][-1]
    argv[-1] = str(tmp_path / "again")
    assert (
        cli.main([*argv, "--pairs=150", "--held_out=0.25"]) == 0 and "1 bad samples left out" in capsys.readouterr().out
    )
    assert cli.main(argv) == 2  # the folder is in use


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, {"data": []}, DataError, "holds no image with a text"),
        ({}, {"data": pairs(4)}, DataError, "too few texts"),
        ({}, {"data": [(pictures(1)[0], " ")] * 9}, DataError, "no usable text"),
        ({}, {"data": [3]}, ConfigError, "neither an entry nor"),
        ({}, {"data": [(pictures(2), "red cat")]}, ConfigError, "another number of images"),
        ({"layers": ()}, {}, ConfigError, "without a location"),
        ({}, {"keep_rate": 1.0}, ConfigError, "keeps all patches"),
        ({}, {"layers": (9,)}, ConfigError, "beyond the last layer"),
        ({}, {"held_out": 0.9}, ConfigError, "leaves too little|not a share"),
        ({}, {"minutes": 0}, ConfigError, "must be positive"),
        ({"architecture": "single"}, {}, UnsupportedModelError, "no text guide"),
    ],
)
def test_what_cannot_be_calibrated(changes, arguments, error, message) -> None:
    pipeline = TripsPipeline(tiny_vqa_model(**changes), tiny_processor())
    with pytest.raises(error, match=message):
        calibrate(pipeline, **{"data": pairs(6), **arguments})


def test_a_model_of_transformers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be calibrated"):
        calibrate(torch.nn.Linear(2, 2), pairs(6))


def test_layers_without_a_calibrated_query(found) -> None:
    _, result = found
    inputs = result.pipeline.processor(images=pictures(2), text=TEXTS[:2])
    with pytest.raises(ConfigError, match="no calibrated query"):
        result.pipeline.model(**inputs, selection=result.selection.replace(layers=(1,)))
    with pytest.raises(ConfigError, match="no calibrated query"):
        tiny_config(guide_query="calibrated")
    assert SelectionConfig().guide_query == "layer"


@pytest.mark.parametrize("query", ["layer", "calibrated"])
@pytest.mark.parametrize("task", ["vqa", "retrieval", "nlvr2"])
def test_fine_tuning_starts_from_a_calibrated_model(tmp_path, task, query, caplog) -> None:
    """The fitted guide comes along where the new model asks by it, and stays behind, named, where it does not."""
    kinds = {
        "vqa": trips.TripsForQuestionAnswering,
        "retrieval": TripsForImageTextRetrieval,
        "nlvr2": trips.TripsForVisualReasoning,
    }
    result = calibrate(TripsPipeline(tiny_pretraining_model(), tiny_processor()), pairs(), tmp_path / "out")
    config = copy.deepcopy(result.pipeline.model.config)
    config.selection = config.selection.replace(guide_query=query)
    config.calibrated_layers = (2, 3) if query == "calibrated" else ()
    model = kinds[task](config).eval()
    with caplog.at_level("INFO", logger="trips"):
        start_from(model, tmp_path / "out")
    assert ("left behind" in caplog.text) == (query == "layer")
    source = result.pipeline.model.trips.vision.state_dict()
    expected = {name: value for name, value in source.items() if query == "calibrated" or "calibration" not in name}
    assert len(expected) == len(source) - (4 if query == "layer" else 0)
    ours = model.trips.vision.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
