"""Every naming scheme gives the tower that transformers computes, and what a tensor does not tell is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint_forwards as forwards
import checkpoint_layouts as layouts
import pytest
import torch
from safetensors.torch import save_file
from tiny import images, randomise, texts, tiny_bert_config
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertModel, DeiTConfig, DeiTModel, PreTrainedModel

from trips.config import SelectionConfig, TripsConfig
from trips.errors import CheckpointError, ConfigError, UnsupportedModelError
from trips.importers import ImportReport, build_model_from_towers, load_text_tower, load_vision_tower
from trips.tasks.pretraining import TripsForPreTraining

PIXELS = 0.1 * images(2)  # states of ordinary size: float32 then tells 1e-5 apart


def written(tensors: dict[str, Tensor], path: Path, name: str = "tower.safetensors") -> Path:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path / name)
    return path / name


def states(model: PreTrainedModel, pixels: Tensor = PIXELS) -> list[Tensor]:
    """Embeddings, every layer, and the normed states, as transformers computes them."""
    with torch.no_grad():
        output = model.eval()(pixels, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs) == layouts.LAYERS + 2
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-5


CLIP_TEXT = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "positional_embedding": torch.ones(2, 4),
             "token_embedding.weight": torch.ones(3, 4), "ln_final.bias": torch.ones(4),
             "text_projection": torch.ones(4, 4), "logit_scale": torch.ones(())}  # fmt: skip


@pytest.mark.parametrize("scheme", ["transformers", "full", "openai", "openai-bare", "trunk", "timm"])
def test_clip_in_every_scheme(tmp_path, scheme) -> None:
    model = randomise(layouts.tower("clip"))
    tensors, ignored = layouts.on_disk(model), set()
    if scheme == "full":
        tensors = {f"vision_model.{name}": value for name, value in tensors.items()}
        tensors["visual_projection.weight"] = torch.ones(4, layouts.WIDTH)
        ignored = {"visual_projection.weight"}
    elif scheme.startswith("openai"):
        tensors = layouts.openai(model)
        tensors["proj"] = torch.ones(layouts.WIDTH, 4)
        ignored = {"proj"}
        if scheme == "openai":
            tensors = {f"visual.{name}": value for name, value in tensors.items()} | CLIP_TEXT
            ignored = {"visual.proj", *CLIP_TEXT}
    elif scheme in ("trunk", "timm"):
        tensors = layouts.timm(model)
        if scheme == "trunk":
            tensors = {f"visual.trunk.{name}": value for name, value in tensors.items()}
            tensors |= {"visual.head.proj.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
            ignored = {"visual.head.proj.weight", "logit_scale"}
    report = ImportReport()
    loaded = load_vision_tower(written(tensors, tmp_path), report, activation="quick_gelu")
    assert loaded.config.model_type == "clip_vision_model" and same(states(loaded), states(model))
    assert set(report.ignored) == {f"vision: {name}" for name in ignored} and len(report.ignored) == len(ignored)
    config = loaded.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 2)
    assert (config.intermediate_size, config.patch_size, config.image_size) == (192, 8, 32)


@pytest.mark.parametrize(("activation", "function"), [("quick_gelu", forwards.quick_gelu), ("gelu", F.gelu)])
def test_openai_names_against_a_forward_from_the_tensors(tmp_path, activation, function) -> None:
    tensors = layouts.openai(randomise(layouts.tower("clip"), seed=3))
    path = written({f"visual.{name}": value for name, value in tensors.items()}, tmp_path)
    loaded = load_vision_tower(path, activation=activation)
    *layers, last = states(loaded)  # transformers norms [CLS] alone, and only for its pooled output
    assert same([*layers, loaded.post_layernorm(last)], forwards.openai_clip(tensors, PIXELS, function))


@pytest.mark.parametrize(
    ("config", "expected"), [({"model_cfg": {"quick_gelu": True}}, "quick_gelu"), ({"model_cfg": {}}, None),
                             ({"model_cfg": {"vision_cfg": {"head_width": 32}}}, "gelu")]
)  # fmt: skip
def test_what_tensors_do_not_tell_stands_beside_them(tmp_path, config, expected) -> None:
    """The activation: an open_clip_config.json, OpenAI's own marks, or an argument; never a guess."""
    tensors = {f"visual.{name}": value for name, value in layouts.openai(randomise(layouts.tower("clip"))).items()}
    path = written(tensors, tmp_path)
    with pytest.raises(ConfigError, match="activation"):
        load_vision_tower(path)
    marked = written({**tensors, "input_resolution": torch.tensor(32)}, tmp_path, "marked.safetensors")
    assert load_vision_tower(marked).config.hidden_act == "quick_gelu"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if expected is None:  # an empty section tells nothing
        with pytest.raises(ConfigError, match="activation"):
            load_vision_tower(path)
        return
    loaded = load_vision_tower(path).config
    assert loaded.hidden_act == expected and loaded.num_attention_heads == (4 if expected == "gelu" else 2)


