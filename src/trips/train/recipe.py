"""Recipes: everything that defines a run, as typed sections; YAML in, resolved YAML out.

The defaults are the paper's setting, or ALBEF's where it is silent (sections 4.1 and 5.1.1). A recipe file names only
what differs. Reading and checking is the business of `trips.train.recipe_io`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from trips.architecture import check_single_stream
from trips.config import PretrainingConfig, ReasoningConfig, SelectionConfig
from trips.errors import ConfigError
from trips.options import Architecture
from trips.train.recipe_limits import INF, RANGES, SINGLE_STREAM_REFUSES, TASKS_OF_KEY
from trips.train.settings import ParallelMode


@dataclass(frozen=True)
class ModelSection:
    """The model.

    Attributes:
        vision: vision tower (CLIP, ViT, DINOv2): a folder, a hub name, "package:NAME/FOLDER" for files inside an
            installed package, or "tiny" for a small one with random weights.
        text: BERT text tower, named in the same ways; "tiny" trains its word pieces on the training texts.
        architecture: "dual" is the model of Figure 2, "single" TRIPS-S: the vision tower reads words and patches
            together. It has neither text nor fusion layers, and all of it learns at optim.vision_lr but the embeddings.
        num_text_layers: layers of the text encoder, the first of the text tower.
        num_fusion_layers: layers of the fusion encoder, the last of the text tower.
        num_decoder_layers: layers of the answer decoder, the last of the text tower.
        dropout: dropout of the text, fusion and decoder layers; null keeps the text tower's.
        start_from: folder of a model saved by an earlier run, such as runs/pretrain/model, whose weights replace the
            towers' wherever both have a part; the layers above must be that run's.
        selection: text-relevant patch selection, see SelectionConfig.
        pretraining: objectives and teacher where the task is pretrain or retrieval, see PretrainingConfig.
        reasoning: images and their fusion where the task is nlvr2, see ReasoningConfig.
    """

    vision: str = "openai/clip-vit-base-patch16"
    text: str = "google-bert/bert-base-uncased"
    architecture: Architecture = "dual"
    num_text_layers: int = 6
    num_fusion_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float | None = None
    start_from: str | None = None
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)


@dataclass(frozen=True)
class DataSection:
    """The data.

    Attributes:
        train: what to train on, from the working directory. WebDataset tars, as paths or glob patterns (for pairs also
            URLs); or annotation files of the task in any format that docs/data_formats.md lists, or a folder with one,
            with #SPLIT behind it where it holds several (a.json#train+restval); or hf:NAME#SPLIT, a dataset of Hugging
            Face. Each entry is a corpus.
        images: folders that the paths of images in annotation files start at, tried in turn; none takes the folder of
            the file.
        columns: other names of fields in tables and datasets, such as {question: q, image: img}.
        weights: how often an epoch over pairs takes each entry of train: 1 every sample once, 0.5 every second one, 2
            each twice, with another of its captions; null takes all once.
        loss_weights: weight of the questions of each entry of train in the loss; null leaves the files' own, which is 1
            but for 0.5 where ALBEF's lists mark a question as Visual Genome's.
        test: what to measure on after training, named as in train.
        image_size: side of the square that images are resized to, in pixels.
        max_text_length: longest text in tokens; the rest is cut off.
        max_questions_per_image: most questions of an image per step, drawn anew each epoch; null takes all.
        min_answer_count: training questions that must have an answer for it to be a candidate in the ranking.
        augment: training images. "none" resizes, "crop" cuts out a random part, "randaugment" distorts it too, without
            touching its colours.
        crop_scale: smallest and largest share of the area that a random crop takes.
        clean_captions: lower case, no punctuation and 30 words at most in captions, as ALBEF has them.
        flip: "swap" mirrors every second image and swaps left and right in its text; "none" mirrors nothing.
        shuffle_images: put the images of a statement into another order each epoch; where sentences do not tell them
            apart by their places, such as the boxes of NLVR v1.
        shuffle_shards: shards of pairs whose samples are shuffled among each other.
        cache_dir: folder for shards fetched from URLs; null uses one in the system's folder for temporary files.
        cache_gb: largest size of that folder in GB.
        max_bad_share: share of unreadable samples tolerated (ten always are); they are skipped and named.
        jpeg_draft: decode large JPEG files at a half, a quarter or an eighth of their size where that is enough; much
            faster, a little blurrer.
        cache_images: keep resized images in memory.
        num_workers: processes that decode images; 0 decodes in the training process.
    """

    train: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    loss_weights: tuple[float, ...] | None = None
    test: tuple[str, ...] = ()
    image_size: int = 384
    max_text_length: int = 40
    max_questions_per_image: int | None = None
    min_answer_count: int = 1
    augment: Literal["none", "crop", "randaugment"] = "none"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    clean_captions: bool = False
    flip: Literal["none", "swap"] = "none"
    shuffle_images: bool = False
    shuffle_shards: int = 16
    cache_dir: str | None = None
    cache_gb: float = 50.0
    max_bad_share: float = 0.01
    jpeg_draft: bool = False
    cache_images: bool = False
    num_workers: int = 0


@dataclass(frozen=True)
class OptimSection:
    """The optimizer, AdamW.

    Attributes:
        lr: peak learning rate of everything but the vision tower.
        vision_lr: peak learning rate of the vision tower; 0 freezes it.
        head_lr: peak learning rate of the heads (projections, matching, masked words, classifier), which start from
            random weights; null takes lr.
        weight_decay: decoupled; not on biases, norms, [CLS] and position tables.
        warmup_steps: steps of linear warm-up.
        lr_floor: share of the peak where the warm-up starts and the cosine ends.
        batch_size: images per step, each with its questions, over all processes.
        accumulate: parts that a step's batch is cut into, one after the other, where memory is short.
        epochs: passes over the training images; used where steps is null.
        steps: optimizer steps, in place of epochs.
        clip_norm: largest gradient norm; null does not clip.
        max_nonfinite: steps with a non-finite loss or gradient that are skipped before the run stops.
    """

    lr: float = 2e-5
    vision_lr: float = 2e-5
    head_lr: float | None = None
    weight_decay: float = 0.02
    warmup_steps: int = 400
    lr_floor: float = 0.1
    batch_size: int = 256
    accumulate: int = 1
    epochs: float = 8
    steps: int | None = None
    clip_norm: float | None = 1.0
    max_nonfinite: int = 10


@dataclass(frozen=True)
class ScheduleSection:
    """What selection does over the steps; beyond the paper, off by default.

    Attributes:
        keep_rate_warmup: share of the steps in which the keep rate falls from 1.0 to its value; 0 is off.
        levels: distinct keep rates on that way, both ends included.
        distill_every: distance of the full-patch steps where model.selection.learning is "distill".
        alpha_ramp_epochs: epochs of pairs in which the weight of the teacher's soft targets rises from 0; where
            it is above 0 it decides model.pretraining.alpha_ramp_steps.
    """

    keep_rate_warmup: float = 0.0
    levels: int = 4
    distill_every: int = 4
    alpha_ramp_epochs: float = 0.0


@dataclass(frozen=True)
class RunSection:
    """The run.

    Attributes:
        out: folder for the resolved recipe, checkpoints, metrics, the model and results.json.
        seed: of the order of the data, new weights and dropout.
        precision: "bf16", "fp32", or "auto": bf16 on GPUs that have it.
        parallel: how several processes share the model. "ddp": each holds it whole; "fsdp": each holds a part (FSDP2);
            "auto": fsdp under accelerate launch --use_fsdp, else ddp.
        gradient_checkpointing: compute activations again in the backward pass in place of keeping them: less memory,
            about a third more time.
        compile: put the model through torch.compile.
        trackers: besides metrics.jsonl, accelerate's trackers by name (tensorboard, wandb, mlflow, ...).
        resume: "auto" goes on from the newest checkpoint in out, "never" starts anew and removes them.
        log_every: steps between log lines.
        save_every: steps between checkpoints; 0 writes one at the end only.
        keep_last: checkpoints kept.
        eval_batch_size: images per batch in evaluation.
        answer: how questions are answered in evaluation. "rank": by the best of the list of answers; "generate": freely
            written; "both" measures the two.
        metric: "exact": the answer of the people, in one form; "official": the accuracy of VQA 2.0; "auto": official
            where every question has the answers of several people.
        top_k: candidate answers, best by their first token, that are ranked by their full likelihood.
        shortlist: best candidates of an image or text by contrastive features that matching ranks anew; the paper has
            256 on COCO and 128 on Flickr30K.
        rerank_guide: who selects patches in that second stage. "text": the text of each pair, so that the layers behind
            the first selection run per pair (the paper); "image": the image [CLS], once per image; "both" measures the
            two, or the one where no text selects.
        cache_prefix_gb: most memory for what a frozen vision tower (optim.vision_lr 0, nothing augmented) has made of
            the images up to the first selection, or to its end where nothing is removed: each is then computed once; 0
            is off.
        memory_gb: most memory of the second stage for states that are kept between batches.
    """

    out: str = "runs/vqa"
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    parallel: ParallelMode = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)
    resume: Literal["auto", "never"] = "auto"
    log_every: int = 50
    save_every: int = 500
    keep_last: int = 2
    eval_batch_size: int = 16
    answer: Literal["rank", "generate", "both"] = "rank"
    metric: Literal["auto", "exact", "official"] = "auto"
    top_k: int = 128
    shortlist: int = 128
    rerank_guide: Literal["text", "image", "both"] = "text"
    cache_prefix_gb: float = 0.0
    memory_gb: float = 4.0


@dataclass(frozen=True)
class Recipe:
    """A run, complete.

    Attributes:
        purpose: one line that says what the run is for.
        task: which task model is trained.
        model: towers and selection.
        data: files and how they are read.
        optim: optimizer and learning rates.
        schedule: selection over the steps.
        run: output, seed, precision, logging.

    Raises:
        ConfigError: a number out of its range; the error names the key.
    """

    purpose: str = ""
    task: Literal["vqa", "pretrain", "retrieval", "nlvr2"] = "vqa"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        for key, (low, high) in RANGES.items():
            value = self._value(key)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                expected = f"at least {low}" if high == INF else f"{low} to {high}"
                raise ConfigError("out of range", item=key, found=value, expected=expected)
        for key, tasks in TASKS_OF_KEY.items():
            if self.task not in tasks and self._value(key) != getattr(_DEFAULTS[key.split(".")[0]], key.split(".")[1]):
                raise ConfigError(
                    f"task {self.task} has no use for it", item=key, expected=f"task {' or '.join(tasks)}"
                )
        for key in ("data.weights", "data.loss_weights"):
            weights = self._value(key)
            if weights is not None and len(weights) != len(self.data.train):
                raise ConfigError(
                    "needs one weight for each entry of data.train",
                    item=key,
                    found=len(weights),
                    expected=len(self.data.train),
                )
        if self.model.architecture == "single":
            check_single_stream(self.model.selection, self.model.pretraining, self.model.reasoning)
            for key, refuses, expected in SINGLE_STREAM_REFUSES:
                if refuses(found := self._value(key)):
                    raise ConfigError(
                        "a single-stream model has no use for it", item=key, found=found, expected=expected
                    )
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                "not shares", item="data.crop_scale", found=self.data.crop_scale, expected="0 < a <= b <= 1"
            )
        if self.optim.batch_size % self.optim.accumulate:
            raise ConfigError(
                "must divide by optim.accumulate",
                item="optim.batch_size",
                found=self.optim.batch_size,
                expected=f"n x {self.optim.accumulate}",
            )

    def _value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self, section), name)


_DEFAULTS = {"model": ModelSection(), "data": DataSection(), "optim": OptimSection(), "schedule": ScheduleSection(),
             "run": RunSection()}  # fmt: skip
