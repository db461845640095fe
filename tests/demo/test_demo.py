"""What the demo computes: what guides say, keep and cost; which uploads it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from demo.visitors import Reader, png_header
from pipelines import CANDIDATES, picture, tiny_processor
from reasoning_models import tiny_reasoning_model
from tiny import tiny_pretraining_model, tiny_vqa_model

from trips.bench.flops import count_flops
from trips.demo import comparison, markup
from trips.demo.comparison import GUIDES, Comparison, check_shown, guides_of, settings_of
from trips.demo.markup import comparison_html
from trips.demo.uploads import MAX_LETTERS, checked_text, open_photo, uploaded_path
from trips.errors import ConfigError, DataError, UnsupportedModelError
from trips.pipeline import TripsPipeline

QUESTION = "is the cat on the sofa?"
SETTINGS = {"guides": ("text", "image", "random"), "layers": (2, 3), "keep_rate": 0.5}


@pytest.fixture(scope="module")
def answering() -> TripsPipeline:
    return TripsPipeline(tiny_vqa_model(), tiny_processor(), CANDIDATES)


@pytest.fixture(scope="module")
def matching() -> TripsPipeline:
    return TripsPipeline(tiny_pretraining_model(), tiny_processor())


def compare(*arguments, **options) -> Comparison:
    """What is said at last."""
    return list(comparison.compare(*arguments, **options))[-1]


def test_guides_say_what_the_pipeline_says_and_cost_what_is_counted(answering) -> None:
    found = compare(answering, picture(3), QUESTION, **SETTINGS)
    assert [outcome.guide for outcome in found.outcomes] == ["text", "image", "random", "none"]
    config, length = answering.model.config, answering.processor(text=[QUESTION])["input_ids"].shape[1]
    for outcome in found.outcomes:
        selection = config.selection.replace(guide=outcome.guide)
        if outcome.guide != "random":
            expected = answering.ask(picture(3), QUESTION, 3, selection=selection)
            assert [answer.text for answer in outcome.said] == [answer.text for answer in expected]
        assert outcome.gflops == count_flops(config, (4, 4), length, selection).total
        assert outcome.seconds > 0 and outcome.problem is None
    kept = [len(location.kept) for location in found.outcomes[0].explanation.locations]
    assert kept[0] == 8 and found.baseline.explanation is None and found.num_patches == 16
    assert found.baseline.gflops > found.outcomes[0].gflops


def test_guides_are_said_as_soon_as_they_are_ready(answering) -> None:
    stages = list(comparison.compare(answering, picture(3), QUESTION, **SETTINGS))
    assert [[outcome.guide for outcome in found.outcomes] for found in stages] == [
        ["none"],
        ["text", "none"],
        ["text", "image", "none"],
        ["text", "image", "random", "none"],
        ["text", "image", "random", "none"],
    ]
    assert [[outcome.seconds is None for outcome in found.outcomes] for found in stages[-2:]] == [
        [True] * 4,
        [False] * 4,
    ]
    pages = list(comparison_html(stages))
    assert "being measured" in pages[0] and "being measured" not in pages[-1]
    assert pages == [next(comparison_html([found])) for found in stages]  # pictures drawn once, or anew


def test_nothing_is_computed_or_drawn_twice(answering, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"images": 0, "ranked": 0, "drawn": 0}

    def counted(holder: object, name: str, what: str) -> None:
        function = getattr(holder, name)

        def watched(*arguments, **options):
            calls[what] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(holder, name, watched)

    monkeypatch.setattr(comparison, "_ROUNDS", (2, 2))
    counted(answering.model.trips.vision, "prefix", "images")
    counted(answering.model, "rank_answers", "ranked")
    counted(markup, "kept_picture", "drawn")
    list(comparison_html(comparison.compare(answering, picture(3), QUESTION, **SETTINGS)))
    settings, layers = 4, 2
    assert calls["ranked"] == settings and calls["drawn"] == (settings - 1) * layers
    assert calls["images"] == settings * 4  # the answer's pass, the one that is drawn, two that are timed


def test_every_guides_answer_is_made_of_the_patches_that_are_drawn(answering, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}
    vision = answering.model.trips.vision
    suffix = vision.suffix

    def watched(*arguments, **options):
        output = suffix(*arguments, **options)
        selection = arguments[2] if len(arguments) > 2 else options["selection"]
        if output.selections:
            seen.setdefault(selection.guide, []).append([sorted(one.kept[0].tolist()) for one in output.selections])
        return output

    monkeypatch.setattr(vision, "suffix", watched)
    state = torch.get_rng_state()
    found = compare(answering, picture(3), QUESTION, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)  # the noise is borrowed
    for outcome in found.outcomes[:-1]:
        asked = seen[outcome.guide][0]  # the first pass is that of the answer
        drawn = [list(location.kept) for location in outcome.explanation.locations]
        assert [[place for place in places if place >= 0] for places in asked] == drawn
    torch.manual_seed(7)  # whatever happened in between
    again = compare(answering, picture(3), QUESTION, **SETTINGS)
    assert again.outcomes[2].explanation.locations[0].kept == found.outcomes[2].explanation.locations[0].kept


def test_a_matching_model_gives_the_probability_of_its_score(matching) -> None:
    found = compare(matching, picture(1), "a red bus", guides=("image",), layers=(3,), keep_rate=0.25)
    for outcome, guide in zip(found.outcomes, ("image", "none"), strict=True):
        selection = matching.model.config.selection.replace(guide=guide, layers=(3,), keep_rate=0.25)
        expected = matching.score(picture(1), "a red bus", selection=selection).item()
        assert [answer.text for answer in outcome.said] == ["match"]
        assert outcome.said[0].probability == pytest.approx(expected, abs=1e-5)
    assert found.layers == (3,) and len(found.outcomes[0].explanation.locations[0].kept) == 4


@pytest.mark.parametrize("changes", [{"keep_rate": 1.0}, {"layers": ()}, {"guides": ()}])
def test_without_a_selection_the_photo_stands_alone(answering, changes: dict[str, object]) -> None:
    found = compare(answering, picture(3), QUESTION, **{**SETTINGS, **changes})
    assert [outcome.guide for outcome in found.outcomes] == ["none"] and found.layers == ()
    assert "Nothing is selected" in next(comparison_html([found]))


def test_a_keep_rate_that_keeps_every_patch_after_all_is_no_problem(answering) -> None:
    found = compare(answering, picture(3), QUESTION, **{**SETTINGS, "keep_rate": 0.99})  # of 16 patches 16
    assert all(outcome.problem is None for outcome in found.outcomes)
    page = Reader(next(comparison_html([found])))
    assert all(f"{16} of 16" in tags["alt"] or "every patch" in tags["alt"] for tag, tags in page.tags if tag == "img")


def test_one_guide_that_fails_does_not_take_the_others_along(answering, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = answering.ask

    def fails(*arguments, selection, **options):
        if selection.guide == "image":
            raise ConfigError("has no such <guide>", item="this model")
        return ask(*arguments, selection=selection, **options)

    monkeypatch.setattr(answering, "ask", fails)
    found = compare(answering, picture(3), QUESTION, **SETTINGS)
    assert [bool(outcome.problem) for outcome in found.outcomes] == [False, True, False, False]
    assert "has no such <guide>" in Reader(next(comparison_html([found]))).text
    with pytest.raises(ConfigError, match="guide: unknown value; found 'luck'"):
        compare(answering, picture(3), QUESTION, guides=("luck",), layers=(2,), keep_rate=0.5)


def test_guides_and_first_settings_fit_the_model(answering) -> None:
    assert guides_of(answering) == GUIDES and settings_of(answering) == answering.model.config.selection
    single = TripsPipeline(tiny_vqa_model(architecture="single"), tiny_processor(), CANDIDATES)
    assert "image" not in guides_of(single) and "text" in guides_of(single)
    found = compare(single, picture(0), QUESTION, guides=guides_of(single), layers=(2, 3), keep_rate=0.5)
    assert all(outcome.problem is None for outcome in found.outcomes)
    baseline = TripsPipeline(tiny_vqa_model(guide="none", layers=()), tiny_processor(), CANDIDATES)
    start = settings_of(baseline)  # 4 layers: of the paper's 5 and 10 there is none
    assert (start.guide, start.layers) == ("text", (4,))
    with pytest.raises(UnsupportedModelError, match="several pictures"):
        check_shown(TripsPipeline(tiny_reasoning_model(), tiny_processor()))


def test_uploads_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    good, postscript = io.BytesIO(), io.BytesIO()
    picture(0).save(good, "PNG")
    picture(0).save(postscript, "EPS")
    for name, data, words in (
        ("text.png", b"not a picture at all", "text.png: not a readable image"),
        ("empty.png", b"", "empty"),
        ("half.png", good.getvalue()[:1500], "half.png: .*truncated"),
        ("bomb.png", png_header(40_000, 40_000), "bomb.png: .*(exceeds limit|too large)"),
        (
            "large.png",
            png_header(9_000, 9_000),
            "large.png: picture is too large to decode safely; found '9000x9000 px'",
        ),
        ("run.png", postscript.getvalue(), "run.png: not a format of photos; found 'EPS'"),  # Pillow runs a program
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not a readable image"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words) as raised:
            open_photo(tmp_path / name)
        assert str(tmp_path) not in str(raised.value)  # the server's folders are nobody's business
    (tmp_path / "good.png").write_bytes(good.getvalue())
    assert np.array_equal(open_photo(tmp_path / "good.png"), picture(0))
    with pytest.raises(DataError, match="file is too large; found '0.0 MiB'"):
        open_photo(tmp_path / "good.png", max_bytes=1000)
    with pytest.raises(DataError, match="upload is gone"):
        open_photo(tmp_path / "none.png")


def test_only_files_that_were_handed_in_are_read(tmp_path: Path) -> None:
    uploads, secret = tmp_path / "uploads", tmp_path / "secret.png"
    (uploads / "a").mkdir(parents=True)
    for path in (secret, uploads / "a" / "photo.png"):
        picture(0).save(path)
    (uploads / "link.png").symlink_to(secret)
    mine = str(uploads / "a" / "photo.png")
    assert uploaded_path({"path": mine}, uploads) == mine
    for path in (
        str(secret),
        f"{uploads}/../secret.png",
        f"{uploads}/link.png",
        f"{uploads}2/x.png",
        "",
        "\0",
        None,
        7,
    ):
        assert uploaded_path({"path": path}, uploads) is None
    for upload in (None, mine, [mine], {"url": mine}):
        assert uploaded_path(upload, uploads) is None


def test_words_are_checked() -> None:
    assert checked_text("  a bus \n") == "a bus"
    for bad, words in (("  ", "blank"), (None, "blank"), ("a" * (MAX_LETTERS + 1), "too long")):
        with pytest.raises(DataError, match=words):
            checked_text(bad)
