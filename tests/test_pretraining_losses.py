"""ITC, ITM, MLM and the hard negatives against loops over pairs in float64 and closed forms."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from trips.errors import DataError, ShapeError
from trips.losses import (
    check_negatives,
    forbidden_negatives,
    itc_loss,
    itm_loss,
    mlm_loss,
    positive_mass,
    sample_hard_negatives,
    soft_targets,
)


def features(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1)


def loop_cross_entropy(rows: list, candidates: list, temperature: float, targets: list) -> float:
    """Mean over rows of -sum target * log softmax, one product at a time; Python floats are float64."""
    total = 0.0
    for row, target in zip(rows, targets, strict=True):
        logits = [sum(a * b for a, b in zip(row, c, strict=True)) / temperature for c in candidates]
        total -= sum(t * math.log(p) for t, p in zip(target, reference.softmax(logits), strict=True))
    return total / len(rows)


def loop_targets(teacher: list, candidates: list, temperature: float, ids: list, others: list, alpha: float) -> list:
    targets = []
    for row, own in zip(teacher, ids, strict=True):
        soft = reference.softmax([sum(a * b for a, b in zip(row, c, strict=True)) / temperature for c in candidates])
        same = [float(other == own) for other in others]
        targets.append([alpha * s + (1 - alpha) * h / sum(same) for s, h in zip(soft, same, strict=True)])
    return targets


@given(rows=st.integers(1, 6), width=st.integers(1, 8), temperature=st.floats(0.05, 1), seed=seeds)
def test_itc_is_plain_infonce_without_queue_and_teacher(rows, width, temperature, seed) -> None:
    """Candidates are the batch, each image another: cross-entropy against the diagonal."""
    torch.manual_seed(seed)
    image, text = features(rows, width), features(rows, width)
    ids = torch.randperm(rows)
    targets = positive_mass(ids, ids)
    loss = itc_loss(image, text, image, text, temperature, targets, targets)
    logits = image.double() @ text.double().T / temperature
    diagonal = torch.arange(rows)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    assert torch.equal(soft_targets(torch.randn(rows, rows), targets, 0.0), targets)


@given(rows=st.integers(1, 5), queue=st.integers(0, 7), alpha=st.floats(0, 1), seed=seeds)
def test_itc_with_queue_and_soft_targets_equals_loops(rows, queue, alpha, seed) -> None:
    """Teacher's features of the step, then the queue; captions of one image share the mass."""
    torch.manual_seed(seed)
    width, temperature = 6, 0.3
    image, text, teacher_image, teacher_text = (features(rows, width) for _ in range(4))
    image_candidates = torch.cat([teacher_image, features(queue, width)])
    text_candidates = torch.cat([teacher_text, features(queue, width)])
    ids = torch.randint(3, (rows,))
    candidate_ids = torch.cat([ids, torch.randint(-1, 3, (queue,))])
    mass = positive_mass(ids, candidate_ids)
    image_targets = soft_targets(teacher_image @ text_candidates.T / temperature, mass, alpha)
    text_targets = soft_targets(teacher_text @ image_candidates.T / temperature, mass, torch.tensor(alpha))
    loss = itc_loss(
        image, text, image_candidates, text_candidates, torch.tensor(temperature), image_targets, text_targets
    )

    lists = [t.tolist() for t in (image, text, teacher_image, teacher_text, image_candidates, text_candidates)]
    image, text, teacher_image, teacher_text, image_candidates, text_candidates = lists
    ids, others = ids.tolist(), candidate_ids.tolist()
    rows_image = loop_targets(teacher_image, text_candidates, temperature, ids, others, alpha)
    rows_text = loop_targets(teacher_text, image_candidates, temperature, ids, others, alpha)
    expected = loop_cross_entropy(image, text_candidates, temperature, rows_image) / 2
    expected += loop_cross_entropy(text, image_candidates, temperature, rows_text) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(image_targets, torch.tensor(rows_image), rtol=1e-5, atol=1e-6)


