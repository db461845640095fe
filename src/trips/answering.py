"""Answers as texts with probabilities: candidates ranked, or written freely (section 5.1.1).

Dimensions: B questions, L question tokens, C candidates, T answer tokens, k answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trips.data.loading import AnswerList
from trips.processor import TripsProcessor
from trips.processor_checks import string_list
from trips.tasks.vqa import TripsForQuestionAnswering

_SHORTLIST = 128  # candidates whose likelihood is computed to the end (ALBEF)
_BEAMS = 3  # of free writing (ALBEF)


@dataclass(frozen=True)
class Answer:
    """One answer to a question.

    Attributes:
        text: as it stands in the list of candidates, or as the model wrote it.
        probability: 0 to 1; of a candidate its share among those ranked, of a written answer its own.
    """

    text: str
    probability: float


class Candidates:
    """A list of answers, encoded once for all questions.

    Args:
        answers: texts; they are returned as they stand here, and read by the model in the form of `normalise_answer`,
            which it learnt to write.
        processor: that of the model.
    Raises:
        ConfigError: not a list of strings, or an empty one. DataError: a blank answer, or one that occurs twice.
    """

    def __init__(self, answers: Sequence[str], processor: TripsProcessor) -> None:
        self.texts = list(answers) if isinstance(answers, AnswerList) else string_list(answers, "answers")
        self._encoded = processor.encode_answers(list(AnswerList(self.texts)))

    def rank(self, model: TripsForQuestionAnswering, inputs: dict[str, Any], top_k: int) -> list[list[Answer]]:
        """The best of them for each question, by log-likelihood; a probability is the softmax over those ranked.

        Args:
            inputs: arguments of the model's ``forward`` without answers; B questions.
            top_k: answers for each question; C if there are fewer.
        """
        states, mask = model(**inputs).question_states, inputs["attention_mask"]
        encoded = self._encoded.to(states.device)
        numbers, scores = model.rank_answers(
            states, mask, encoded["input_ids"], encoded["attention_mask"], max(top_k, _SHORTLIST)
        )
        best = numbers[:, :top_k].tolist(), torch.softmax(scores, dim=1)[:, :top_k].tolist()
        return [[Answer(self.texts[i], share) for i, share in zip(*row)] for row in zip(*best)]


def write_answers(
    model: TripsForQuestionAnswering, processor: TripsProcessor, inputs: dict[str, Any], top_k: int
) -> list[list[Answer]]:
    """Answers in the model's own words, found by beams, with the probability of each as a whole.

    Args:
        inputs: arguments of the model's ``forward`` without answers; B questions.
        top_k: answers for each question; fewer where two beams write the same text.
    """
    states, mask = model(**inputs).question_states, inputs["attention_mask"]
    # By likelihood alone, which a penalty for length would not be.
    beams = {"num_beams": max(_BEAMS, top_k), "num_return_sequences": top_k, "length_penalty": 0.0}
    written = model.generate(**inputs, **beams)  # (B k, T)
    ends = written == model.config.decoder_config.eos_token_id
    written_mask = (ends.cumsum(dim=1) - ends.long() == 0).long()  # up to the first end, and that too
    found = []
    for row, (ids, ids_mask) in enumerate(zip(written.split(top_k), written_mask.split(top_k))):
        numbers, scores = model.rank_answers(states[row : row + 1], mask[row : row + 1], ids, ids_mask, top_k)
        best: dict[str, float] = {}
        for text, probability in zip(processor.decode_answers(ids[numbers[0]]), scores[0].exp().tolist()):
            best.setdefault(text, probability)
        found.append([Answer(text, probability) for text, probability in best.items()])
    return found
