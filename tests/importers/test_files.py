"""Files that are not what they seem: each is refused by name, and nothing in it runs."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch.nn import functional as F

from trips.errors import CheckpointError, ShapeError
from trips.importers import read_tensors, resize_positions

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


class Payload:
    """Unpickled without care, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "this ran"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_with_a_payload_runs_nothing(tmp_path, suffix, old) -> None:
    trap = tmp_path / "trap.txt"
    # The trap works: this is what a careless reader does.
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.read_text() == "this ran"
    trap.unlink()
    path = tmp_path / f"model{suffix}"
    torch.save({"model": TENSORS, "config": Payload(trap)}, path, _use_new_zipfile_serialization=not old)
    for pickled in (True, False):
        with pytest.raises(CheckpointError, match="trips import" if not pickled else "nothing of it was run") as caught:
            read_tensors(path, pickled=pickled)
        assert str(path) in str(caught.value)
    path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(CheckpointError):
        read_tensors(path, pickled=True)
    assert not trap.exists()


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
def test_weights_are_found_where_scripts_keep_them(tmp_path, wrapper) -> None:
    content: dict[str, Any] = {f"module.{name}": value for name, value in TENSORS.items()}
    if wrapper:
        content = {wrapper: content, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "model.pth")
    file = read_tensors(tmp_path / "model.pth", pickled=True)
    assert {name: value.tolist() for name, value in file.tensors.items()} == {
        name: value.tolist() for name, value in TENSORS.items()
    }
    assert file.others == (["args", "epoch", "optimizer"] if wrapper else [])
    assert all(value.dtype == torch.float32 for value in file.tensors.values())


def test_other_files_are_named(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    torch.save(TENSORS, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.txt", "no photo")
    pickled, zipped = (tmp_path / "good.pth").read_bytes(), (tmp_path / "photos.zip").read_bytes()
    page = b"<!DOCTYPE html><html><body>404</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    for content, looks in (
        (b"", "empty"), (page, "web page"), (pointer, "Git LFS"), (b"hello, world", "text"), (zipped, "zip"),
        (pickled, "zip"), (good[:4], "4 bytes"), (good[:-3], "bytes"), (good[:40], "40 bytes"), (b"\x1f\x8b12", "gzip"),
    ):  # fmt: skip
        path = tmp_path / "bad.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_tensors(path)
        assert looks in str(caught.value) and str(path) in str(caught.value)
    for content in (b"", page, pointer, b"hello, world", zipped, good, pickled[:50], pickled[: len(pickled) // 2]):
        path = tmp_path / "bad.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path, pickled=True)
        assert str(path) in str(caught.value)
    for value in ([1, 2], {"epoch": 3}, {"model": {"epoch": 3}}, torch.ones(2)):
        torch.save(value, tmp_path / "none.pth")
        with pytest.raises(CheckpointError, match="no named tensors"):
            read_tensors(tmp_path / "none.pth", pickled=True)
    for name, message in (("none.safetensors", "no such file"), ("photos.zip", "not a file of weights")):
        with pytest.raises(CheckpointError, match=message):
            read_tensors(tmp_path / name)


def test_a_torchscript_program_is_refused(tmp_path) -> None:
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript program.*openai/clip"):
        read_tensors(path, pickled=True)


SIDES = st.integers(1, 6)


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(0, 2), st.booleans(), st.data())
def test_positions_on_any_grid(grid, wanted, before, batched, data) -> None:
    """Entries before the patches stay; a plane stays a plane where bicubic weights are whole; otherwise as torch."""
    rows = before + grid[0] * grid[1]
    table = torch.from_numpy(data.draw(arrays.arrays("float32", (rows, 3), elements=st.floats(-1, 1, width=32))))
    resized = resize_positions(table[None] if batched else table, grid, wanted)
    assert resized.shape == ((1,) if batched else ()) + (before + wanted[0] * wanted[1], 3)
    resized = resized.reshape(-1, 3)
    assert torch.equal(resized[:before], table[:before])
    if grid == wanted:
        assert torch.equal(resized, table)
    for channel in range(3):  # one channel at a time, as an image
        image = table[before:, channel].reshape(1, 1, *grid)
        expected = F.interpolate(image, wanted, mode="bicubic", align_corners=False).flatten()
        assert torch.allclose(resized[before:, channel], expected, atol=1e-6)
    constant = resize_positions(torch.full((rows, 2), 0.5), grid, wanted)
    assert torch.allclose(constant, torch.full_like(constant, 0.5), atol=1e-6)


def test_rows_and_columns_are_not_swapped() -> None:
    """A table that rises down the image still rises down it, on a rectangle."""
    down = torch.arange(4.0)[:, None].expand(4, 3).reshape(12, 1)
    resized = resize_positions(down, (4, 3), (8, 5)).reshape(8, 5)
    assert bool((resized.diff(dim=0) > 0).all()) and float(resized.diff(dim=1).abs().max()) < 1e-6


def test_tables_that_do_not_fit() -> None:
    for table, grid, wanted in ((torch.ones(3, 2), (2, 2), (2, 2)), (torch.ones(2, 5, 2), (2, 2), (3, 3)),
                                (torch.ones(4), (2, 2), (3, 3)), (torch.ones(5, 2), (2, 2), (0, 3))):  # fmt: skip
        with pytest.raises(ShapeError, match="resize_positions"):
            resize_positions(table, grid, wanted)
