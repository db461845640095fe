"""Fusion of several images: against attention written out by hand, against the fusion of one image, as modules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, text_masks
from tiny import randomise, tiny_bert_config
from torch import Tensor, nn

from trips.fusion import FusionEncoder
from trips.multi_image import MergedFusionEncoder, MultiImageFusionEncoder, StackedFusionEncoder

CROSSED = {"is_decoder": True, "add_cross_attention": True}
FORMS = {"merge": MergedFusionEncoder, "stacked": StackedFusionEncoder}
BOTH = pytest.mark.parametrize("form", FORMS)


def encoder(
    form: str, num_images: int = 2, *, image_width: int = 32, seed: int = 0, **config
) -> MultiImageFusionEncoder:
    """Two layers, every path with weights of its own."""
    bert = tiny_bert_config(**CROSSED, **config)
    return randomise(FORMS[form](bert, image_width, num_images=num_images), seed)


def spread(form: str, single: FusionEncoder, num_images: int) -> MultiImageFusionEncoder:
    """Every path a copy of the single one."""
    several = FORMS[form](single.config, num_images=num_images).eval()
    several.load_state_dict(several.state_from_single(single.state_dict()))
    return several


def inputs(batch: int, num_images: int, length: int = 5, tokens: int = 7, width: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 32), torch.randn(batch, num_images, tokens, width)


# --- one text, one image, one head after the other; `state` is the encoder's dictionary of weights


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(
    state: dict[str, Tensor], names: dict[str, str], x: Tensor, memory: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(L, D) and the mean (L, E) of the heads' weights."""
    query, key, value = (linear(state, names[part], y) for part, y in (("q", x), ("k", memory), ("v", memory)))
    heads, weights = [], []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = query[:, part] @ key[:, part].T / math.sqrt(8)
        if real is not None:
            scores = scores.masked_fill(real == 0, -math.inf)
        weights.append(torch.softmax(scores, dim=-1))
        heads.append(weights[-1] @ value[:, part])
    mixed = linear(state, names["dense"], torch.cat(heads, dim=-1))
    return norm(state, names["norm"], mixed + x), torch.stack(weights).mean(dim=0)


def names_of(head: str, query: str, output: str, keys: str | None = None) -> dict[str, str]:
    keys = keys or f"{head}.self"
    return {"q": f"{head}.{query}", "k": f"{keys}.key", "v": f"{keys}.value", "dense": f"{head}.{output}.dense",
            "norm": f"{head}.{output}.LayerNorm"}  # fmt: skip