@pytest.mark.parametrize("scheme", ["transformers", "trunk"])
def test_siglip_loads_but_is_no_tower_of_the_model(tmp_path, scheme) -> None:
    model = randomise(layouts.tower("siglip"))
    tensors = layouts.on_disk(model)
    if scheme == "trunk":
        tensors = {f"visual.trunk.{name}": value for name, value in layouts.timm(model).items()}
        tensors["visual.trunk.attn_pool.latent"] = torch.ones(1, 1, 4)
    report = ImportReport()
    loaded = load_vision_tower(written(tensors, tmp_path), report)
    assert same(states(loaded), states(model))
    assert report.ignored and all("head." in name or "attn_pool" in name for name in report.ignored)
    with pytest.raises(UnsupportedModelError, match="no \\[CLS\\].*accelerate"):
        TripsForPreTraining(
            TripsConfig(
                vision_config=loaded.config,
                text_config=tiny_bert_config(128),
                selection=SelectionConfig(layers=(2,)),
            )
        )


def test_siglip_in_a_folder_of_transformers(tmp_path) -> None:
    model = randomise(layouts.tower("siglip"))
    model.save_pretrained(tmp_path)
    report = ImportReport()
    loaded = load_vision_tower(tmp_path, report)
    assert same(states(loaded), states(model)) and len(report.ignored) == 11 and not hasattr(loaded, "head")


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2-swiglu"])
@pytest.mark.parametrize("scheme", ["transformers", "timm", "trunk"])
def test_vit_and_dinov2_in_every_scheme(tmp_path, family, scheme) -> None:
    changes = {"use_swiglu_ffn": True, "mlp_ratio": 4} if family == "dinov2-swiglu" else {}
    if scheme == "transformers" and family == "vit":
        changes = {"layer_norm_eps": 1e-12}
    if changes.get("mlp_ratio"):
        from transformers import Dinov2Config, Dinov2Model

        shape = layouts.tower("dinov2").config.to_dict()
        model = randomise(Dinov2Model(Dinov2Config(**{**shape, **changes})))
    else:
        model = randomise(layouts.tower(family.split("-")[0], **changes))
    if scheme == "transformers":
        tensors = layouts.on_disk(model)
    else:
        tensors = layouts.timm(model)
        assert same(forwards.timm_vit(tensors, PIXELS), states(model))
    if scheme == "timm":
        tensors["head.weight"] = torch.ones(5, layouts.WIDTH)
    if scheme == "trunk":
        tensors = {f"visual.trunk.{name}": value for name, value in tensors.items()}
    report = ImportReport()
    loaded = load_vision_tower(written(tensors, tmp_path), report)
    assert loaded.config.model_type == family.split("-")[0] and same(states(loaded), states(model))
    assert report.ignored == (["vision: head.weight"] if scheme == "timm" else [])


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_a_distilled_deit_is_the_vit_without_its_second_token(tmp_path, form) -> None:
    model = randomise(layouts.tower("vit"))
    tensors = layouts.timm(model)
    if form == "timm":
        place = torch.full((1, 1, layouts.WIDTH), 7.0)
        distilled = {**tensors, "dist_token": place, "head_dist.weight": torch.ones(2, layouts.WIDTH)}
        distilled["pos_embed"] = torch.cat([tensors["pos_embed"][:, :1], place, tensors["pos_embed"][:, 1:]], 1)
        source = written(distilled, tmp_path)
        names = {"dist_token", "head_dist.weight", "pos_embed[1], the place of dist_token"}
    else:
        teacher = randomise(DeiTModel(DeiTConfig(**{**model.config.to_dict(), "model_type": "deit"})))
        teacher.save_pretrained(tmp_path)
        source = tmp_path
        tensors = layouts.on_disk(teacher)
        tensors.pop("embeddings.distillation_token")
        rows = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = torch.cat([rows[:, :1], rows[:, 2:]], 1)
        plain = layouts.tower("vit")
        missing, extra = plain.load_state_dict(type(plain).from_pretrained(
            None, config=plain.config, state_dict=tensors, add_pooling_layer=False).state_dict())  # fmt: skip
        assert not missing and not extra
        model = plain
        names = {"embeddings.distillation_token", "pooler.dense.weight", "pooler.dense.bias",
                 "embeddings.position_embeddings[1], the place of embeddings.distillation_token"}  # fmt: skip
    report = ImportReport()
    loaded = load_vision_tower(source, report)
    assert set(report.ignored) == {f"vision: {name}" for name in names}
    assert same(states(loaded), states(model))


