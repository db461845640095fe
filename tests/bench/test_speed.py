"""A small measurement from end to end: what is said of a cell is what ran in it, and a caller's model stays whole."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reasoning_models import tiny_reasoning_model
from tiny import images, randomise, texts, tiny_config, tiny_vqa_model

import trips
from trips import cli
from trips.bench import measurement
from trips.bench.flops import count_flops
from trips.bench.measurement import Bench, Variant
from trips.bench.methods import METHODS
from trips.bench.plan import SpeedPlan
from trips.bench.speed import measure_speed
from trips.bench.speed_report import SpeedReport, SpeedRow
from trips.bench.subjects import (
    Inputs,
    build_subject,
    check_precision,
    inference,
    make_inputs,
    pair_model,
    random_model,
)
from trips.bench.timing import Timing
from trips.config import SelectionConfig
from trips.environment import describe_environment
from trips.errors import ConfigError, UnsupportedModelError
from trips.model import TripsModel
from trips.single_stream import build_encoder

BASE, LENGTH, SIZE = SelectionConfig(layers=(2, 3), keep_rate=0.5), 6, 48


@pytest.fixture(scope="module")
def model() -> TripsModel:
    return randomise(TripsModel(tiny_config()))


def given_inputs(count: int = 2) -> list[Inputs]:
    made = [(images(2, seed=seed), texts(2, LENGTH, seed=seed)[0]) for seed in range(count)]
    return [Inputs(pixels, ids, torch.randn(2, 32)) for pixels, ids in made]


@torch.no_grad()
def test_subjects_run_the_model_on_the_input_of_their_number(model: TripsModel, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no compiler's minutes
    inputs = given_inputs()
    for mode in ("eager", "compiled"):
        run = build_subject(model, BASE, inputs, mode=mode)
        seen = build_subject(model, BASE, inputs, part="vision", mode=mode)
        for number, given in enumerate(inputs):
            expected = model(given.input_ids, None, given.pixel_values, selection=BASE).last_hidden_state
            torch.testing.assert_close(run(number), expected, atol=1e-5, rtol=1e-4)
            expected = model.vision(given.pixel_values, given.text_cls, BASE).last_hidden_state
            torch.testing.assert_close(seen(number), expected, atol=1e-5, rtol=1e-4)
        assert not run(0).requires_grad
    torch.compiler.reset()


def test_every_subject_is_compiled_however_many_there_are(monkeypatch) -> None:
    """torch itself stops at eight graphs of the same lines and runs the others eagerly, with a warning at most."""
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def times(factor: float) -> Any:
        return lambda given: given * factor

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    subjects = [inference(times(float(factor)), [(torch.ones(2),)], "compiled") for factor in range(12)]
    for _ in range(2):
        assert [float(run(0)[0]) for run in subjects] == list(range(12))
    assert len(graphs) == 12
    torch.compiler.reset()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_training_step_does_all_its_work_and_changes_nothing(model: TripsModel, autocast) -> None:
    before, done = {name: value.clone() for name, value in model.state_dict().items()}, []
    hooks = [
        parameter.register_hook(lambda gradient, name=name: done.append((name, bool(gradient.isfinite().all()))))
        for name, parameter in model.named_parameters()
    ]
    build_subject(model, BASE, given_inputs(1), part="train", autocast=autocast)(0)
    for hook in hooks:
        hook.remove()
    reached = {name for name, finite in done if finite}
    parts = {name.split(".")[0] for name in reached}
    assert parts == {"vision", "text", "fusion"} and reached == {name for name, _ in done}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_differ_and_take_precision_and_place_of_the_model() -> None:
    half = TripsModel(tiny_config()).to(torch.bfloat16)
    made = make_inputs(half, SIZE, 3, LENGTH)
    assert len(made) == 3 and made[0].pixel_values.shape == (3, 3, SIZE, SIZE)
    assert made[0].pixel_values.dtype == made[0].text_cls.dtype == torch.bfloat16
    assert not torch.equal(made[0].pixel_values, made[1].pixel_values)
    assert made[0].input_ids.shape == (3, LENGTH) and not torch.equal(made[0].input_ids, made[1].input_ids)
    assert torch.equal(made[2].pixel_values, make_inputs(half, SIZE, 3, LENGTH)[2].pixel_values)
    with pytest.raises(ConfigError, match="text_length.*25.*at most 24"):
        make_inputs(half, SIZE, 1, 25)


KEYS = {field.name for field in dataclasses.fields(SpeedRow)}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the verb says as JSON."""
    folder = tmp_path_factory.mktemp("speed")
    command = ["speed", "--config", "small", "--image_size", "96", "64", "--settings", "5,10x0.7", "4,8x0.5,0.7"]
    command += ["--text_length", "7", "--batch_sizes", "2", "max", "--max_batch", "3", "--rounds", "2", "--json"]
    command += ["--methods", "text", "none", "--plot", str(folder / "speed.png")]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **options: said.append(words[0]))
        assert cli.main(command) == 0
    assert (folder / "speed.png").stat().st_size > 10_000
    return json.loads(said[-1])


