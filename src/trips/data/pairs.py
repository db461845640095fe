"""Image-text pairs for pre-training and retrieval: the dataset over several corpora.

Section 4.1: conceptual captions, SBU, COCO and Visual Genome together, one caption of several drawn at random (ALBEF);
over the rounds of a corpus all captions of an image have their turn. `PairDataset` answers "which pair stands at this
position of this epoch", in any process; `trips.train.pair_data` asks, and `trips.data.pair_batches` joins what it gets.

Legend: H, W height and width in pixels of the model's input.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from trips.data.listed_shards import open_shards, reading, report_problems
from trips.data.order import CorpusOrder, MixedOrder, Place
from trips.data.pair_batches import PairItem
from trips.data.pair_records import PairRecord, parse_pair
from trips.data.records import BadSamples
from trips.data.remote import ShardCache, is_remote
from trips.data.shards import Members, Shard
from trips.data.transforms import TrainTransform
from trips.errors import ConfigError, DataError, ShapeError
from trips.images import load_image
from trips.processor import TripsProcessor

Transform = Callable[[Image.Image, np.random.Generator, str], tuple[np.ndarray, str]]

# What the generators of one position are for; each gets a stream of its own.
_AUGMENT, _REPLACE = 0, 2  # 1 is that of the masking, in `trips.data.pair_batches`
_NEAR, _FAR = 8, 56  # stand-ins to try for a bad sample: of its shard first, which is at hand, then of any


@dataclass(frozen=True)
class Corpus:
    """Shards that belong together.

    Attributes:
        name: of the corpus; parts its image ids from those of others, and seeds its order.
        patterns: tars and lists of images, see `trips.data.listed_shards.open_shards`.
        weight: how often each sample comes per epoch; 0.5 is half of them, then the other half.
        images: folders that image paths of lists start at, tried in turn; none takes that of the list.
        columns: other names of fields in lists.
    """

    name: str
    patterns: str | Path | Sequence[str | Path]
    weight: float = 1.0
    images: Sequence[str | Path] = ()
    columns: Mapping[str, str] | None = None


class _Drawn(NamedTuple):
    """A pair whose text is not yet encoded; see `PairItem`."""

    pixels: np.ndarray
    text: str
    image_id: int
    source: str
    position: tuple[int, int, int]

    def item(self, input_ids: list[int], skipped: tuple[tuple[str, str], ...] = ()) -> PairItem:
        return PairItem(self.pixels, input_ids, self.image_id, _hash63(self.text), self.source, self.position, skipped)


class PairDataset(Dataset):
    """Pairs of several corpora in an order that seed, epoch and position alone decide (`trips.data.order`).

    Indexed by (epoch, position), one by one or, which is cheaper, by a list of them; `len` is the samples of an epoch.
    A bad sample is replaced by another of its shard, again a function of its position alone, so that every process
    keeps whole batches.

    All shards are indexed first: local ones by their headers, remote ones by the sidecar beside them or, for want of
    it, by fetching them once. The indexes take about 75 bytes a sample, which forked workers share.

    Args:
        corpora: what to read.
        processor: encodes texts, resizes images; its `image_size` is H, W.
        transform: augmentation, called with the decoded image, a generator and the text; returns (H, W, 3) uint8 and
            the text, which it may change. None resizes by the processor. A `TrainTransform` decodes large JPEG files
            no finer than it needs if the processor's `jpeg_draft` is set.
        bad_samples: where damaged shards, bad rows of lists, and later bad samples are counted; None raises at the
            first.
        seed: of order, draws and augmentation; 0 or more.
        shuffle_shards: shards of a corpus whose samples are mixed; the cache has to hold them all.
        cache: local copies of remote shards.
        write_indexes: leave sidecars beside local tars, so that the next start need not walk them.
        clean: put the texts into ALBEF's form, `trips.data.pair_records.clean_caption`.
    Raises:
        DataError: a pattern matches nothing; a shard is missing, no tar, or cannot be fetched; a shard is damaged and
            `bad_samples` does not allow it; a corpus without samples.
        ConfigError: no corpora, two of one name, a weight or number out of range, a cache too small for a block.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        processor: TripsProcessor,
        transform: Transform | None = None,
        bad_samples: BadSamples | None = None,
        seed: int = 0,
        shuffle_shards: int = 16,
        cache: ShardCache | None = None,
        write_indexes: bool = False,
        clean: bool = False,
    ) -> None:
        names = [corpus.name for corpus in corpora]
        if not names or len(set(names)) < len(names):
            raise ConfigError("needs corpora of different names", item="corpora", found=names)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError("not a seed", item="seed", found=seed, expected="a whole number, 0 or more")
        self.corpora, self.processor, self.transform = list(corpora), processor, transform
        self.bad_samples, self.seed, self.cache, self.clean = bad_samples, seed, cache or ShardCache(), clean
        self.shards = [
            open_shards(
                corpus.patterns,
                corpus.name,
                self.cache,
                images=corpus.images,
                columns=corpus.columns,
                write_indexes=write_indexes,
            )
            for corpus in corpora
        ]
        report_problems([shard for shards in self.shards for shard in shards], bad_samples)
        orders = []
        for corpus, shards in zip(corpora, self.shards):
            if not any(len(shard) for shard in shards):
                raise DataError("no samples in any shard", item=corpus.name, found=shards[0].location)
            counts = [len(shard) for shard in shards]
            orders.append(CorpusOrder(counts, (seed, _hash63(corpus.name)), shuffle_shards))
        self.order = MixedOrder(orders, [corpus.weight for corpus in corpora], seed)
        self._check_cache(shuffle_shards)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def num_samples(self) -> int:
        """Different samples in all corpora."""
        return sum(order.num_samples for order in self.order.corpora)

    def locate(self, epoch: int, position: int) -> Place:
        """Where the sample at a position of an epoch lies, before bad ones are replaced."""
        return self.order.locate(epoch, position)

    def read(self, place: Place) -> Members:
        """Bytes of one sample.

        Raises:
            DataError: its shard cannot be opened, fetched or read.
        """
        shard = self.shards[place.corpus][place.shard]
        with reading(shard, self.cache) as stream:
            return shard.read(place.sample, stream)

    def __getitem__(self, key: tuple[int, int]) -> PairItem:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[PairItem]:
        """Pairs at several (epoch, position): what torch's loader calls for a batch.

        Each stage of the work is done for all before the next, because code that has just run is in the processor's
        caches, which a decoded picture empties; and the tokenizer takes all texts in one call.

        Raises:
            DataError: a shard out of reach; a bad sample where `bad_samples` is None; none that can stand in for it.
        """
        retries = self.cache.retries
        places = [self.locate(*key) for key in keys]
        records = [self._try(self._parse, self.read(place), place) for place in places]
        drawn = [
            None if record is None else self._try(self._draw, record, place, key)
            for record, place, key in zip(records, places, keys)
        ]
        encoded = iter(self._encode([one.text for one in drawn if one is not None]))
        items = []
        for key, one in zip(keys, drawn):
            ids = None if one is None else next(encoded)
            items.append(self._stand_in(key) if ids is None else one.item(ids))
        if self.cache.retries > retries:
            items[0] = dataclasses.replace(items[0], retries=self.cache.retries - retries)
        return items

    def _stand_in(self, key: tuple[int, int]) -> PairItem:
        """The first sample of use for a position, one by one: where the sample that belongs there is bad."""
        skipped: dict[str, str] = {}
        for place in self._candidates(*key):
            source = self._source(place)
            if source in skipped:
                continue
            members = self.read(place)  # outside the guard: a shard out of reach is not the fault of the sample
            try:
                drawn = self._draw(self._parse(members, place), place, key)
                try:
                    ids = self.processor.token_ids([drawn.text])[0]
                except DataError as error:  # nothing is left of it behind the tokenizer
                    raise DataError(f"text cannot be used: {error}", item=source) from error
            except DataError as error:
                if self.bad_samples is None:
                    raise
                skipped[source] = str(error)
            else:
                return drawn.item(ids, tuple(skipped.items()))
        raise DataError(
            "no sample can stand in for a bad one",
            item=f"epoch {key[0]}, position {key[1]}",
            found=next(iter(skipped.items())),
        )

    def _candidates(self, epoch: int, position: int) -> Iterator[Place]:
        place = self.locate(epoch, position)
        yield place
        rng = np.random.default_rng((self.seed, epoch, position, _REPLACE))
        for _ in range(_NEAR):
            yield place._replace(sample=int(rng.integers(len(self.shards[place.corpus][place.shard]))))
        for _ in range(_FAR):
            yield self.locate(epoch, int(rng.integers(len(self))))

    @staticmethod
    def _try(work: Callable[..., Any], *arguments: Any) -> Any:
        """What the work returns, or None where it refuses a sample; `_stand_in` will tell why."""
        try:
            return work(*arguments)
        except DataError:
            return None

    def _source(self, place: Place) -> str:
        return f"{self.corpora[place.corpus].name}/{self.shards[place.corpus][place.shard].source(place.sample)}"

    def _parse(self, members: Members, place: Place) -> PairRecord:
        return parse_pair(members, self._source(place), self.clean)

    def _draw(self, record: PairRecord, place: Place, key: tuple[int, int]) -> _Drawn:
        """Choose a text, decode the image."""
        position = (self.seed, *key)
        text = self._choose(record, place.round)
        if self.transform is None:
            pixels = self.processor.resize(record.image, name=record.source)
        else:
            rng = np.random.default_rng((*position, _AUGMENT))
            if self.processor.jpeg_draft and isinstance(self.transform, TrainTransform):
                pixels, text = self.transform.decode(record.image_bytes(), rng, text, name=record.source)
            else:
                pixels, text = self.transform(load_image(record.image, name=record.source), rng, text)
            if pixels.shape != (*self.processor.image_size, 3) or pixels.dtype != np.uint8:
                raise ShapeError(
                    "transform returned another kind of image",
                    item=record.source,
                    found=(pixels.shape, str(pixels.dtype)),
                    expected=f"{(*self.processor.image_size, 3)} uint8",
                )
        name = f"\0{place.shard}:{place.sample}" if record.image_id is None else record.image_id
        image_id = _hash63(f"{self.corpora[place.corpus].name}\0{name}")
        return _Drawn(pixels, text, image_id, record.source, position)

    def _choose(self, record: PairRecord, round_: int) -> str:
        """The text of a round: in as many rounds as an image has texts, each comes once, in an order of the image's."""
        count = len(record.texts)
        if count == 1:
            return record.texts[0]
        turn, place = divmod(round_, count)
        image = record.source if record.image_id is None else record.image_id  # the same in a list and packed
        order = np.random.default_rng(_hash63(f"{self.seed}-{turn}-{image}")).permutation(count)
        return record.texts[order[place]]

    def _encode(self, texts: list[str]) -> list[list[int] | None]:
        """Token ids; None for a text of which the tokenizer leaves nothing."""
        try:
            return self.processor.token_ids(texts) if texts else []
        except DataError:  # which one it is, shows only one by one
            return [self._encode([text])[0] for text in texts] if len(texts) > 1 else [None]

    def _check_cache(self, shuffle_shards: int) -> None:
        """Refuse a cache that would throw away a shard before all its samples are read."""
        needed = 0
        for shards in self.shards:
            tars = [shard for shard in shards if isinstance(shard, Shard) and is_remote(shard.location)]
            sizes = sorted((shard.index.size for shard in tars), reverse=True)
            needed += sum(sizes[:shuffle_shards])
        if needed > self.cache.max_bytes:
            raise ConfigError(
                "too small for the remote shards in use at once",
                item="cache.max_bytes",
                found=self.cache.max_bytes,
                expected=f"at least {needed}",
                hint="or fewer shuffle_shards",
            )


def _hash63(text: str) -> int:
    """A number of 63 bits, which a signed tensor holds; the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1
