"""The selection inside a model of transformers, by hooks at the boundaries of its modules.

No forward pass is copied, no class is replaced and nothing between the attention and the FFN of a layer can be reached
that way: the cut stands at the entry of layer j, one attention earlier than in the paper. It scores what enters the
layer after the layer's first norm, with the layer's own projections.

A call runs: text -> guide (`start`, a hook on the model, or a wrapped method) -> `begin` (hook on the tower) ->
`enter` at every layer -> `end` -> `finish`. The guide reaches a layer as an argument that its hook takes off again:
gradient checkpointing, which repeats a layer in the backward pass, then repeats it with the same guide.

Dimensions: B images, one text each, n candidate tokens, k kept, D width, P width of the shared space.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trips.acceleration.hosts import Host, TowerParts
from trips.acceleration.settings import AccelerationConfig, count_kept
from trips.acceleration.texts import shared_scale
from trips.config import num_kept
from trips.errors import ConfigError, ShapeError
from trips.selection import Selection, relevance_logits, select_patches

GUIDE = "trips_guide"  # argument on its way from the encoder to its layers
CONFIG_KEY = "trips_selection"
ATTRIBUTE = "_trips_acceleration"


class _Absent:
    """Stands for an attribute that was not there; a class, since a deep copy leaves it the same object."""


class _Call:
    """The running call of one thread, and the record of its last one."""

    def __init__(self) -> None:
        self.guide: Tensor | None = None
        self.held = False  # the guide was given by `held`, not read from the call
        self.running: list[Selection] | None = None
        self.positions: Tensor | None = None
        self.records: tuple[Selection, ...] | None = None


class _Calls(threading.local):
    """A `_Call` for every thread; a copy of the model has none. torch.compile reads here, but could not write."""

    def __init__(self) -> None:
        self.own = _Call()

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()


class Accelerator:
    """Hooks of one model, the guide of the running call, and the record of the last one.

    Hooks are bound methods, so that a deep copy of the model is hooked to the copy of this object.

    Args:
        model: a model that `HOSTS` knows; left as it is until `attach`.
        host: its row.
        settings: what to do.
    """

    def __init__(self, model: PreTrainedModel, host: Host, settings: AccelerationConfig) -> None:
        self.model, self.host, self.settings = model, host, settings
        self.parts = TowerParts(model, host)
        self.rates = settings.rates  # worked out here: torch.compile cannot follow the checks of a dataclass
        self._calls = _Calls()
        self._undo: list[Any] = []
        self._before: dict[str, Any] = {}  # what stood where attributes were set
        self._forward_names = tuple(signature(type(model).forward).parameters)[1:]
        self._tower_names = tuple(signature(type(self.parts.tower).forward).parameters)[1:]

    @property
    def call(self) -> _Call:
        """The running call of this thread."""
        return self._calls.own

    @property
    def records(self) -> tuple[Selection, ...] | None:
        """What the last call of this thread kept, None without one."""
        return self.call.records

    @records.setter
    def records(self, records: tuple[Selection, ...] | None) -> None:
        self.call.records = records

    def attach(self) -> None:
        """Register the hooks, wrap the methods that see the text, write the setting into the configuration."""
        parts = self.parts
        if parts.tower is not self.model:
            # A guide belongs to one call: forgotten when the call ends, by whatever way it ends.
            self._undo += [
                self.model.register_forward_pre_hook(self.start, with_kwargs=True),
                self.model.register_forward_hook(self.finish, always_call=True),
            ]
        if self.settings.guide == "text":
            self._undo.append(parts.tower.encoder.register_forward_pre_hook(self.carry, with_kwargs=True))
            for name, _ in self.host.methods:
                self._before[name] = self.model.__dict__.get(name, _Absent)
                setattr(self.model, name, partial(self.call_with_text, name))
        self._undo += [
            parts.tower.register_forward_pre_hook(self.begin, with_kwargs=True),
            parts.tower.register_forward_hook(self.end),
        ]
        for index, layer in enumerate(parts.layers):
            self._undo.append(layer.register_forward_pre_hook(partial(self.enter, index), with_kwargs=True))
        self._before[CONFIG_KEY] = self.model.config.__dict__.get(CONFIG_KEY, _Absent)
        setattr(self.model.config, CONFIG_KEY, self.settings.to_dict())
        self.model.__dict__[ATTRIBUTE] = parts.tower.__dict__[ATTRIBUTE] = self

    def detach(self) -> None:
        """Take everything off again; the model is what it was, to the last attribute."""
        for handle in self._undo:
            handle.remove()
        for name, value in self._before.items():
            owner = self.model.config if name == CONFIG_KEY else self.model
            if value is _Absent:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, value)
        for module in {self.model, self.parts.tower}:
            del module.__dict__[ATTRIBUTE]

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the model: no record yet; the guide from the arguments of its forward."""
        self.records = None
        if self.settings.guide == "text" and not self.call.held:
            self.call.guide = self.text_guide({**dict(zip(self._forward_names, args)), **kwargs})

    def finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook behind the model: the guide goes with its call; `ConfigError` if the call has not met the tower."""
        if not self.call.held:
            self.call.guide = None
        if output is not None and self.records is None:  # a call that failed has no output
            raise ConfigError(
                "the call has not passed through the vision tower that was accelerated",
                item=type(self.model).__name__,
                hint="after replacing the tower: trips.restore(model), then trips.accelerate(model) again",
            )

    def text_guide(self, given: dict[str, Any]) -> Tensor | None:
        """(B, D) or (B, P) guide from the arguments of a call; None if no text is among them."""
        return self.host.text_guide(self.model, given, self.settings.score)

    @contextmanager
    def held(self, guide: Tensor | None) -> Iterator[None]:
        """Hold one guide for all calls inside."""
        before = self.call.guide, self.call.held
        self.call.guide, self.call.held = guide, True
        try:
            yield
        finally:
            self.call.guide, self.call.held = before

    def call_with_text(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """A method of the model that calls the tower past its forward, with the guide from its arguments."""
        before = self._before[name]
        method = getattr(type(self.model), name).__get__(self.model) if before is _Absent else before
        self.records = None
        if self.call.held:
            return method(*args, **kwargs)
        names = tuple(signature(method).parameters)
        given = dict(self.host.methods)[name](self.model, {**dict(zip(names, args)), **kwargs})
        with torch.no_grad():
            guide = self.text_guide(given)
        with self.held(guide):
            return method(*args, **kwargs)

    def begin(self, tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook on the tower: a new record."""
        self.records, self.call.running, self.call.positions = None, [], None
        if {**dict(zip(self._tower_names, args)), **kwargs}.get("attention_mask") is not None:
            raise ConfigError("a mask over patches would not fit what is left of them", item="attention_mask")

    def end(self, tower: nn.Module, args: tuple, output: Any) -> None:
        """Hook behind the tower: the record is complete; `ConfigError` if a location was passed by without a cut."""
        records, self.call.running, self.call.positions = tuple(self.call.running or ()), None, None
        if len(records) != len(self.rates):
            raise ConfigError(
                "a location has not selected, its hook was not called",
                item=type(self.model).__name__,
                found=[record.layer for record in records],
                expected=self.settings.layers,
                hint="accelerate before torch.compile, not after",
            )
        self.records = records

    def carry(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook on the encoder: hand the guide to its layers."""
        return args, {**kwargs, GUIDE: self.call.guide}

    def enter(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Hook on layer `index` (0-based): take the guide off and, at a location, cut what enters the layer."""
        states = args[0] if args else kwargs["hidden_states"]
        guide = kwargs.get(GUIDE)
        if (rate := self.rates.get(index + 1)) is not None:
            states = self._cut(index, states, guide, rate)
        kwargs = {name: value for name, value in kwargs.items() if name not in (GUIDE, "hidden_states")}
        rest = args[1:]
        if index + 1 >= self.settings.layers[0]:
            # Some releases make a mask out of none, of the length that the tower began with.
            rest = tuple(None for _ in rest)
            kwargs |= {"attention_mask": None} if "attention_mask" in kwargs else {}
        return (states, *rest), kwargs

    def _cut(self, index: int, states: Tensor, guide: Tensor | None, rate: float) -> Tensor:
        """(B, c + n, D) -> (B, c + k + 1, D), c = 1 with an image [CLS], else 0."""
        num_cls = self.parts.row.num_cls
        n = states.shape[1] - num_cls
        k = count_kept(n, rate, index + 1) if rate < 1 else num_kept(n, rate)
        positions = self.call.positions
        if positions is None:
            positions = torch.arange(n, device=states.device).expand(states.shape[0], -1)
        logits = self._logits(index, states, guide)
        # A tower without [CLS] lends its first token to stand where select_patches wants one.
        padded = states if num_cls else torch.cat([states[:, :1], states], dim=1)
        tokens, positions, record = select_patches(
            padded, logits, k, positions, layer=index + 1, inattentive=self.settings.inattentive
        )
        if self.call.running is not None:  # not so when gradient checkpointing repeats the layer
            record.logits = record.logits.detach()  # else the record would keep the graph of the call alive
            self.call.running.append(record)
            self.call.positions = positions
        return states if k == n else tokens[:, 1 - num_cls :]

    def _logits(self, index: int, states: Tensor, guide: Tensor | None) -> Tensor:
        """(B, n) logits of the guide over the candidates at one location; one query row, no attention map.

        Raises:
            ConfigError: the text guides, there is none, and no other guide stands in. ShapeError: other than one text
                per image.
        """
        parts, num_cls = self.parts, self.parts.row.num_cls
        who, score = self.settings.guide, self.settings.score
        if who == "text" and guide is None:
            who = self.settings.fallback
            if who == "none":
                raise ConfigError(
                    "the text guides, but this call brings no text",
                    item=type(self.model).__name__,
                    hint="wrap it in trips.acceleration.guided_by(model, input_ids=...), or accelerate with "
                    f'fallback="{self.host.free_guides[0]}"',
                )
            score = self.host.scores(who)[0]
        if who == "random":
            return torch.randn(states.shape[0], states.shape[1] - num_cls, device=states.device)
        if guide is not None and guide.shape[0] != states.shape[0]:
            raise ShapeError(
                "one text per image is needed, since each image is selected for its text",
                item="input_ids",
                found=f"{guide.shape[0]} texts, {states.shape[0]} images",
                hint="repeat images and texts to pairs; for all images against all texts let the image guide",
            )
        if score == "shared":
            patches = functional.normalize(self.host.shared(self.model, states[:, num_cls:]), dim=-1)
            cosines = torch.bmm(patches, guide.unsqueeze(-1).to(patches)).squeeze(-1)
            return cosines.float() * shared_scale(self.model)
        normed = parts.normed(index, states)
        patches = normed[:, num_cls:]
        if score == "keys":
            patches = parts.keys(index, patches)
        if who == "keys_mean":
            query = patches.mean(dim=1)
        else:
            query = parts.query(index, parts.normed(index, guide.to(states)) if who == "text" else normed[:, 0])
        return relevance_logits(query, patches, parts.tower.config.num_attention_heads if score == "keys" else 1)