def test_json_has_a_row_for_every_cell_and_subject(spoken: dict[str, Any]) -> None:
    assert set(spoken) == {"environment", "commit", "model", "baseline", "plan", "rows"}
    assert spoken["environment"]["torch"] == torch.__version__ and spoken["commit"] == spoken["environment"]["commit"]
    assert spoken["model"]["vision"] == {"type": "clip_vision_model", "width": 64, "layers": 12, "patch_size": 16}
    assert spoken["plan"]["rounds"] == 2 and spoken["plan"]["text_length"] == 7
    cells_seen = [(row["px"], row["batch"], row["largest"], row["method"], row["locations"]) for row in spoken["rows"]]
    assert len(cells_seen) == 2 * 2 * 2 * 2 and len({str(cell) for cell in cells_seen}) == 12  # "none" stands twice
    assert {(row["batch"], row["largest"]) for row in spoken["rows"]} == {(2, False), (3, True)}
    for row in spoken["rows"]:
        assert set(row) == KEYS
        assert (row["mode"], row["precision"], row["part"], row["rounds"]) == ("eager", "fp32", "forward", 2)


def test_json_agrees_with_itself(spoken: dict[str, Any]) -> None:
    for row in spoken["rows"]:
        for side in ("baseline", "subject"):
            assert 0 < row[f"{side}_ms"] <= row[f"{side}_p95_ms"]
            per_second = row["batch"] / row[f"{side}_ms"] * 1e3
            assert row[f"{side}_pairs_per_second"] == pytest.approx(per_second)
            assert row[f"{side}_peak_mib"] > 0
        assert row["ratio_low"] <= row["measured_ratio"] <= row["ratio_high"]
        assert row["exact_ratio"] == pytest.approx(row["baseline_gflops"] / row["subject_gflops"])
        assert row["subject_peak_mib"] <= row["baseline_peak_mib"] * (1 + 1e-6)
        if row["method"] == "none":
            assert row["exact_ratio"] == 1 and row["locations"] == row["tokens"] == []


