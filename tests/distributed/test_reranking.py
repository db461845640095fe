"""Two processes that share an evaluation of retrieval find what one finds, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.reranking_runs import ranked


@pytest.mark.parametrize("memory", ["enough", "little"])
def test_two_processes_find_what_one_finds(two_processes: Path, memory: str) -> None:
    folder, name = two_processes / "reranked", "" if memory == "enough" else "-little"
    expected = ranked(**({} if memory == "enough" else {"memory_gb": 1e-5}))
    assert expected["bad"] == ["cut 3", "cut 12"] and expected["found"]["num_images"] == 11
    files = [f"0{name}.pt", f"1{name}.pt", *(["alone.pt"] if memory == "enough" else [])]
    for file in files:
        told = torch.load(folder / file)
        assert told["found"] == expected["found"] and told["bad"] == expected["bad"], file
        assert len(told["scores"]) == 4
        for scores, of_one in zip(told["scores"], expected["scores"], strict=True):
            if memory == "enough":
                assert torch.equal(scores, of_one), file
            else:  # blocks of images are then smaller over two processes, so that both have work
                torch.testing.assert_close(scores, of_one, rtol=0, atol=1e-6)
