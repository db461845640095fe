"""Pictures that the page offers to begin with: scenes of the embedded corpus, with questions or captions."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trips.data.scene_batches import TEST_START
from trips.data.scenes import SceneCorpus

_TYPES = ("object", "background", "existence", "relation")


def write_examples(folder: str | Path, *, questions: bool, count: int = 6) -> list[tuple[str, str]]:
    """Draw scenes that no training has seen.

    Args:
        folder: where the pictures go, as PNG files.
        questions: texts are questions; otherwise captions.
        count: of scenes.
    Returns:
        path and text of each.
    """
    corpus, found = SceneCorpus(), []
    for i in range(count):
        scene = corpus.scene(TEST_START + i)
        path = Path(folder) / f"scene_{i + 1}.png"
        Image.fromarray(scene.image).save(path)
        text = corpus.questions(scene, 1, (_TYPES[i % len(_TYPES)],))[0] if questions else corpus.caption(scene)
        found.append((str(path), text.text))
    return found
