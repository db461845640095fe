"""The figures of kept patches: what is drawn is what the record says, at any shape of photo, and legible."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CANDIDATES, tiny_processor
from tiny import tiny_pretraining_model, tiny_vqa_model

from trips.drawing import Panel, enlarged, heat_map, outlined, patch_values
from trips.errors import ConfigError, ShapeError
from trips.paper.figures import Photo, draw_selection, faded, figure_1, figure_3, figure_4, pair_up, selection_row
from trips.pipeline import TripsPipeline
from trips.selection import Selection
from trips.sheets import Line, check_path, lay_out

RED = (200, 30, 30)


@pytest.fixture(scope="module")
def matching() -> TripsPipeline:
    return TripsPipeline(tiny_pretraining_model(), tiny_processor())


@pytest.fixture(scope="module")
def answering() -> TripsPipeline:
    return TripsPipeline(tiny_vqa_model(), tiny_processor(), CANDIDATES)


def red(width: int, height: int) -> Image.Image:
    """Red all over, with noise for the model to choose by."""
    noise = np.random.default_rng(width).integers(-30, 30, (height, width, 3))
    return Image.fromarray((np.array(RED) + noise).clip(0, 255).astype(np.uint8))


def is_red(pixel: np.ndarray) -> bool:
    return int(pixel[0]) - int(pixel[1]) > 60


# --- pixels


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (40, 7)], ids=["whole patches", "odd", "tall"])
def test_faded_pixel_by_pixel(size):
    image = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
    kept = np.array([True, False, False, False, True, True])
    result = faded(image, kept, (2, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            patch = int((y + 0.5) / size[0] * 2) * 3 + int((x + 0.5) / size[1] * 3)
            if kept[patch]:
                assert (result[y, x] == image[y, x]).all()
            else:
                assert len(set(result[y, x].tolist())) == 1 and 170 < result[y, x, 0] < 250


def test_faded_refuses_another_grid():
    with pytest.raises(ShapeError, match="values"):
        faded(np.zeros((4, 4, 3), np.uint8), np.zeros(5, bool), (2, 2))


def test_heat_follows_the_scores_and_leaves_out_what_was_gone():
    pytest.importorskip("matplotlib")
    image = np.full((20, 30, 3), RED, np.uint8)
    heat = heat_map(image, np.array([0.6, np.nan, 0.1, 0.02, 0.25, 0.03]), (2, 3)).astype(int)
    colours = heat[[5, 5, 5, 15, 15, 15], [5, 15, 25, 5, 15, 25]]
    assert len(set(colours[1])) == 1  # grey
    light = colours @ np.array([0.299, 0.587, 0.114])  # what cividis rises in
    assert [int(i) for i in np.argsort(-light) if i != 1] == [0, 4, 2, 5, 3]
    assert heat_map(image, np.full(6, 1 / 6), (2, 3)).shape == image.shape  # all alike: nothing to divide by


def test_boxes_stand_where_they_were_measured():
    image = np.zeros((50, 100, 3), np.uint8)
    photo, boxes = enlarged(image, [(20, 10, 60, 40)])
    assert photo.shape == (400, 800, 3)
    drawn = outlined(photo, boxes).any(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (80, 320, 160, 480)
    assert not drawn[100:300, 200:440].any()  # an outline
    outlined(photo, [(-50, -50, 5000, 5000)])


# --- what is drawn is what was chosen


@pytest.mark.parametrize("size", [(60, 40), (30, 90), (50, 50)])
def test_pixels_of_a_figure_agree_with_its_record(matching, size):
    pytest.importorskip("matplotlib")
    figure = figure_3(matching, [Photo(red(*size), "what is it?", "red"), Photo(red(40, 60), "the dog")])
    sheet = lay_out(figure.lines, title=figure.title)
    written = io.BytesIO()
    sheet.savefig(written, dpi=200)
    page = np.asarray(Image.open(written).convert("RGB"))
    high, wide = page.shape[:2]
    record = figure.record()
    assert [row["image"] for row in record["rows"]] == ["red", "image"]
    axes = iter(sheet.axes)
    for row in record["rows"]:
        down, across = row["grid"]
        everything = [{"kept": list(range(down * across))}, *row["locations"]]
        assert len(everything) == 3
        for location in everything:
            left, bottom, width, height = next(axes).get_position().bounds
            assert width * 5.5 * 200 / (height * sheet.get_figheight() * 200) == pytest.approx(
                row["image_size"][0] / row["image_size"][1], rel=0.01
            )  # the photo's own shape
            found = [
                place
                for place in range(down * across)
                if is_red(
                    page[
                        round((1 - bottom - height + height * (place // across + 0.5) / down) * high),
                        round((left + width * (place % across + 0.5) / across) * wide),
                    ]
                )
            ]
            assert found == location["kept"]


def test_figure_4_shows_one_photo_under_every_text(matching):
    photo = red(60, 40)
    texts = ["dog", "cat", "bus", "tree", "car", "hat"]
    for heat, lines in ((False, [4, 3]), (True, [4, 4, 3, 3])):
        figure = figure_4(matching, pair_up([photo], texts), heat=heat)
        assert [len(line.panels) for line in figure.lines] == lines
        assert [one.text for one in figure.explanations] == texts
        titles = [panel.title for line in figure.lines for panel in line.panels]
        assert [title for title in titles if title and "scores" not in title] == ["input", *texts]
        for one, text in zip(figure.explanations, texts):
            assert one.locations[-1].kept == matching.explain(photo, text).locations[-1].kept
    with pytest.raises(ConfigError, match="one photo"):
        figure_4(matching, [Photo(photo, "dog"), Photo(red(30, 30), "dog")])


def test_figure_1_exchanges_the_guide_and_says_both_answers(answering, matching):
    photo = red(60, 40)
    figure = figure_1(answering, [Photo(photo, "what is it?", truth="bus")])
    own = answering.model.config.selection
    assert [one.guide for one in figure.explanations] == ["text", "image"]
    for one in figure.explanations:
        selection = own.replace(guide=one.guide)
        said = answering.ask(photo, "what is it?", 3, selection=selection)
        assert one.said == tuple(answer.text for answer in said)
        assert (
            one.record()["locations"]
            == answering.explain(photo, "what is it?", selection=selection).record()["locations"]
        )
    (line,) = figure.lines
    assert [panel.title for panel in line.panels] == [
        "input", *(f'{name}: "{one.said[0]}"' for name, one in zip(("question", "image [CLS]"), figure.explanations))
    ]  # fmt: skip
    assert line.text == "what is it?\ntrue: bus"
    assert not np.array_equal(line.panels[1].image, line.panels[2].image)
    with pytest.raises(ConfigError, match="no ask"):
        figure_1(matching, [Photo(photo, "what is it?")])


def test_photos_and_texts_pair_up():
    def pairs(images, texts):
        return [(photo.image, photo.text) for photo in pair_up(images, texts)]

    assert pairs(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert pairs(["a"], ["x", "y"]) == [("a", "x"), ("a", "y")]
    assert pairs(["a", "b"], ["x"]) == [("a", "x"), ("b", "x")]
    for images, texts in (([], ["x"]), (["a"], []), (["a", "b"], ["x", "y", "z"])):
        with pytest.raises(ConfigError, match="pair up"):
            pair_up(images, texts)


# --- the sheet


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (1, 400)])
def test_nothing_overlaps_and_nothing_is_smaller_than_seven_points(shape):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = Panel(np.zeros((*shape, 3), np.uint8), "a title of $ more than a few words, \\frac and w" + "o" * 60)
    long = "what is on the left side of the " + "extraordinarily" * 4 + "\nsaid: table\ntrue: " + "chair, " * 60
    sheet = lay_out([Line(long, (picture,) * 5), Line("", (picture,) * 3)], title="Title " * 40, heat=True)
    assert sheet.get_figwidth() == 5.5
    canvas = FigureCanvasAgg(sheet)
    canvas.draw()
    assert min(text.get_fontsize() for text in sheet.texts) >= 7
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in sheet.texts]
    boxes += [axis.get_window_extent() for axis in sheet.axes]
    page = sheet.bbox
    for i, one in enumerate(boxes):
        assert page.x0 - 1 <= one.x0 and one.x1 <= page.x1 + 1 and page.y0 - 1 <= one.y0 and one.y1 <= page.y1 + 1
        for other in boxes[:i]:
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or high <= 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figure_is_written(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    image = np.full((16, 16, 3), 90, np.uint8)
    candidates = torch.tensor([[0, 1, 3, -1]])
    record = Selection(
        2, torch.rand(1, 4), torch.rand(1, 4), candidates, torch.tensor([[1, 3]]), torch.tensor([[1, -1]])
    )
    row = selection_row("what colour is the star ?", image, [record], 0, 4)
    assert row.layers == (2,) and row.kept[0].tolist() == [False, True, False, False]
    path = draw_selection([row, row], (2, 2), tmp_path / "new" / f"kept.{suffix}", "title")
    content = path.read_bytes()
    assert content[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[suffix]
    if suffix == "png":
        assert Image.open(path).size[0] == 1650


def test_a_suffix_without_a_format_is_told_before_anything_is_computed():
    pytest.importorskip("matplotlib")
    for name in ("kept.docx", "kept"):
        with pytest.raises(ConfigError, match="no format"):
            check_path(name)


def test_patch_values_cover_every_patch():
    values = patch_values(np.arange(6), (2, 3), (50, 31))
    assert values.shape == (50, 31) and np.unique(values).tolist() == list(range(6))
    assert values[0, 0] == 0 and values[-1, -1] == 5