def test_itc_teaches_features_and_temperature_not_the_teacher() -> None:
    """Gradient of the temperature and of the features by central differences in float64."""
    image, text = features(3, 4).requires_grad_(), features(3, 4)
    candidates, teacher = features(5, 4), torch.randn(3, 5, requires_grad=True)
    temperature = torch.tensor(0.5, requires_grad=True)
    targets = soft_targets(teacher, positive_mass(torch.arange(3), torch.arange(5)), 0.4)
    itc_loss(image, text, candidates, candidates, temperature, targets, targets).backward()
    assert teacher.grad is None

    def value(image: Tensor, temperature: float) -> float:
        rows, others = image.tolist(), candidates.tolist()
        total = loop_cross_entropy(rows, others, temperature, targets.tolist())
        return (total + loop_cross_entropy(text.tolist(), others, temperature, targets.tolist())) / 2

    step, base = 1e-5, image.detach().double()
    slope = (value(base, 0.5 + step) - value(base, 0.5 - step)) / (2 * step)
    assert float(temperature.grad) == pytest.approx(slope, rel=1e-3)
    nudge = torch.zeros_like(base)
    nudge[1, 2] = step
    slope = (value(base + nudge, 0.5) - value(base - nudge, 0.5)) / (2 * step)
    assert float(image.grad[1, 2]) == pytest.approx(slope, rel=1e-3)


def test_itc_stays_in_float32_under_autocast() -> None:
    image, text = features(4, 16), features(4, 16)
    targets = positive_mass(torch.arange(4), torch.arange(4))
    expected = itc_loss(image, text, image, text, 0.07, targets, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(itc_loss(image, text, image, text, 0.07, targets, targets), expected)
        halves = [t.bfloat16() for t in (image, text)]
        loss = itc_loss(*halves, *halves, 0.07, targets, targets)
    wide = [t.float() for t in halves]
    assert loss.dtype == torch.float32 and torch.equal(loss, itc_loss(*wide, *wide, 0.07, targets, targets))


def test_positive_mass_by_hand() -> None:
    mass = positive_mass(torch.tensor([7, 8, 9]), torch.tensor([7, 8, 7, -1]))
    assert mass.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    large = 2**62  # ids of 63 bits differ in their last bit; floats of them do not
    assert torch.equal(positive_mass(torch.tensor([large]), torch.tensor([large, large + 1])), torch.tensor([[1.0, 0]]))


def test_itc_and_targets_name_what_does_not_fit() -> None:
    good = {
        "image_features": features(2, 4),
        "text_features": features(2, 4),
        "image_candidates": features(3, 4),
        "text_candidates": features(5, 4),
        "temperature": 0.1,
        "image_targets": torch.full((2, 5), 0.2),
        "text_targets": torch.full((2, 3), 1 / 3),
    }
    itc_loss(**good)
    for name, bad in {
        "text_features": features(3, 4),
        "image_candidates": features(3, 5),
        "text_candidates": features(5, 3),
        "image_targets": good["text_targets"],
        "text_targets": good["image_targets"],
    }.items():
        with pytest.raises(ShapeError, match=name):
            itc_loss(**(good | {name: bad}))
    with pytest.raises(ShapeError, match="positive_mass"):
        soft_targets(torch.zeros(2, 3), torch.zeros(2, 4), 0.4)
    with pytest.raises(ShapeError, match="forbidden"):
        sample_hard_negatives(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="teacher_logits"):
        mlm_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4), 0.4)


@given(rows=st.integers(1, 8), columns=st.integers(2, 9), scale=st.sampled_from([1.0, 300.0]), seed=seeds)
def test_hard_negative_is_never_forbidden(rows, columns, scale, seed) -> None:
    """Also where the forbidden one is by far the most similar, as the pair itself is."""
    torch.manual_seed(seed)
    forbidden = torch.rand(rows, columns) < 0.7
    forbidden[torch.arange(rows), torch.randint(columns, (rows,))] = False  # something is left
    similarity = torch.randn(rows, columns) * scale + 1000 * forbidden
    for _ in range(20):
        drawn = sample_hard_negatives(similarity, forbidden)
        assert drawn.shape == (rows,) and drawn.dtype == torch.long
        assert not forbidden[torch.arange(rows), drawn].any()


