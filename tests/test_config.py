"""Configuration: the arithmetic of placements and counts, every bad value, saving and loading."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import layers_of
from reference import num_kept as slow_num_kept
from strategies import keep_rates, placements, selections
from tiny import images, tiny_bert_config, tiny_config, tiny_vision_config
from transformers import ResNetConfig, RobertaConfig

from trips.config import (
    PretrainingConfig,
    SelectionConfig,
    TripsConfig,
    bert_variant,
    check_locations,
    num_kept,
    selection_placement,
    token_counts,
)
from trips.errors import ConfigError
from trips.vision import VisionEncoder


@pytest.mark.parametrize(
    ("n", "rate", "k"),
    [(100, 0.55, 55), (576, 0.7, 404), (405, 0.7, 284), (196, 0.7, 138), (10, 0.1, 1), (3, 0.01, 1), (7, 1.0, 7)],
)
def test_num_kept_known_values(n: int, rate: float, k: int) -> None:
    assert num_kept(n, rate) == k


def test_float_product_would_be_wrong() -> None:
    assert math.ceil(0.55 * 100) == 56  # why num_kept is not one line


@given(n=st.integers(1, 3000), rate=keep_rates)
def test_num_kept_equals_decimal_and_fraction(n: int, rate: float) -> None:
    k = num_kept(n, rate)
    assert k == slow_num_kept(n, rate)
    exact = Fraction(repr(rate)) * n
    assert 1 <= k <= n and (k == 1 or k - 1 < exact <= k)


@given(n=st.integers(1, 3000), rate=st.floats(5e-324, 1e-4))
def test_num_kept_reads_exponents(n: int, rate: float) -> None:
    assert num_kept(n, rate) == slow_num_kept(n, rate) == 1


@given(layers=st.integers(1, 48), locations=st.integers(1, 6))
def test_placement_follows_the_formula(layers: int, locations: int) -> None:
    if layers % (locations + 1):
        with pytest.raises(ConfigError, match="num_locations"):
            selection_placement(layers, locations)
        return
    places = selection_placement(layers, locations)
    step = layers // (locations + 1)
    assert list(places) == [i * step + 1 for i in range(1, locations + 1)]
    assert places[-1] <= layers


def test_placement_of_the_paper() -> None:
    assert selection_placement(12, 2) == (5, 9)
    assert selection_placement(12, 3) == (4, 7, 10)


@pytest.mark.parametrize("locations", [0, -1, -5])
def test_placement_needs_a_location(locations: int) -> None:
    with pytest.raises(ConfigError, match="num_locations"):
        selection_placement(12, locations)


class Counter:
    """A running tower that notes how many tokens each attention and each FFN is given."""

    def __init__(self) -> None:
        self.encoder = VisionEncoder(tiny_vision_config("clip"), SelectionConfig(layers=())).eval()
        self.attention: list[int] = []
        self.ffn: list[int] = []
        for layer in layers_of(self.encoder.tower):
            layer.self_attn.register_forward_pre_hook(self._attention, with_kwargs=True)
            layer.mlp.register_forward_pre_hook(self._ffn)

    def _attention(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.attention.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    def _ffn(self, module: torch.nn.Module, args: tuple) -> None:
        self.ffn.append(args[0].shape[1])

    def counts(self, selection: SelectionConfig, height: int, width: int) -> list[tuple[int, int]]:
        self.attention.clear()
        self.ffn.clear()
        with torch.no_grad():
            self.encoder(images(1, height, width), torch.ones(1, 32), selection)
        return list(zip(self.attention, self.ffn, strict=True))


@pytest.fixture(scope="module")
def counter() -> Counter:
    return Counter()


@given(selection=selections(4, guides=("text", "image", "random", "none")), rows=st.integers(1, 5))
def test_token_counts_equal_those_of_a_running_model(counter: Counter, selection: SelectionConfig, rows: int) -> None:
    assert counter.counts(selection, 8 * rows, 24) == token_counts(3 * rows, 4, selection)


def test_token_counts_of_the_paper() -> None:
    counts = token_counts(576, 12, SelectionConfig(layers=(5, 10), keep_rate=0.7))
    assert counts == [(577, 577)] * 4 + [(577, 406)] + [(406, 406)] * 4 + [(406, 286)] + [(286, 286)] * 2


@given(layers=placements(12, min_size=0), beyond=st.integers(1, 11))
def test_location_beyond_the_last_layer(layers: tuple[int, ...], beyond: int) -> None:
    selection = SelectionConfig(layers=layers)
    if any(layer > beyond for layer in layers):
        with pytest.raises(ConfigError, match="selection.layers"):
            check_locations(selection, beyond)
        with pytest.raises(ConfigError, match="selection.layers"):
            token_counts(16, beyond, selection)
    else:
        check_locations(selection, beyond)
    check_locations(selection.replace(guide="none"), beyond)  # what does not select has no place to be wrong


BAD = [
    ("keep_rate", 0),
    ("keep_rate", 0.0),
    ("keep_rate", -0.1),
    ("keep_rate", 1.5),
    ("keep_rate", float("nan")),
    ("keep_rate", float("inf")),
    ("keep_rate", "0.7"),
    ("keep_rate", True),
    ("keep_rate", None),
    ("keep_rate", (0.7,)),
    ("keep_rate", (0.7, 0.7, 0.7)),
    ("keep_rate", (0.7, 0.0)),
    ("keep_rate", (0.7, "0.7")),
    ("layers", (0, 2)),
    ("layers", (-1,)),
    ("layers", (2, 2)),
    ("layers", (3, 2)),
    ("layers", (1.0,)),
    ("layers", (True,)),
    ("layers", "12"),
    ("layers", 5),
    ("layers", None),
    ("guide", "txt"),
    ("guide", None),
    ("guide", ["text"]),
    ("score", "hidden"),
    ("query_norm", True),
    ("heads", 4),
    ("inattentive", "merge"),
    ("learning", ""),
    ("width_map", "linear"),
    ("gate_temperature", 0.0),
    ("gate_temperature", float("nan")),
    ("gate_temperature", "1"),
    ("distill_weight", -1.0),
    ("distill_weight", True),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: repr(value))
def test_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"selection\.{field}"):
        SelectionConfig(**{"layers": (2, 3), "keep_rate": 0.5, field: value})
    with pytest.raises(ConfigError, match=rf"selection\.{field}"):
        SelectionConfig(layers=(2, 3), keep_rate=0.5).replace(**{field: value})


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"selection\.keeprate"):
        SelectionConfig.from_dict({"keeprate": 0.5})
    with pytest.raises(ConfigError, match=r"selection\.keeprate"):
        SelectionConfig().replace(keeprate=0.5)


@pytest.mark.parametrize("value", [3, "text", [1, 2]])
def test_selection_must_be_a_mapping(value: object) -> None:
    with pytest.raises(ConfigError, match="^selection"):
        TripsConfig(selection=value)


BAD_PRETRAINING = [
    ("projection_dim", 0),
    ("projection_dim", 8.0),
    ("projection_dim", None),
    ("queue_size", -1),
    ("queue_size", True),
    ("queue_size", 1e4),
    ("momentum", 1.1),
    ("momentum", -0.1),
    ("momentum", float("nan")),
    ("temperature", 0.0),
    ("temperature", 0.6),
    ("temperature", "0.07"),
    ("alpha", -0.1),
    ("alpha", 1.5),
    ("alpha", True),
    ("alpha_ramp_steps", -1),
    ("alpha_ramp_steps", 0.5),
    ("itc_guide", "caption"),
    ("itc_guide", None),
    ("itm_guide", "text"),
    ("mlm_guide", True),
    ("negatives", "all"),
    ("negatives", ["local"]),
]


@pytest.mark.parametrize(("field", "value"), BAD_PRETRAINING, ids=lambda value: repr(value))
def test_bad_value_of_pretraining_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"pretraining\.{field}"):
        PretrainingConfig(**{field: value})
    with pytest.raises(ConfigError, match=rf"pretraining\.{field}"):
        tiny_config().pretraining.replace(**{field: value})


def test_pretraining_is_a_section_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"pretraining\.queue"):
        TripsConfig(pretraining={"queue": 5})
    with pytest.raises(ConfigError, match="^pretraining"):
        TripsConfig(pretraining=[1])
    options = TripsConfig(pretraining={"queue_size": 0, "alpha": 0}).pretraining
    assert options == PretrainingConfig(queue_size=0, alpha=0.0) and not options.has_teacher
    assert options.replace(queue_size=1).has_teacher and options.replace(alpha=0.1).has_teacher
    hash(options)


@given(alpha=st.floats(0, 1), ramp=st.integers(0, 50), step=st.integers(0, 100))
def test_alpha_ramps_linearly(alpha: float, ramp: int, step: int) -> None:
    found = PretrainingConfig(alpha=alpha, alpha_ramp_steps=ramp).alpha_at(step)
    assert found == (alpha if step >= ramp else pytest.approx(alpha * step / ramp))


@given(selection=selections(12))
def test_selection_round_trip(selection: SelectionConfig) -> None:
    assert selection.replace() == selection
    assert len(selection.rates) == len(selection.layers) and selection.active
    assert not selection.replace(guide="none").active
    assert not selection.replace(layers=(), keep_rate=0.5).active
    hash(selection)  # a setting can be the key of a cache


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("vision_config", 3, "vision_config"),
        ("vision_config", {"hidden_size": 32}, "vision_config"),
        ("vision_config", {"model_type": "no_such_family"}, "vision_config"),
        ("vision_config", {"model_type": "vit", "hidden_size": "wide"}, "vision_config"),
        ("vision_config", ResNetConfig(), "vision_config"),
        ("text_config", RobertaConfig(), "text_config"),
        ("text_config", "bert", "text_config"),
        ("text_config", tiny_bert_config(48), "text_config.hidden_size"),
        ("fusion_encoder_config", tiny_bert_config(48), "fusion_encoder_config"),
        ("decoder_config", tiny_bert_config(48), "decoder_config"),
        ("selection", {"layers": [5]}, "selection.layers"),
        ("selection", {"guide": "words"}, "selection.guide"),
    ],
)
def test_bad_parts_of_a_model_configuration(name: str, value: object, match: str) -> None:
    parts = {
        "vision_config": tiny_vision_config(),
        "text_config": tiny_bert_config(),
        "selection": SelectionConfig(layers=(2,)),
    }
    with pytest.raises(ConfigError, match=match):
        TripsConfig(**{**parts, name: value})


def test_unlike_widths_pass_with_a_map() -> None:
    config = tiny_config(width=32, text_width=48, width_map="orthogonal")
    assert config.fusion_encoder_config.hidden_size == config.decoder_config.hidden_size == 48


def test_defaults_are_the_papers() -> None:
    config = TripsConfig()
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (12, 6)
    assert config.fusion_encoder_config.num_hidden_layers == 6
    assert config.fusion_encoder_config.is_decoder and config.fusion_encoder_config.add_cross_attention
    assert not config.text_config.is_decoder
    assert (config.selection.layers, config.selection.rates, config.selection.guide) == ((5, 10), (0.7, 0.7), "text")
    options = config.pretraining
    assert (options.queue_size, options.momentum, options.projection_dim) == (65536, 0.995, 256)
    assert (options.temperature, options.alpha) == (0.07, 0.4)
    assert (options.itc_guide, options.itm_guide, options.mlm_guide) == ("image", "anew", "masked")


@pytest.mark.parametrize("family", ["clip", "vit", "dinov2"])
def test_configuration_is_saved_and_loaded(tmp_path, family: str) -> None:
    config = tiny_config(family, keep_rate=(0.5, 0.55), inattentive="drop", learning="gate", gate_temperature=0.3)
    config.pretraining = PretrainingConfig(queue_size=12, alpha_ramp_steps=3, itc_guide="none", negatives="global")
    config.save_pretrained(tmp_path)
    loaded = TripsConfig.from_pretrained(tmp_path)
    assert loaded.selection == config.selection and loaded.pretraining == config.pretraining
    for name in ("vision_config", "text_config", "fusion_encoder_config", "decoder_config"):
        ours, theirs = getattr(config, name), getattr(loaded, name)
        assert type(ours) is type(theirs)
        drop = ("dtype", "_name_or_path", "architectures")  # written by saving itself
        assert {k: v for k, v in ours.to_dict().items() if k not in drop} == {
            k: v for k, v in theirs.to_dict().items() if k not in drop
        }


def test_bert_variant_changes_only_what_it_is_told() -> None:
    base = tiny_bert_config()
    changed = bert_variant(base, num_hidden_layers=5)
    assert changed.num_hidden_layers == 5 and base.num_hidden_layers == 2
    before, after = base.to_dict(), changed.to_dict()
    assert {key for key in before if before[key] != after[key]} == {"num_hidden_layers"}