@torch.no_grad()
def test_tokens_and_operations_are_those_of_the_running_model(spoken: dict[str, Any]) -> None:
    running, ids = random_model("small"), torch.randint(1, 900, (1, 7))
    for row in (row for row in spoken["rows"] if row["method"] == "text"):
        selection = SelectionConfig(layers=row["locations"], keep_rate=row["keep_rates"])
        output = running(ids, None, torch.randn(1, 3, row["px"], row["px"]), selection=selection)
        assert row["image_tokens"] == (row["px"] // 16) ** 2
        assert [place["layer"] for place in row["tokens"]] == row["locations"]
        assert [place["entered"] for place in row["tokens"]] == [each.candidates.shape[1] for each in output.selections]
        assert [place["kept"] for place in row["tokens"]] == [each.kept.shape[1] for each in output.selections]
        assert row["tokens"][-1]["left"] == output.image_states.shape[1] - 1
        grid = (row["px"] // 16,) * 2
        expected = count_flops(running.config, grid, 7, SelectionConfig(guide="none")).total
        assert row["baseline_gflops"] == pytest.approx(expected)
        assert row["subject_gflops"] == pytest.approx(count_flops(running.config, grid, 7, selection).total)


def test_benchmark_of_a_model_that_someone_trains() -> None:
    model = tiny_vqa_model().train()
    report = trips.benchmark(model, batch_sizes=(1, 2), text_length=LENGTH, rounds=2)
    assert isinstance(report, SpeedReport) and [row.batch for row in report.rows] == [1, 2]
    assert model.training and model.trips.vision.training
    row = report.rows[0]
    assert (row.px, row.method, row.locations, row.keep_rates) == (32, "text", (2, 3), (0.5, 0.5))
    table = report.table()
    assert report.baseline == "no selection" and "base is no selection" in table
    assert "[2,3] x 0.5" in table and "16 patches; layer 2: 16 in, 8 kept + 1 fused; layer 3: 9 in, 5 kept + 1" in table
    wrapped = SimpleNamespace(model=model)  # as a pipeline holds it
    other = trips.benchmark(wrapped, BASE.replace(keep_rate=0.25), (1,), text_length=LENGTH, rounds=1, part="vision")
    assert other.rows[0].exact_ratio < 1 < row.exact_ratio  # the baseline keeps less here
    assert other.baseline == "TripsModel, text [2,3] x 0.25,0.25" and f"base is {other.baseline}" in other.table()
    bigger = randomise(TripsModel(tiny_config(num_layers=8, guide="none")))
    report = trips.benchmark(model, bigger, (1,), text_length=LENGTH, rounds=1)
    assert report.rows[0].exact_ratio > 1.3 and report.baseline == "TripsModel without selection"


def test_a_baseline_that_takes_other_inputs_is_refused(model: TripsModel) -> None:
    config = tiny_config()
    config.text_config.vocab_size += 1
    with pytest.raises(ConfigError, match="baseline: text_config.vocab_size"):
        trips.benchmark(model, TripsModel(config), (1,), text_length=LENGTH)
    with pytest.raises(ConfigError, match="baseline: dtype.*bfloat16.*float32"):
        trips.benchmark(model, TripsModel(tiny_config()).bfloat16(), (1,), text_length=LENGTH)


def test_the_device_that_is_named_is_the_one_that_computed(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert describe_environment()["device"] == "GPU None"
    assert describe_environment(torch.device("cuda", 1))["device"] == "GPU cuda:1"
    assert "GPU" not in describe_environment(torch.device("cpu"))["device"]
    report = measure_speed(
        randomise(TripsModel(tiny_config())),
        SpeedPlan((BASE,), (SIZE,), batch_sizes=(1,), text_length=LENGTH, rounds=1),
    )
    assert "GPU" not in report.environment["device"]


def test_other_models_stand_beside() -> None:
    small = random_model("small")
    plan = SpeedPlan(
        (SelectionConfig(layers=(4, 8), keep_rate=0.5),),
        (64,),
        ("downscale",),
        ("transformers", "vilt", "blip"),
        (2,),
        rounds=1,
        text_length=LENGTH,
    )
    scaled, same, vilt, blip = measure_speed(small, plan).rows
    assert [row.method for row in (scaled, same, vilt, blip)] == ["downscale", "transformers", "vilt", "blip"]
    assert same.exact_ratio == pytest.approx(1) and same.image_tokens == 16 and same.tokens == ()
    assert scaled.scale == 0.75 and scaled.image_tokens == 9  # 9.9 in the average layer
    assert vilt.image_tokens == 4 and blip.image_tokens == 16  # published patches are 32 and 16 pixels
    assert vilt.exact_ratio > blip.exact_ratio > 0
    assert all(row.locations == row.keep_rates == () and row.subject_peak_mib > 0 for row in (same, vilt, blip))


def test_a_single_stream_model_is_timed_too() -> None:
    single = randomise(build_encoder(tiny_config(architecture="single")))
    report = trips.benchmark(single, batch_sizes=(1,), text_length=LENGTH, rounds=1)
    expected = count_flops(single.config, (4, 4), LENGTH).total
    assert report.rows[0].subject_gflops == pytest.approx(expected) and report.rows[0].exact_ratio > 1
    with pytest.raises(UnsupportedModelError, match="no vision encoder"):
        trips.benchmark(single, batch_sizes=(1,), text_length=LENGTH, rounds=1, part="vision")


def test_training_counts_three_times_and_shares_one_optimizer(model: TripsModel) -> None:
    plan = SpeedPlan((BASE,), (SIZE,), batch_sizes=(2,), part="train", text_length=LENGTH, rounds=1)
    (row,) = measure_speed(model, plan).rows
    once = count_flops(model.config, (6, 6), LENGTH, BASE).total
    assert row.subject_gflops == pytest.approx(3 * once) and not model.training
    assert row.subject_peak_mib < row.baseline_peak_mib  # what is kept for the backward pass


def test_equal_time_finds_the_setting_on_the_measured_clock(model: TripsModel, monkeypatch) -> None:
    """A clock by which a call takes its tokens, and the image's guide twice that."""

    def interleave(subjects: dict[str, Any], rounds: int, **options: Any) -> dict[str, Timing]:
        return {name: Timing((subject,) * rounds) for name, subject in subjects.items()}

    def fake(self: Bench, size: int, mode: str, batch: int, variants: list[Variant]) -> dict[str, float]:
        return {
            str(number): variant.method.tokens(model.config, size, variant.base)[-1].left
            * (2 if variant.method.name == "image" else 1)
            for number, variant in enumerate(variants)
        }

    monkeypatch.setattr(measurement, "interleave", interleave)
    monkeypatch.setattr(Bench, "subjects", fake)
    plan = SpeedPlan((SelectionConfig(layers=(2,), keep_rate=0.8),), (80,), ("text", "image", "random"))
    found = Bench(model, plan).at_equal_time(80, 1)
    # of 100 patches 80 + 1 stay; the image's guide affords 40 + 1 at twice the time, the random one as many
    assert [(each.method.name, each.base.keep_rate, each.equal) for each in found] == [
        ("text", 0.8, "time"),
        ("image", 0.4, "time"),
        ("random", 0.8, "time"),
    ]


def test_a_row_says_what_the_clock_said(model: TripsModel, monkeypatch) -> None:
    def interleave(subjects: dict[str, Any], rounds: int, **options: Any) -> dict[str, Timing]:
        return {name: Timing((0.4 / 4 ** int(name),) * (rounds - 1) + (0.8 / 4 ** int(name),)) for name in subjects}

    monkeypatch.setattr(measurement, "interleave", interleave)
    plan = SpeedPlan((BASE,), (SIZE,), ("text", "image"), batch_sizes=(2,), part="vision", text_length=LENGTH)
    for number, row in enumerate(measure_speed(model, plan).rows, start=1):
        times = (row.baseline_ms, row.subject_ms, row.baseline_p95_ms, row.subject_p95_ms)
        assert times == pytest.approx((400, 400 / 4**number, 720, 720 / 4**number))
        assert (row.ratio_low, row.measured_ratio, row.ratio_high) == pytest.approx((4**number,) * 3)
        assert row.baseline_pairs_per_second == pytest.approx(5)
        assert row.subject_pairs_per_second == pytest.approx(5 * 4**number)
        expected = METHODS[row.method].count(model.config, SIZE, LENGTH, BASE).vision
        assert row.subject_gflops == pytest.approx(expected) and row.part == "vision"


def test_largest_batch_counts_all_subjects(model: TripsModel, monkeypatch) -> None:
    held = []

    def fake(self: Bench, size: int, mode: str, batch: int, variants: list[Variant]) -> dict[str, Any]:
        held.append(len(variants))
        return {"0": lambda number: torch.zeros(batch, 250_000), "1": lambda number: torch.zeros(batch, 500_000)}

    monkeypatch.setattr(Bench, "subjects", fake)
    monkeypatch.setattr("trips.bench.memory.free_bytes", lambda: int(10.1e6 / 0.8))
    bench = Bench(model, SpeedPlan((BASE,), max_batch=64))
    assert bench.largest(SIZE, "eager", [Variant(model, METHODS["text"], BASE)]) == 5  # of 2 MB
    assert set(held) == {2}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"batch_sizes": ("all",)}, "batch_sizes"),
        ({"methods": ("luck",)}, "methods"),
        ({"peers": ("vilt",), "part": "train"}, "part"),
        ({"peers": ("magic",)}, "peers.*transformers"),
        ({"equal_time": True}, "equal_time.*no other method"),
        ({"methods": ("text", "none"), "equal_time": True}, "equal_time.*no other method"),
        ({"text_length": 0}, "text_length"),
        ({"max_batch": 0}, "max_batch"),
    ],
)
def test_plans_that_cannot_be(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SpeedPlan((BASE,), **options)


def test_models_and_precisions_that_cannot_be(model: TripsModel) -> None:
    with pytest.raises(UnsupportedModelError, match="pairs of one image"):
        pair_model(tiny_reasoning_model())
    with pytest.raises(UnsupportedModelError, match="not a model of trips"):
        pair_model(torch.nn.Linear(2, 2))
    for precision, part in (("fp16", "forward"), ("fp16", "train")):
        with pytest.raises(ConfigError, match="float16"):
            check_precision(precision, part, torch.device("cpu"))
    with pytest.raises(ConfigError, match="unknown precision.*float64"):
        trips.benchmark(randomise(TripsModel(tiny_config())).double(), text_length=LENGTH)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA graphs"):
            build_subject(model, BASE, given_inputs(1), mode="graphs")


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_replay_on_new_inputs() -> None:
    model = random_model("small").cuda()
    inputs = make_inputs(model, 96, 2, LENGTH)
    run = build_subject(model, SelectionConfig(), inputs, mode="graphs")
    for number, given in enumerate(inputs):
        expected = model(given.input_ids, None, given.pixel_values, selection=SelectionConfig()).last_hidden_state
        torch.testing.assert_close(run(number), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--settings", "5,10"], ["settings", "5,10x0.7"]),
        (["--settings", "5,10x0.7", "--layers", "4"], ["settings", "in place of"]),
        (["--layers", "13"], ["13", "1 to 12"]),
        (["--keep_rate", "1.5"], ["keep_rate", "1.5"]),
        (["--batch_sizes", "many"], ["batch_sizes", "many"]),
        (["--methods", "luck"], ["methods", "luck"]),
        (["--part", "decoder"], ["part", "decoder"]),
        (["--model", "/no/such/run"], ["/no/such/run"]),
        (["--rounds", "0"], ["rounds"]),
        (["--plot", "/no/such/folder/speed.png"], ["plot", "/no/such/folder"]),
        (["--plot", "speed.xyz"], ["plot", "xyz", "png"]),
        (["--peers", "magic"], ["peers", "magic"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--max_batch", "0"], ["max_batch", "0"]),
        (["--text_length", "0"], ["text_length", "0"]),
        (["--equal_time"], ["equal_time", "random"]),
    ],
)
def test_mistakes_are_one_line(options: list[str], parts: list[str], capsys) -> None:
    assert cli.main(["speed", "--config", "small", "--text_length", "6", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("trips: ") and all(part in lines[-1] for part in parts)