def test_hard_negatives_follow_the_softmax() -> None:
    """Chi-square of 100,000 draws per row against the softmax over what is allowed."""
    draws = 100_000
    similarity = torch.tensor([[0.0, 1.0, 2.0, -1.0, 9.0], [3.0, 3.0, -2.0, 0.5, 0.0]])
    forbidden = torch.tensor([[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    many = sample_hard_negatives(
        similarity.repeat_interleave(draws, 0),
        forbidden.repeat_interleave(draws, 0),
        torch.Generator().manual_seed(1),
    )
    for row, drawn in enumerate(many.view(2, draws)):
        counts = torch.bincount(drawn, minlength=5)
        allowed = (~forbidden[row]).nonzero().flatten().tolist()
        expected = [draws * p for p in reference.softmax(similarity[row, allowed].tolist())]
        observed = counts[allowed].tolist()
        chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
        assert sum(observed) == draws and chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_hard_negatives_depend_on_the_generator_alone_and_carry_no_gradient() -> None:
    similarity = torch.randn(64, 64, requires_grad=True)
    forbidden = torch.eye(64, dtype=torch.bool)
    once = sample_hard_negatives(similarity, forbidden, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(once, sample_hard_negatives(similarity, forbidden, torch.Generator().manual_seed(3)))
    assert not torch.equal(once, sample_hard_negatives(similarity, forbidden, torch.Generator().manual_seed(4)))
    assert not once.requires_grad
    # Half precision is widened first: a flat bfloat16 row draws what the same float32 row draws.
    half = similarity.detach().bfloat16()
    pair = [sample_hard_negatives(t, forbidden, torch.Generator().manual_seed(3)) for t in (half, half.float())]
    assert torch.equal(*pair)


def test_nothing_is_read_back_from_the_device() -> None:
    """Fake tensors have no values: whatever reads one fails."""
    with FakeTensorMode():
        image, text = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        ids, logits, alpha = torch.zeros(3, dtype=torch.long), torch.randn(3, 9), torch.zeros(())
        targets = soft_targets(image @ text.T, positive_mass(ids, ids), alpha)
        itc_loss(image, text, image, text, torch.ones(()), targets, targets).backward()
        forbidden = forbidden_negatives(ids, ids, ids, ids)
        assert sample_hard_negatives(image @ text.T, forbidden).shape == (3,)
        assert itm_loss(logits[:, :2], ids).shape == mlm_loss(logits, ids, logits, alpha).shape == ()
        with pytest.raises(DataDependentOutputException):  # the check itself can fail
            float(alpha)


def test_one_graph_under_compile() -> None:
    """fullgraph refuses what would break the graph, a value read back among it."""

    def step(image: Tensor, text: Tensor, ids: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        targets = soft_targets(image @ text.T, positive_mass(ids, ids), 0.4)
        loss = itc_loss(image, text, image, text, 0.1, targets, targets)
        negatives = sample_hard_negatives(image @ text.T / 0.1, forbidden_negatives(ids, ids, ids, ids))
        return loss + 0 * negatives.sum() + mlm_loss(logits, labels, logits.flip(0), 0.4) + itm_loss(logits, labels)

    given = (features(4, 8), features(4, 8), torch.arange(4), torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), step(*given))


@pytest.mark.gpu
def test_no_synchronisation_on_cuda() -> None:
    ids = torch.arange(64, device="cuda")
    image = F.normalize(torch.randn(64, 32, device="cuda"), dim=1).requires_grad_()
    alpha = torch.full((), 0.4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = image @ image.T / 0.07
        targets = soft_targets(logits, positive_mass(ids, ids), alpha)
        loss = itc_loss(image, image, image, image, 0.07, targets, targets)
        negatives = sample_hard_negatives(logits, forbidden_negatives(ids, ids, ids, ids))
        loss = loss + mlm_loss(logits, negatives, logits, alpha) + itm_loss(logits[:, :2], ids % 2)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not (negatives == ids).any()


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_check_negatives_equals_a_loop_over_pairs(pairs) -> None:
    images, captions = [i + 2**62 for i, _ in pairs], [c for _, c in pairs]
    left = [
        [j for j in range(len(pairs)) if images[j] != images[i] and captions[j] != captions[i]]
        for i in range(len(pairs))
    ]
    tensors = torch.tensor(images), torch.tensor(captions)
    forbidden = forbidden_negatives(*tensors, *tensors)
    assert [(~row).nonzero().flatten().tolist() for row in forbidden] == left
    if all(left):
        check_negatives(*tensors)
        check_negatives(images, captions)
    else:
        stuck = ", ".join(str(i) for i, free in enumerate(left) if not free)
        with pytest.raises(DataError, match=f"batch 7: .*rows {stuck} of {len(pairs)}"):
            check_negatives(images, captions, item="batch 7")


def test_check_negatives_refuses_unequal_numbers_and_shortens_long_lists() -> None:
    with pytest.raises(ShapeError, match="caption_ids"):
        check_negatives([1, 2], [1])
    with pytest.raises(DataError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. of 20"):
        check_negatives([5] * 20, list(range(20)))


@given(rows=st.integers(1, 6), seed=seeds)
def test_itm_equals_a_loop(rows, seed) -> None:
    torch.manual_seed(seed)
    logits, labels = 3 * torch.randn(rows, 2), torch.randint(2, (rows,))
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    expected = -sum(math.log(reference.softmax(row)[label]) for row, label in pairs) / rows
    assert float(itm_loss(logits, labels)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    loss = itm_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, itm_loss(logits.bfloat16().float(), labels))


@given(places=st.integers(1, 6), alpha=st.floats(0, 1), seed=seeds)
def test_mlm_equals_a_loop_with_and_without_teacher(places, alpha, seed) -> None:
    torch.manual_seed(seed)
    logits, teacher, labels = 2 * torch.randn(places, 7), 2 * torch.randn(places, 7), torch.randint(7, (places,))
    hard = soft = 0.0
    for row, other, label in zip(logits.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        logs = [math.log(p) for p in reference.softmax(row)]
        hard -= logs[label] / places
        soft -= sum(t * log for t, log in zip(reference.softmax(other), logs, strict=True)) / places
    assert float(mlm_loss(logits, labels)) == pytest.approx(hard, rel=1e-5)
    assert float(mlm_loss(logits, labels, alpha=alpha)) == pytest.approx(hard, rel=1e-5)
    expected = pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-5)
    assert float(mlm_loss(logits, labels, teacher, alpha)) == expected
    assert float(mlm_loss(logits, labels, teacher, torch.tensor(alpha))) == expected


def test_mlm_gradient_is_softmax_minus_the_mixed_target_and_spares_the_teacher() -> None:
    logits, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    labels, alpha = torch.tensor([3, 0, 8, 3]), 0.4
    loss = mlm_loss(logits, labels, teacher, alpha)
    loss.backward()
    target = (1 - alpha) * F.one_hot(labels, 9) + alpha * torch.softmax(teacher.detach(), dim=1)
    torch.testing.assert_close(logits.grad, (torch.softmax(logits.detach(), dim=1) - target) / 4)
    assert teacher.grad is None
    half = mlm_loss(logits.bfloat16(), labels, teacher.bfloat16(), alpha)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=2e-2, atol=0)


def test_mlm_without_a_masked_place_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(0, 9, requires_grad=True)
    loss = mlm_loss(logits, torch.zeros(0, dtype=torch.long), logits, 0.4)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad.shape == (0, 9)


def test_the_losses_can_be_overfitted_together() -> None:
    """Free features and logits reach the floor of each loss."""
    image, text = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    match, words = torch.zeros(6, 2, requires_grad=True), torch.zeros(5, 7, requires_grad=True)
    ids, labels, guesses = torch.arange(4), torch.tensor([1, 1, 0, 0, 0, 0]), torch.randint(7, (5,))
    mass = positive_mass(ids, ids)
    optimizer = torch.optim.Adam([image, text, match, words], lr=0.1)
    for _ in range(150):
        unit_image, unit_text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        loss = itc_loss(unit_image, unit_text, unit_image, unit_text, 0.1, mass, mass)
        loss = loss + itm_loss(match, labels) + mlm_loss(words, guesses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02
