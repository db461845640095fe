"""trips import: what it writes opens again, what it says is true, and a mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

import albef_checkpoints as albef
import checkpoint_layouts as layouts
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import images, randomise, texts, tiny_bert_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertForMaskedLM, BertModel, BlipConfig, PreTrainedTokenizerFast

from trips import cli
from trips.config import SelectionConfig
from trips.errors import CheckpointError, ConfigError, UnsupportedModelError
from trips.importers import import_checkpoint, load_text_tower, load_vision_tower
from trips.processor import CLIP_MEAN, IMAGENET_MEAN, TripsProcessor
from trips.saved import open_saved
from trips.tasks.retrieval import TripsForImageTextRetrieval


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer's folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *"abcdefgh", "bus", "red"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def bert(folder: Path) -> Path:
    config = tiny_bert_config(128, num_layers=3, num_attention_heads=2)
    randomise(BertForMaskedLM(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["pretraining", "retrieval", "vqa", "nlvr"])
def test_albef_through_the_command_line(tmp_path, words, kind, capsys) -> None:
    tensors = albef.checkpoint(kind)
    source, out = tmp_path / "albef.pth", tmp_path / "out"
    torch.save(albef.wrapped(tensors), source)
    argv = ["import", str(source), str(out), "--tokenizer", str(words), "--layers", "[2,3]", "--keep_rate=0.5"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    saved = open_saved(out, "cpu")
    assert type(saved.model).__name__ == told["model"] and told["processor"] and told["pixels"] == "clip"
    assert told["kind"] == {"pretraining": "albef"}.get(kind, f"albef_{kind}")
    assert not told["report"]["initialised"] and "file: optimizer" in told["report"]["ignored"]
    assert saved.model.config.selection.layers == (2, 3) and saved.model.config.selection.keep_rate == 0.5
    assert saved.processor.image_size == (32, 32) and tuple(saved.processor.image_mean) == CLIP_MEAN
    assert not saved.processor.add_sep and saved.model.config.decoder_config.eos_token_id == 3
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors", ".md"}
    ids, mask = texts(2)
    with torch.no_grad():
        text = saved.model.trips.encode_text(ids, mask)
    expected = albef.text_states(tensors, ids, mask)
    assert float(((text - expected) * mask[..., None]).abs().max()) < 1e-5
    # twice into one folder is a mistake
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is in use" in err


def test_the_table_names_what_is_not_loaded(tmp_path, capsys) -> None:
    save_file(layouts.timm(layouts.tower("vit")) | {"head.weight": torch.ones(3, 128)}, tmp_path / "deit.safetensors")
    assert cli.main(["import", str(tmp_path / "deit.safetensors"), str(tmp_path / "out"), "--image_size=64"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    for part in ("ViTModel", "vision: head.weight", "embeddings.position_embeddings", "53 tensors", "imagenet"):
        assert part in table


def test_a_tower_becomes_a_folder_for_recipes(tmp_path, words) -> None:
    """Pickled CLIP in OpenAI's names -> safetensors that load as before, with the mean that CLIP was trained with."""
    model = randomise(layouts.tower("clip"))
    source, out = tmp_path / "clip.pt", tmp_path / "clip"
    torch.save({f"visual.{name}": value for name, value in layouts.openai(model).items()}, source)
    with pytest.raises(ConfigError, match="activation"):
        import_checkpoint(source, out)
    assert not out.exists()
    result = import_checkpoint(source, out, activation="quick_gelu", kind="clip")
    assert (result.model, result.processor, result.pixels) == ("CLIPVisionModel", False, "clip")
    tower = load_vision_tower(out)
    with torch.no_grad():
        assert torch.equal(tower(images()).last_hidden_state, model(images()).last_hidden_state)
    assert sorted(result.report.loaded) == sorted(tower.state_dict())
    # a recipe reads mean and patch size from the folder
    processor = TripsProcessor.for_vision_tower(out, AutoTokenizer.from_pretrained(words), 32)
    assert tuple(processor.image_mean) == CLIP_MEAN and processor.patch_size == 8


def test_vision_and_text_become_a_model(tmp_path, words) -> None:
    vision = tmp_path / "dinov2.pth"
    torch.save(layouts.timm(randomise(layouts.tower("dinov2"))), vision)
    text = bert(tmp_path / "bert")
    for file in words.iterdir():
        (text / file.name).write_bytes(file.read_bytes())
    result = import_checkpoint(
        vision, tmp_path / "out", text=text, task="retrieval", num_text_layers=2, num_fusion_layers=1,
        selection=SelectionConfig(layers=(2,), keep_rate=0.5),
    )  # fmt: skip
    saved = open_saved(tmp_path / "out", "cpu")
    assert isinstance(saved.model, TripsForImageTextRetrieval) and result.kind == "dinov2"
    assert tuple(saved.processor.image_mean) == IMAGENET_MEAN
    assert torch.equal(
        saved.model.trips.text.encoder.layer[1].output.dense.weight,
        load_file(text / "model.safetensors")["bert.encoder.layer.1.output.dense.weight"],
    )
    assert {name.split(".")[0] for name in result.report.initialised} <= {
        "image_projection", "text_projection", "itm_head", "temperature", "queue", "momentum"}  # fmt: skip


def test_a_text_tower_becomes_a_folder(tmp_path, words) -> None:
    model = randomise(BertModel(tiny_bert_config(128, num_layers=3, num_attention_heads=2), add_pooling_layer=False))
    torch.save(model.state_dict(), tmp_path / "bert.bin")
    result = import_checkpoint(tmp_path / "bert.bin", tmp_path / "out", tokenizer=words)
    assert (result.kind, result.model, result.pixels) == ("bert", "BertModel", "")
    ids, mask = texts(2)
    with torch.no_grad():
        ours = load_text_tower(tmp_path / "out")(ids, mask).last_hidden_state
        assert torch.equal(ours, model(ids, mask).last_hidden_state)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_mistakes(tmp_path, words) -> None:
    clip = tmp_path / "clip.safetensors"
    save_file(layouts.timm(layouts.tower("vit")), clip)
    other = tmp_path / "other.safetensors"
    save_file({"x.weight": torch.ones(2)}, other)
    BlipConfig().save_pretrained(tmp_path / "blip")
    whole = tmp_path / "albef.safetensors"
    save_file({name: value.clone() for name, value in albef.checkpoint("vqa").items()}, whole)
    for arguments, kind, message in (
        ({"source": clip, "kind": "clip"}, CheckpointError, "of another kind.*'vit'"),
        ({"source": whole, "kind": "albef"}, CheckpointError, "of another kind.*'albef_vqa'"),
        ({"source": other}, CheckpointError, "no model that trips knows.*x.weight"),
        ({"source": tmp_path / "blip"}, UnsupportedModelError, "blip.*trips.accelerate"),
        ({"source": tmp_path / "none.pth"}, CheckpointError, "none.pth"),
        ({"source": whole, "text": "bert"}, ConfigError, "vision tower alone"),
        ({"source": clip, "image_size": 4}, ConfigError, "no patch fits"),
        ({"source": whole, "tokenizer": tmp_path / "blip"}, CheckpointError, "holds no tokenizer"),
        ({"source": whole}, ConfigError, "selection.layers"),
    ):
        with pytest.raises(kind, match=message):
            import_checkpoint(out=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
