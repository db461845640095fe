"""What a recipe's numbers may be, and which keys belong to which task: tables that `trips.train.recipe` checks by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

INF = float("inf")

TASKS_OF_KEY: dict[str, tuple[str, ...]] = {
    "model.num_decoder_layers": ("vqa",),
    "model.pretraining": ("pretrain", "retrieval"),
    "data.weights": ("pretrain", "retrieval"),
    "data.clean_captions": ("pretrain", "retrieval"),
    "data.flip": ("pretrain", "retrieval"),
    "data.cache_images": ("vqa", "nlvr2"),
    "data.shuffle_shards": ("pretrain", "retrieval", "nlvr2"),
    "data.cache_dir": ("pretrain", "retrieval", "nlvr2"),
    "data.cache_gb": ("pretrain", "retrieval", "nlvr2"),
    "data.loss_weights": ("vqa",),
    "data.max_questions_per_image": ("vqa",),
    "data.shuffle_images": ("nlvr2",),
    "data.min_answer_count": ("vqa",),
    "model.reasoning": ("nlvr2",),
    "optim.head_lr": ("pretrain", "retrieval", "nlvr2"),
    "schedule.alpha_ramp_epochs": ("pretrain", "retrieval"),
    "run.answer": ("vqa",),
    "run.metric": ("vqa",),
    "run.top_k": ("vqa",),
    "run.shortlist": ("retrieval",),
    "run.rerank_guide": ("retrieval",),
    "run.memory_gb": ("retrieval",),
}
"""Keys that only some tasks read; others refuse them rather than ignore them."""

SINGLE_STREAM_REFUSES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model.num_text_layers", lambda value: value != 6, "the default: there is no text encoder"),
    ("model.num_fusion_layers", lambda value: value != 6, "the default: there is no fusion encoder"),
    ("optim.vision_lr", lambda value: value == 0, "above 0: the vision tower is the joint stack"),
    ("run.cache_prefix_gb", lambda value: value > 0, "0: only patch embeddings are free of text"),
    ("run.rerank_guide", lambda value: value == "image", "text: every pair is read with its text"),
)
"""Keys of a recipe that say nothing where one stack reads words and patches: key, what is refused, what is expected."""

RANGES: dict[str, tuple[float, float]] = {
    "model.num_text_layers": (1, INF),
    "model.num_fusion_layers": (1, INF),
    "model.num_decoder_layers": (1, INF),
    "model.dropout": (0, 1),
    "data.image_size": (1, INF),
    "data.max_text_length": (3, INF),
    "data.max_questions_per_image": (1, INF),
    "data.min_answer_count": (1, INF),
    "data.shuffle_shards": (1, INF),
    "data.cache_gb": (0, INF),
    "data.max_bad_share": (0, 1),
    "data.num_workers": (0, INF),
    "optim.lr": (0, INF),
    "optim.vision_lr": (0, INF),
    "optim.head_lr": (0, INF),
    "optim.weight_decay": (0, INF),
    "optim.warmup_steps": (0, INF),
    "optim.lr_floor": (0, 1),
    "optim.batch_size": (1, INF),
    "optim.accumulate": (1, INF),
    "optim.epochs": (0, INF),
    "optim.steps": (0, INF),
    "optim.max_nonfinite": (0, INF),
    "schedule.keep_rate_warmup": (0, 1),
    "schedule.levels": (2, INF),
    "schedule.distill_every": (1, INF),
    "schedule.alpha_ramp_epochs": (0, INF),
    "run.seed": (0, 2**32 - 1),
    "run.log_every": (1, INF),
    "run.save_every": (0, INF),
    "run.keep_last": (1, INF),
    "run.eval_batch_size": (1, INF),
    "run.top_k": (1, INF),
    "run.shortlist": (1, INF),
    "run.memory_gb": (0, INF),
    "run.cache_prefix_gb": (0, INF),
}
