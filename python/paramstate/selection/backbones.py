"""The base models (backbones) of a model: what carries the features, without heads and wrappers.

Hugging Face's own way, ``getattr(model, model.base_model_prefix, model)``, falls back to the whole model where the
attribute is called otherwise (T5, CLIP), and finds PEFT's wrapper where there is one. Here the structure decides: which
of Hugging Face's models are inside which, and whether they share a configuration.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from paramstate.errors import AmbiguousNameError
from paramstate.identity.wrappers import Tree


def base_model(model: nn.Module) -> nn.Module:
    """The one base model inside ``model``: the model of a Hugging Face family without its heads and wrappers.

    Args:
        model: a model of transformers, wrapped or not by ``DistributedDataParallel``, ``DataParallel``,
            ``torch.compile``, FSDP or PEFT, in any combination; or a module of your own that holds one. A model in
            which nothing is Hugging Face's is its own base.

    Returns:
        Module: the very module inside ``model``; without wrappers.

    Raises:
        AmbiguousNameError: there are several, as in models of text and images. The message lists them, and
            :func:`base_models` returns them all.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> base_model(torch.nn.DataParallel(model)) is model
        True
    """
    found = base_models(model)
    if len(found) > 1:
        listing = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in found.items())
        raise AmbiguousNameError(
            f"{_class_below_wrappers(model)} has several base models: {listing}; base_models(model) returns them all "
            "under these names"
        )
    return next(iter(found.values()))


def base_models(model: nn.Module) -> dict[str, nn.Module]:
    """Every base model inside ``model``, under its canonical name; the name is ``""`` where it is the model itself.

    * A model with a head has the base of its family: ``model.model`` of ``LlamaForCausalLM``.
    * Where encoder and decoder hang beside the head with no model around them (``T5ForConditionalGeneration``), they
      are two. ``T5Model``, and ``BartModel`` inside ``BartForConditionalGeneration``, are one.
    * A model made of models of other families has the bases of each: text and vision of CLIP, language model and
      vision tower of Llava.

    Args:
        model: as for :func:`base_model`.

    Returns:
        dict: canonical name to module, in the model's order.

    Example:
        >>> import torch
        >>> list(base_models(torch.nn.Linear(2, 1)))
        ['']
    """
    return _Structure(model).bases()


def _class_below_wrappers(model: nn.Module) -> str:
    return type(_Structure(model).root).__name__


def _pretrained() -> type | None:
    """The base class of transformers' models, where that package is imported."""
    found = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return found if isinstance(found, type) else None


class _Structure:
    """Which of Hugging Face's models are inside which."""

    def __init__(self, model: nn.Module) -> None:
        self._below: dict[int, list[tuple[str, nn.Module]]] = {}
        for link in Tree(model).links:
            self._below.setdefault(id(link.parent), []).append((link.prefix, link.child))
        self._kind = _pretrained()
        self.root = self._unwrapped(model)

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """What is inside the wrappers around the whole model: a wrapper adds nothing to the names below it."""
        for prefix, child in self._below.get(id(model), ()):
            if not prefix:
                return self._unwrapped(child)
        return model

    def bases(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        if self._is_pretrained(self.root):
            self._collect("", self.root, found)
        else:
            for prefix, module in self._inside(self.root):
                self._collect(prefix, module, found)
        return {prefix.removesuffix("."): module for prefix, module in found.items()} or {"": self.root}

    def _is_pretrained(self, module: nn.Module) -> bool:
        return self._kind is not None and isinstance(module, self._kind)

    def _inside(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The outermost of Hugging Face's models below ``module``."""
        for prefix, child in self._below.get(id(module), ()):
            if self._is_pretrained(child):
                yield prefix, child
            else:
                yield from self._inside(child)

    def _towers(self, module: Any) -> Iterator[tuple[str, nn.Module]]:
        """The parts of a model of several configurations that are no models: so transformers 4 builds CLIP."""
        if getattr(module.config, "sub_configs", None):
            yield from self._configured_unlike(_config(module), module)

    def _configured_unlike(self, config: type, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for prefix, child in self._below.get(id(module), ()):
            own = getattr(child, "config", None)
            if hasattr(own, "model_type") and type(own) is not config:
                yield prefix, child
            else:
                yield from self._configured_unlike(config, child)

    def _collect(self, prefix: str, module: nn.Module, found: dict[str, nn.Module], *, declared: bool = False) -> None:
        """Add the bases of one of Hugging Face's models; ``declared`` if the model around it calls it its base."""
        parts = dict(self._inside(module)) or dict(self._towers(module))
        own = f"{prefix}{getattr(module, 'base_model_prefix', '')}."
        if own in parts and _config(parts[own]) is _config(module):
            self._collect(own, parts[own], found, declared=True)
        elif not parts or self._is_whole(module, parts, declared=declared):
            if all(module is not other for other in found.values()):
                found[prefix] = module
        else:
            for below, part in parts.items():
                self._collect(below, part, found)

    def _is_whole(self, module: nn.Module, parts: dict[str, nn.Module], *, declared: bool) -> bool:
        """Whether the model is one base, though it is made of models."""
        of_other_families = all(_config(part) is not _config(module) for part in parts.values())
        several = len(parts) > 1
        return (declared or _is_headless(module)) and not (of_other_families and several)


def _config(module: Any) -> type:
    """The class of configuration, which every model of a family shares, with or without a head."""
    return type(module.config)


def _is_headless(module: Any) -> bool:
    """Whether transformers' ``AutoModel`` makes such a model of its configuration."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")  # transformers is imported already
    family = module.config.model_type
    names: set[str] = set()
    for mapping in (auto.MODEL_MAPPING_NAMES, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        known = mapping.get(family, ())
        names.update([known] if isinstance(known, str) else known)
    return any(kind.__name__ in names for kind in type(module).__mro__)
