"""The accuracy source on the embedded corpus: settings become the right model, one warm-up serves all."""

from __future__ import annotations

import dataclasses

import pytest

from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.paper.settings import Setting
from trips.quickstart import stages, sweep
from trips.quickstart.plan import QuickstartPlan
from trips.quickstart.sweep import SceneAccuracy


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((5, 10), (3, 5)), ((2,), (1,)), ((10,), (5,)), ((2, 4), (1, 2)), ((4, 8), (2, 4)), ((6, 12), (3, 6)),
     ((2, 6, 10), (1, 3, 5)), ((3, 6, 9), (2, 3, 5)), ((4, 8, 12), (2, 4, 6))],
)  # fmt: skip
def test_locations_of_table_4_are_scaled_to_half_the_depth(layers, expected):
    setting = Setting("row", SelectionConfig(layers=layers))
    assert setting.selection_in(6).layers == expected
    assert setting.selection_in(12) == setting.selection


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="two locations fall on one layer"):
        Setting("row", SelectionConfig(layers=(5, 6))).selection_in(6)
    for scale in (0, 1.2):
        with pytest.raises(ConfigError, match="scale"):
            Setting("row", SelectionConfig(), scale=scale)


def test_384_pixels_stand_for_the_corpus_own_picture():
    source = SceneAccuracy("nowhere")
    sides = {size: source.side(Setting("row", SelectionConfig(), image_size=size)) for size in (224, 384, 456)}
    assert sides == {224: 40, 384: 64, 456: 80}  # 4.67, 8 and 9.5 patches; Python rounds a half to the even number
    assert source.side(Setting("row", SelectionConfig(), scale=0.75)) == 48


def test_measuring_needs_one_warm_up_and_repeats_itself(tmp_path):
    plan = QuickstartPlan.of("smoke")
    setting = Setting("text", SelectionConfig(keep_rate=0.5, learning="gate"))
    source = SceneAccuracy(tmp_path, plan)
    first = source.measure(setting, 1)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 1 and 0 <= first["accuracy"] <= 100 and {"recall", "gain", "flops_g"} <= first.keys()
    again = SceneAccuracy(tmp_path, plan).measure(setting, 1)  # from what was kept
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    smaller = source.measure(Setting("small", SelectionConfig(guide="none"), scale=0.5), 1)
    assert "recall" not in smaller and smaller["flops_g"] < first["flops_g"]
    assert sorted(tmp_path.rglob("*.safetensors")) == kept


def test_trips_s_has_a_warm_up_of_its_own(tmp_path):
    source = SceneAccuracy(tmp_path, QuickstartPlan.of("smoke"))
    setting = Setting("TRIPS-S", SelectionConfig(keep_rate=0.5), architecture="single")
    assert source.selection(setting).layers == (4, 7)  # of 6 + 2 layers
    figures = source.measure(setting, 1)
    assert 0 <= figures["accuracy"] <= 100 and "recall" in figures
    assert [folder.name.rsplit("_", 1)[0] for folder in tmp_path.iterdir()] == ["single_seed_1"]


def test_a_signal_leaves_no_half_trained_figure(tmp_path, monkeypatch):
    interrupted = dataclasses.make_dataclass("Report", ["interrupted"])(True)
    monkeypatch.setattr(stages, "_train", lambda *arguments, **options: interrupted)
    with pytest.raises(KeyboardInterrupt):
        SceneAccuracy(tmp_path, QuickstartPlan.of("smoke")).measure(Setting("row", SelectionConfig()), 1)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_warm_up_is_made_anew(tmp_path, monkeypatch):
    """Of a model that was being written when the signal came nothing is read later."""
    written = []

    class Model:
        def save_pretrained(self, folder):
            folder.mkdir()
            written.append(folder)
            if len(written) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "warmed_up_model", lambda *_: (Model(), None))
    source = SceneAccuracy(tmp_path, QuickstartPlan.of("smoke"))
    with pytest.raises(KeyboardInterrupt):
        source.warmed_up(1)
    source.warmed_up(1)
    assert len(written) == 2 and [folder.suffix for folder in tmp_path.iterdir()] == [""]
