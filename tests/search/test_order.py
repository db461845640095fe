"""Pictures that are equally good stand in one order, whenever they were indexed."""

from __future__ import annotations

from pathlib import Path

from search.collections_of_noise import save_picture, tiny_pipeline


def test_alike_pictures_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    trained = tiny_pipeline()
    trained.batch_size = 1  # alone each is computed alike, to the last bit
    for names in ("df", "ce", "b"):  # so that the index holds them in another order
        for name in names:
            save_picture(tmp_path / f"{name}.png", 1)
        index = trained.index(tmp_path)
    for rerank in (0, 2, 5):  # no fewer are reranked than are asked for
        hits = index.search("cat", top_k=5, rerank=rerank)
        assert [Path(hit.path).stem for hit in hits] == list("bcdef")
        assert len({hit.score for hit in hits}) == 1 and [hit.first_stage_rank for hit in hits] == [1, 2, 3, 4, 5]
