"""Trained models for people with pictures and sentences: `load` opens one, `TripsPipeline` asks it.

Stands above tasks and data and knows nothing of training: what `trips.train` writes is read here as files.

Dimensions: I images, T texts, n images of a statement, k answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from trips.answering import Answer, Candidates, write_answers
from trips.config import SelectionConfig
from trips.errors import ConfigError
from trips.explanation import Explanation, explain_texts
from trips.images import ImageSource
from trips.matching import encode_images, feature_similarity, match_probabilities, truth_probabilities
from trips.model import TripsPreTrainedModel
from trips.processor import TripsProcessor
from trips.processor_checks import image_list, positive_int, string_list
from trips.saved import open_saved

if TYPE_CHECKING:
    from trips.search.index import ImageIndex

# What can be done with the model of each class; by name, so that no class is imported that is not used.
_VERBS = {
    "TripsForQuestionAnswering": ("ask",),
    "TripsForImageTextRetrieval": ("score", "similarity", "index"),  # that for pre-training is one of these
    "TripsForVisualReasoning": ("verify",),
}


class TripsPipeline:
    """A trained model with its processor.

    Images are what `trips.images.load_image` reads: paths, encoded bytes, Pillow images, arrays. Every call takes a
    `selection` in place of the model's own, such as ``SelectionConfig(guide="none")``.

    Args:
        model: of a class of `trips.tasks`; put into evaluation mode, stays on its device and in its precision.
        processor: that of its training.
        answers: candidates of `ask`; without them the model writes freely.
        batch_size: pairs of an image and a text that are computed at once.
    Raises:
        ConfigError: a model without a task.
    """

    def __init__(
        self,
        model: TripsPreTrainedModel,
        processor: TripsProcessor,
        answers: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> None:
        names = [base.__name__ for base in type(model).__mro__ if base.__name__ in _VERBS]
        if not names:
            raise ConfigError("has no task", item=type(model).__name__, expected=f"one of {', '.join(_VERBS)}")
        self.model, self.processor = model.eval(), processor
        self.batch_size = positive_int(batch_size, "batch_size")
        self.verbs: tuple[str, ...] = _VERBS[names[0]]
        self._candidates = None if answers is None else Candidates(answers, processor)

    @property
    def answers(self) -> list[str] | None:
        """The candidates of `ask`, None if it writes freely."""
        return None if self._candidates is None else list(self._candidates.texts)

    @overload
    def ask(self, image: ImageSource, question: str, top_k: int = ..., answers: Sequence[str] | None = ...,
            *, selection: SelectionConfig | None = ...) -> list[Answer]: ...  # fmt: skip
    @overload
    def ask(self, image: ImageSource, question: Sequence[str], top_k: int = ..., answers: Sequence[str] | None = ...,
            *, selection: SelectionConfig | None = ...) -> list[list[Answer]]: ...  # fmt: skip
    @torch.no_grad()
    def ask(
        self,
        image: ImageSource,
        question: str | Sequence[str],
        top_k: int = 1,
        answers: Sequence[str] | None = None,
        *,
        selection: SelectionConfig | None = None,
    ) -> list[Answer] | list[list[Answer]]:
        """Answer questions about an image (section 5.1.1); several share its prefix.

        Candidates are ranked as `TripsForQuestionAnswering.rank_answers` does. A probability is then the share of an
        answer among those ranked (all candidates, or the 128 with the best first tokens): the softmax over their
        log-likelihoods. Without candidates the three best or more beams are written, and a probability is that of the
        written answer itself.

        Args:
            image: the picture.
            question: one question, or several.
            top_k: answers to return, best first; fewer if there are not so many.
            answers: candidates of this call in place of the model's own.
        Returns:
            The answers to one question; for several a list of such lists.
        Raises:
            ConfigError: a model that cannot answer, a bad `top_k`, no questions. DataError: an image that cannot be
                read, a blank question, a blank or double candidate.
        """
        self._check("ask", selection)
        questions = [question] if isinstance(question, str) else string_list(question, "question")
        positive_int(top_k, "top_k")
        candidates = self._candidates if answers is None else Candidates(answers, self.processor)
        prefix = encode_images(self.model, self.processor, [image], selection)
        found: list[list[Answer]] = []
        for start in range(0, len(questions), self.batch_size):
            texts = self.processor(text=questions[start : start + self.batch_size]).to(self.model.device)
            about = torch.zeros_like(texts["input_ids"][:, 0])
            inputs = {**texts, "prefix": prefix, "image_index": about, "selection": selection}
            if candidates is None:
                found += write_answers(self.model, self.processor, inputs, top_k)
            else:
                found += candidates.rank(self.model, inputs, top_k)
        return found[0] if isinstance(question, str) else found

    @torch.no_grad()
    def score(
        self,
        images: ImageSource | Sequence[ImageSource],
        texts: str | Sequence[str],
        *,
        selection: SelectionConfig | None = None,
    ) -> Tensor:
        """Probability that each text describes each image, from the matching head: (I, T) float32 on the CPU.

        Every text selects its own patches; an image's prefix and a text's states are computed once.

        Args:
            images: one or a list. texts: one or a list.
        Raises:
            ConfigError: a model without a matching head, an empty list. DataError: an image that cannot be read, a
                blank text.
        """
        self._check("score", selection)
        images, texts = image_list(images), [texts] if isinstance(texts, str) else string_list(texts, "texts")
        return match_probabilities(self.model, self.processor, images, texts, selection, self.batch_size)

    @torch.no_grad()
    def similarity(
        self,
        images: ImageSource | Sequence[ImageSource],
        texts: str | Sequence[str],
        *,
        selection: SelectionConfig | None = None,
    ) -> Tensor:
        """Cosine of the contrastive features of each image and text: (I, T) float32 from -1 to 1 on the CPU.

        Cheaper than `score` and less exact: the features of an image have seen no text.

        Args:
            images: one or a list. texts: one or a list.
        Raises:
            ConfigError, DataError: see `score`.
        """
        self._check("similarity", selection)
        images, texts = image_list(images), [texts] if isinstance(texts, str) else string_list(texts, "texts")
        return feature_similarity(self.model, self.processor, images, texts, selection, self.batch_size)

    @overload
    def verify(self, images: ImageSource | Sequence[ImageSource], sentence: str,
               *, selection: SelectionConfig | None = ...) -> float: ...  # fmt: skip
    @overload
    def verify(self, images: ImageSource | Sequence[ImageSource], sentence: Sequence[str],
               *, selection: SelectionConfig | None = ...) -> list[float]: ...  # fmt: skip
    @torch.no_grad()
    def verify(
        self,
        images: ImageSource | Sequence[ImageSource],
        sentence: str | Sequence[str],
        *,
        selection: SelectionConfig | None = None,
    ) -> float | list[float]:
        """Probability that a sentence is true of its images (section 5.1.2).

        Args:
            images: as many as the model takes, in their order; they belong together.
            sentence: one, or several about the same images.
        Returns:
            0 to 1; for several sentences a list.
        Raises:
            ConfigError: a model that does not judge sentences, or takes another number of images. DataError: see
                `score`.
        """
        self._check("verify", selection)
        sentences = [sentence] if isinstance(sentence, str) else string_list(sentence, "sentence")
        images, n = image_list(images), self.model.config.reasoning.num_images
        if len(images) != n:
            raise ConfigError("the model takes another number of images", item="images", found=len(images), expected=n)
        found = truth_probabilities(self.model, self.processor, images, sentences, selection, self.batch_size)
        return found[0] if isinstance(sentence, str) else found

    @overload
    def explain(self, image: ImageSource, text: str, *, selection: SelectionConfig | None = ...) -> Explanation: ...
    @overload
    def explain(self, image: ImageSource, text: Sequence[str],
                *, selection: SelectionConfig | None = ...) -> list[Explanation]: ...  # fmt: skip
    def explain(
        self, image: ImageSource, text: str | Sequence[str], *, selection: SelectionConfig | None = None
    ) -> Explanation | list[Explanation]:
        """Which patches of an image a text keeps behind every selection layer, with their scores; for every task.

        Args:
            image: the picture. text: one, or several about the same picture.
        Returns:
            what can be drawn, ``explain(...).save("kept.png")``, and read, ``explain(...).record()``.
        Raises:
            ConfigError: a model or `selection` that keeps every patch. DataError: see `score`.
        """
        self._check_selection(selection)
        texts = [text] if isinstance(text, str) else string_list(text, "text")
        found = explain_texts(self.model, self.processor, image, texts, selection, batch_size=self.batch_size)
        return found[0] if isinstance(text, str) else found

    def index(self, folder: str | Path, **options: Any) -> ImageIndex:
        """Index a folder of photos, or bring its index up to date; then ``.search("a clean kitchen")`` finds them.

        Args:
            folder: images, in folders and WebDataset tars; or one tar.
            options: of `trips.search.index.ImageIndex.build`, as are the errors.
        """
        from trips.search.index import ImageIndex  # FAISS is an extra

        self._check("index", None)
        return ImageIndex.build(folder, self, **options)

    def __call__(
        self,
        image: ImageSource | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        question: str | Sequence[str] | None = None,
        top_k: int = 5,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """`ask` in the form of transformers' pipelines for visual question answering.

        Args:
            image: the picture; or ``{"image": ..., "question": ...}``, or a list of such.
            question: beside a picture.
            top_k: see `ask`.
        Returns:
            ``[{"answer": ..., "score": ...}, ...]``; of several questions a list of such lists.
        Raises:
            ConfigError: neither form; what `ask` raises.
        """
        if isinstance(image, (list, tuple)) and question is None:
            return [self(one, top_k=top_k) for one in image]
        if isinstance(image, Mapping):
            if question is not None or set(image) != {"image", "question"}:
                raise ConfigError("not a question", item="image", found=sorted(image), expected="image and question")
            image, question = image["image"], image["question"]
        if image is None or question is None:
            raise ConfigError("needs an image and a question", item="TripsPipeline")
        found = self.ask(image, question, top_k)
        if isinstance(question, str):
            return [{"answer": answer.text, "score": answer.probability} for answer in found]
        return [[{"answer": answer.text, "score": answer.probability} for answer in row] for row in found]

    def _check(self, verb: str, selection: object) -> None:
        if verb not in self.verbs:
            able = " and ".join(f"{name}()" for name in self.verbs)
            raise ConfigError(f"a model of this task has no {verb}()", item=type(self.model).__name__, expected=able)
        self._check_selection(selection)

    @staticmethod
    def _check_selection(selection: object) -> None:
        if selection is not None and not isinstance(selection, SelectionConfig):
            raise ConfigError(
                "not a setting", item="selection", found=type(selection).__name__, expected="a SelectionConfig"
            )


def load(path: str | Path, *, device: str | torch.device | None = None) -> TripsPipeline:
    """Open a trained model.

    Args:
        path: folder of a finished run, a saved model's folder, or the name of one on the Hugging Face hub. The answers
            that a question answering run may give come with it.
        device: where to compute; the GPU where there is one.
    Raises:
        CheckpointError, ConfigError, DataError: see `open_saved`.
    """
    saved = open_saved(path, device)
    return TripsPipeline(saved.model, saved.processor, saved.answers)