def test_positions_of_patches_alone(tmp_path) -> None:
    """DeiT III: [CLS] has no place."""
    tensors = layouts.timm(randomise(layouts.tower("vit")))
    tensors["pos_embed"][:, 0] = 0
    bare = {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]}
    assert same(states(load_vision_tower(written(bare, tmp_path))), forwards.timm_vit(tensors, PIXELS))


@pytest.mark.parametrize("form", ["plain", "prefixed", "old names", "masked"])
def test_bert_from_its_tensors(tmp_path, form) -> None:
    model = randomise(BertForMaskedLM(tiny_bert_config(128, num_layers=3, num_attention_heads=2)))
    tensors = layouts.on_disk(model)
    tensors = {name: value for name, value in tensors.items() if form == "masked" or name.startswith("bert.")}
    if form == "plain":
        tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    if form == "old names":
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in tensors.items()
        }
    report = ImportReport()
    path = written(tensors, tmp_path)
    tower = load_text_tower(path, report).eval()
    ids, mask = texts(2)
    with torch.no_grad():
        theirs = model.bert.eval()(ids, mask, output_hidden_states=True).hidden_states
        ours = tower(ids, mask, output_hidden_states=True).hidden_states
    assert len(ours) == 4 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert bool(report.ignored) == (form == "masked")
    if form == "masked":  # a whole model of two files, its head for masked words the BERT's
        vision = written(layouts.timm(randomise(layouts.tower("vit"))), tmp_path, "vit.safetensors")
        whole, report = build_model_from_towers(
            vision, path, TripsForPreTraining, num_text_layers=2, num_fusion_layers=1, image_size=48,
            selection=SelectionConfig(layers=(2,)),
        )  # fmt: skip
        assert torch.equal(whole.mlm_head.transform.dense.weight, model.cls.predictions.transform.dense.weight)
        names = ("trips.vision.tower.", "momentum.trips.vision.tower.")
        assert report.resized == [f"{name}embeddings.position_embeddings" for name in names]
        assert sorted(report.loaded + report.resized + report.initialised) == sorted(whole.state_dict())


def test_bad_towers_name_the_key(tmp_path) -> None:
    tensors = layouts.timm(randomise(layouts.tower("vit")))
    block = "blocks.1."
    broken = {
        "unexpected keys.*adapter": {**tensors, "adapter.weight": torch.ones(2)},
        "unexpected keys.*norm_extra": {**tensors, "blocks.0.norm_extra.weight": torch.ones(2)},
        r"missing keys.*blocks\.1\.attn\.proj\.bias.*4 more": {
            n: v for n, v in tensors.items() if not n.startswith(block)},
        r"missing keys.*blocks\.2\.mlp\.fc2\.bias": {n: v for n, v in tensors.items() if n != "blocks.2.mlp.fc2.bias"},
        r"missing keys.*'norm\.bias', 'norm\.weight'": {n: v for n, v in tensors.items() if not n.startswith("norm.")},
        r"missing keys.*pos_embed": {n: v for n, v in tensors.items() if n != "pos_embed"},
        r"blocks\.1\.attn\.qkv\.weight.*another shape.*\(384, 64\)": {
            **tensors, block + "attn.qkv.weight": torch.ones(384, 64)},
        r"pos_embed.*square": {**tensors, "pos_embed": torch.ones(1, 14, 128)},
        "no vision tower that trips knows": {f"other.{n}": v for n, v in tensors.items()},
    }  # fmt: skip
    for number, (message, content) in enumerate(broken.items()):
        path = written(content, tmp_path, f"{number}.safetensors")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_vision_tower(path)
        assert str(path) in str(caught.value)
    without = written({n: v for n, v in tensors.items() if "layer.0" in n} | {"x": torch.ones(1)}, tmp_path)
    with pytest.raises(CheckpointError, match="not those of a BERT"):
        load_text_tower(without)
    bert = layouts.on_disk(randomise(BertModel(tiny_bert_config(128, num_layers=3), add_pooling_layer=False)))
    gap = {name: value for name, value in bert.items() if ".layer.1." not in name}
    with pytest.raises(CheckpointError, match=r"missing keys.*encoder\.layer\.1"):
        load_text_tower(written(gap, tmp_path))
    with pytest.raises(ConfigError, match="num_heads"):
        load_vision_tower(written(tensors, tmp_path, "heads.safetensors"), num_heads=3)


def test_a_folder_of_another_library(tmp_path) -> None:
    """timm's folders have a config.json too, but none that transformers reads; the tensors are enough."""
    model = randomise(layouts.tower("vit"))
    written(layouts.timm(model), tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch8_32"}')
    assert same(states(load_vision_tower(tmp_path)), states(model))
    written(layouts.timm(model), tmp_path, "second.safetensors")
    with pytest.raises(CheckpointError, match="several files.*second"):
        load_vision_tower(tmp_path)
