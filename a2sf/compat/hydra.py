"""Hydra's grammar and private classes, and OmegaConf's YAML reader. Tried with hydra-core 1.3.8 and omegaconf 2.3.1."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig
from omegaconf._utils import get_yaml_loader as yaml_loader

__all__ = ["OverrideLexer", "OverrideParser", "yaml_loader"]

_PLUGINS = {
    "BasicSweeper": "hydra._internal.core_plugins.basic_sweeper",
    "FileConfigSource": "hydra._internal.core_plugins.file_config_source",
}


def __getattr__(name: str) -> Any:
    """A base class for a plugin. It is imported on use, because Hydra loads these modules again when it starts."""
    if name in _PLUGINS:
        return getattr(importlib.import_module(_PLUGINS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def options() -> list[str]:
    """The options of Hydra's command line."""
    return [o for action in get_args_parser()._actions for o in action.option_strings]


def syntax_tree(override: str) -> Any:
    """Hydra's syntax tree of an override, with each value as it was written.

    Raises:
        HydraException: if it cannot be parsed.
    """
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return parser.override()


def in_single_quotes(text: str) -> str:
    """A quoted string of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def apply_overrides(overrides: Sequence[Any], config: DictConfig) -> None:
    """Set the values of parsed overrides in a composed configuration."""
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)