def by_hand(form: str, state: dict[str, Tensor], text: Tensor, real: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """(L, D) fused states of one text and (n, E) the mean attention of its real words to each image."""
    if "image_projection.0.weight" in state:
        images = norm(state, "image_projection.1", linear(state, "image_projection.0", images))
    x, seen, n = text, [[] for _ in images], len(images)

    def own(block: str, x: Tensor) -> Tensor:
        return attention(state, names_of(f"{block}.attention", "self.query", "output"), x, x, real)[0]

    def feed_forward(block: str, x: Tensor) -> Tensor:
        inner = nn.functional.gelu(linear(state, f"{block}.intermediate.dense", x))
        return norm(state, f"{block}.output.LayerNorm", linear(state, f"{block}.output.dense", inner) + x)

    for layer in range(2):
        if form == "merge":
            x, outputs = own(f"layer.{layer}", x), []
            for i in range(n):
                names = names_of(f"layer.{layer}.crossattention", f"self.query.{i}", f"output.{i}")
                output, weights = attention(state, names, x, images[i])
                outputs.append(output)
                seen[i].append(weights)
            x = feed_forward(f"layer.{layer}", sum(outputs) / n)
            continue
        for i in range(n):
            block = f"layer.{layer * n + i}"
            names = names_of(f"{block}.crossattention", "self.query", "output", f"keys_and_values.{layer}")
            x, weights = attention(state, names, own(block, x), images[i])
            seen[i].append(weights)
            x = feed_forward(block, x)
    return x, torch.stack([torch.stack(maps).mean(dim=0)[real == 1].mean(dim=0) for maps in seen])


@BOTH
@given(data=st.data(), batch=st.integers(1, 3), n=st.integers(1, 3), seed=seeds)
@torch.no_grad()
def test_states_and_teacher_equal_attention_by_hand(form, data, batch, n, seed) -> None:
    torch.manual_seed(seed)
    fusion, (text, images) = encoder(form, n), inputs(batch, n)
    mask = data.draw(text_masks(batch, 5))
    states, teacher = fusion(text, mask, images, output_image_attention=True)
    assert teacher.shape == (batch * n, 6)
    torch.testing.assert_close(teacher.sum(dim=1), torch.ones(batch * n))
    for row in range(batch):
        expected, maps = by_hand(form, fusion.state_dict(), text[row], mask[row], images[row])
        real = mask[row] == 1
        torch.testing.assert_close(states[row][real], expected[real], rtol=1e-4, atol=1e-4)
        patches = maps[:, 1:] / maps[:, 1:].sum(dim=1, keepdim=True)
        torch.testing.assert_close(teacher[row * n : row * n + n], patches, rtol=1e-4, atol=1e-5)


@BOTH
@torch.no_grad()
def test_unlike_image_width_is_projected(form) -> None:
    fusion, (text, images) = encoder(form, image_width=48), inputs(1, 2, width=48)
    fusion.image_projection[1].eps = 1e-12  # as `norm` above
    states, mask = fusion(text, torch.ones(1, 5), images)[0], torch.ones(5)
    expected, _ = by_hand(form, fusion.state_dict(), text[0], mask, images[0])
    torch.testing.assert_close(states[0], expected, rtol=1e-4, atol=1e-4)


# --- what must hold against the fusion of one image


@BOTH
@torch.no_grad()
def test_one_image_is_the_ordinary_fusion(form) -> None:
    single = randomise(FusionEncoder(tiny_bert_config(**CROSSED)))
    several, (text, images) = spread(form, single, 1), inputs(3, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    ours, theirs = several(text, mask, images, True), single(text, mask, images[:, 0], True)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@given(n=st.integers(2, 4), seed=seeds)
@torch.no_grad()
def test_merging_equal_images_is_the_fusion_of_one(n, seed) -> None:
    torch.manual_seed(seed)
    single = randomise(FusionEncoder(tiny_bert_config(**CROSSED)))
    several, (text, images) = spread("merge", single, n), inputs(2, 1)
    ours, theirs = (
        several(text, torch.ones(2, 5), images.expand(-1, n, -1, -1)),
        single(text, torch.ones(2, 5), images[:, 0]),
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_order_of_images_counts_only_where_paths_differ() -> None:
    single = randomise(FusionEncoder(tiny_bert_config(**CROSSED)))
    (text, images), mask, order = inputs(2, 3), torch.ones(2, 5), [2, 0, 1]
    fusion = spread("merge", single, 3)
    plain, moved = (fusion(text, mask, x, True) for x in (images, images[:, order]))
    torch.testing.assert_close(plain[0], moved[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[1].view(2, 3, -1)[:, order], moved[1].view(2, 3, -1))
    for other in (spread("stacked", single, 3), encoder("merge", 3), encoder("stacked", 3)):
        plain, moved = (other(text, mask, x)[0] for x in (images, images[:, order]))
        assert float((plain - moved).abs().max()) > 1e-2


@torch.no_grad()
def test_stacking_equal_paths_is_a_fusion_of_doubled_blocks() -> None:
    """Two paths on one image: an ordinary encoder whose every layer comes twice."""
    single = randomise(FusionEncoder(tiny_bert_config(**CROSSED)))
    doubled = FusionEncoder(tiny_bert_config(num_layers=4, **CROSSED)).eval()
    for place, layer in enumerate(doubled.layer):
        layer.load_state_dict(single.layer[place // 2].state_dict())
    (text, images), mask = inputs(2, 1), torch.ones(2, 5)
    ours = spread("stacked", single, 2)(text, mask, images.expand(-1, 2, -1, -1))[0]
    torch.testing.assert_close(ours, doubled(text, mask, images[:, 0])[0], rtol=1e-6, atol=1e-6)


# --- as modules


@pytest.mark.parametrize("n", [1, 2, 3])
@BOTH
def test_parameters_are_held_once(form, n) -> None:
    fusion = encoder(form, n)
    names = [name for name, _ in fusion.named_parameters(remove_duplicate=False)]
    places = {value.data_ptr() for value in fusion.state_dict().values()}
    assert len(names) == len(places) == len(fusion.state_dict()) == len(set(names))
    single = FusionEncoder(tiny_bert_config(**CROSSED)).layer
    size = {"all": 0, "shared": 0, "own": 0}
    for name, parameter in single.named_parameters():
        _, rest = name.split(".", 1)
        cross = rest.startswith("crossattention.")
        shared = rest.startswith(("crossattention.self.key", "crossattention.self.value"))
        size["shared" if shared or (form == "merge" and not cross) else "own"] += parameter.numel()
    assert sum(p.numel() for p in fusion.parameters()) == size["shared"] + n * size["own"]


@BOTH
def test_paths_learn_apart(form) -> None:
    single = randomise(FusionEncoder(tiny_bert_config(**CROSSED)))
    fusion, (text, images) = spread(form, single, 2).train(), inputs(2, 2)
    fusion(text, torch.ones(2, 5), images)[0].square().sum().backward()
    gradients = {name: p.grad for name, p in fusion.named_parameters()}
    names = {
        "merge": ("layer.1.crossattention.self.query.0.weight", "layer.1.crossattention.self.query.1.weight"),
        "stacked": ("layer.2.crossattention.self.query.weight", "layer.3.crossattention.self.query.weight"),
    }[form]
    assert not torch.allclose(gradients[names[0]], gradients[names[1]])
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())


@BOTH
def test_shared_values_learn_from_every_image(form) -> None:
    """The gradient by the values' bias, which acts on every image alike, as a difference of the function."""
    fusion, (text, images) = encoder(form).double(), inputs(1, 2)
    text, images, mask, worth = text.double(), images.double(), torch.ones(1, 5), torch.randn(1, 5, 32).double()
    bias = fusion.get_parameter(
        {"merge": "layer.1.crossattention.self.value.bias", "stacked": "keys_and_values.1.value.bias"}[form]
    )
    (fusion(text, mask, images)[0] * worth).sum().backward()
    with torch.no_grad():
        for place in (0, 13):
            found = []
            for step in (1e-5, -1e-5):
                bias[place] += step
                found.append((fusion(text, mask, images)[0] * worth).sum())
                bias[place] -= step
            assert float(bias.grad[place]) == pytest.approx(float(found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-7)


@BOTH
@torch.no_grad()
def test_every_attention_is_fused(form, monkeypatch) -> None:
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[0], query.shape[2], key.shape[2]))
        assert not kwargs.get("is_causal")
        return fused(query, key, value, attn_mask=attn_mask, **kwargs)

    fusion = encoder(form, 3)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    text, images = inputs(2, 3)
    fusion(text, torch.ones(2, 5), images)
    layer = [(2, 5, 5), (6, 5, 7)] if form == "merge" else [(2, 5, 5), (2, 5, 7)] * 3
    assert calls == layer * 2


@BOTH
@torch.no_grad()
def test_padding_is_never_read(form) -> None:
    fusion, (text, images) = encoder(form), inputs(2, 2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = torch.where(mask.bool().unsqueeze(-1), text, 100 * torch.randn_like(text))
    before, after = fusion(text, mask, images, True), fusion(other, mask, images, True)
    assert torch.equal(before[0][mask.bool()], after[0][mask.bool()]) and torch.equal(before[1], after[1])
