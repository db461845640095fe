"""Files as they lie about: compiled, quantised, sharded, pickled beside a configuration, and odd arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import checkpoint_layouts as layouts
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_bert_config
from torch import Tensor
from transformers import BertForMaskedLM

from trips.errors import CheckpointError, ConfigError
from trips.importers import import_checkpoint, load_text_tower, load_vision_tower, read_tensors


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def same(model: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix) -> None:
    save_file({f"{prefix}a": torch.ones(2), f"{prefix}b.module.c": torch.ones(1)}, tmp_path / "a.safetensors")
    assert set(read_tensors(tmp_path / "a.safetensors").tensors) == {"a", "b.module.c"}


def test_integers_are_no_weights(tmp_path) -> None:
    tensors = layouts.timm(randomise(layouts.tower("vit")))
    name = "blocks.1.attn.qkv.weight"
    path = written({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: holds no floating-point numbers.*int8"):
        load_vision_tower(path)


@pytest.mark.parametrize("form", ["file", "plain file", "folder"])
def test_nor_are_they_in_a_bert(tmp_path, form) -> None:
    """Whoever reads it: of old files only the position ids are integers."""
    name = "bert.encoder.layer.1.output.dense.weight"
    model = randomise(BertForMaskedLM(tiny_bert_config(128, num_layers=2, num_attention_heads=2)))
    ids = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    good = {**layouts.on_disk(model), **ids}
    if form == "plain file":
        good = {key.removeprefix("bert."): value for key, value in good.items() if key.startswith("bert.")}
        name = name.removeprefix("bert.")
    model.config.save_pretrained(tmp_path)
    path = written(good, tmp_path / "model.safetensors")
    source = tmp_path if form == "folder" else path
    load_text_tower(source)
    written({**good, name: good[name].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name}: holds no floating-point numbers.*(int8|I8)"):
        load_text_tower(source)


def test_shards_of_transformers(tmp_path) -> None:
    model = randomise(layouts.tower("vit"))
    model.save_pretrained(tmp_path / "vit", max_shard_size="200KB")
    shards = sorted((tmp_path / "vit").glob("*.safetensors"))
    assert len(shards) > 1
    import_checkpoint(tmp_path / "vit", tmp_path / "out")
    assert same(model, load_vision_tower(tmp_path / "out"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        import_checkpoint(tmp_path / "vit", tmp_path / "again")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("this-ran",))


def test_a_pickle_beside_a_configuration_is_only_converted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, folder = randomise(layouts.tower("vit")), tmp_path / "vit"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: value + 1 for name, value in tensors.items()}, folder / "pytorch_model.bin")
    assert same(model, load_vision_tower(folder))  # safetensors, where both lie
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: is a pickle.*trips import vit FOLDER"):
        load_vision_tower(folder)
    import_checkpoint(folder, tmp_path / "out")
    assert same(model, load_vision_tower(tmp_path / "out"))
    torch.save({**tensors, "more": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="may run code when read.*nothing of it was run") as caught:
        import_checkpoint(folder, tmp_path / "again")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "this-ran").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": "x"}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 7}, "image_size: no patch fits"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": "x"}, "num_heads"),
        ({"num_heads": 3}, "num_heads: width is no multiple"),
    ],
)
def test_odd_arguments(tmp_path, arguments, words) -> None:
    path = written(layouts.timm(randomise(layouts.tower("vit"))), tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=words):
        import_checkpoint(path, tmp_path / "out", **arguments)
    with pytest.raises(ConfigError, match="vit.safetensors.*folder|lies below a file"):
        import_checkpoint(path, path / "out")
    assert not (tmp_path / "out").exists()
