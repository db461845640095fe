"""State of pre-training outside the optimizer (3.3, after ALBEF): moving average and queue of features.

`update_momentum` moves the teacher's copy towards the model; `FeatureQueue` holds the teacher's features of past steps,
which widen the contrast of ITC beyond the batch. Neither reads a value back from the device.

Dimensions: Q queue length, P projection width, n rows of one step over all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trips.errors import ConfigError, ShapeError

NO_IMAGE = -1  # id of a row that was never filled: ids of images are not negative


class FeatureQueue(nn.Module):
    """The last Q pairs of momentum features, as a ring (3.3: queue of 65,536).

    Rows that no batch has filled yet are random unit vectors and belong to no image: negatives for everything.

    Attributes:
        image_features, text_features: (Q, P) float32 buffers, in the order of the ring. `enqueue` writes in place:
            what autograd still needs after it has to be a copy (`torch.cat` with the features of the step makes one).
        image_ids: (Q,) long buffer, -1 for unfilled rows.
        pointer: 0-d long buffer, the row that is overwritten next, i.e. the oldest.
    Args:
        size: Q, at least 1. It need not be a multiple of the batch.
        width: P.
    Raises:
        ConfigError: size or width below 1.
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("width", width)):
            if value < 1:
                raise ConfigError("a queue needs room", item=f"FeatureQueue {name}", found=value, expected="at least 1")
        self.register_buffer("image_features", torch.empty(size, width))
        self.register_buffer("text_features", torch.empty(size, width))
        self.register_buffer("image_ids", torch.empty(size, dtype=torch.long))
        self.register_buffer("pointer", torch.empty((), dtype=torch.long))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue: fresh random unit rows that belong to no image."""
        for features in (self.image_features, self.text_features):
            features.copy_(nn.functional.normalize(features.normal_(), dim=1))
        self.image_ids.fill_(NO_IMAGE)
        self.pointer.zero_()

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Put the features of a step in place of the oldest.

        Args:
            image: (n, P) normalised, gathered over all processes; any n, of more than Q the last Q stay.
            text: (n, P).
            ids: (n,) long, ids of the images.
        Raises:
            ShapeError: the three do not fit each other or the queue.
        """
        size, width = self.image_features.shape
        rows = ids.shape[0]
        for name, given, expected in (
            ("image", image, (rows, width)),
            ("text", text, (rows, width)),
            ("ids", ids, (rows,)),
        ):
            if tuple(given.shape) != expected:
                raise ShapeError("does not fit the queue", item=name, found=tuple(given.shape), expected=expected)
        kept = min(rows, size)
        # The pointer stays on the device: places by arithmetic, never by slicing with a number read back.
        places = (self.pointer + torch.arange(rows - kept, rows, device=self.pointer.device)) % size
        self.image_features.index_copy_(0, places, image[rows - kept :].to(self.image_features.dtype))
        self.text_features.index_copy_(0, places, text[rows - kept :].to(self.text_features.dtype))
        self.image_ids.index_copy_(0, places, ids[rows - kept :])
        self.pointer.add_(rows).remainder_(size)


@torch.no_grad()
def update_momentum(momentum: nn.Module, online: nn.Module, decay: float) -> None:
    """Moving average of the weights (3.3): m <- decay * m + (1 - decay) * p over parameters, buffers stay.

    One fused operation over all of them; works on the shards of FSDP, where both modules are sharded alike. Keep both
    in float32: in bfloat16 a step of 0.005 is rounded away.

    Args:
        momentum: the teacher.
        online: the model; a parameter belongs to the teacher's of the same name, further ones are left out.
        decay: 0 (copy) to 1 (stand still); the paper's is 0.995.
    Raises:
        ConfigError: decay out of range.
        ShapeError: the teacher has a parameter that the model has not, or has in another shape or dtype.
    """
    if not 0 <= decay <= 1:
        raise ConfigError("decay of the moving average is out of range", item="decay", found=decay, expected="0 to 1")
    sources = dict(online.named_parameters())
    teacher, student = [], []
    for name, mine in momentum.named_parameters():
        source = sources.get(name)
        if source is None or source.shape != mine.shape or source.dtype != mine.dtype:
            raise ShapeError(
                "teacher and model do not fit",
                item=name,
                found="no such parameter" if source is None else (tuple(source.shape), source.dtype),
                expected=(tuple(mine.shape), mine.dtype),
            )
        teacher.append(mine)
        student.append(source)
    if teacher:
        torch._foreach_lerp_(teacher, student, 1 - decay)
