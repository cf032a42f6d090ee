"""Typed configs: the schema in a recipe, YAML, overrides, components; imports no torch."""

from mytune.config.check import check_components
from mytune.config.components import check_may_run, instantiate
from mytune.config.load import LoadedConfig, config_error, config_yaml, load_config, read_config
from mytune.config.redact import redact
from mytune.config.types import Component, Components, component

__all__ = [
    "Component",
    "Components",
    "LoadedConfig",
    "check_components",
    "check_may_run",
    "component",
    "config_error",
    "config_yaml",
    "instantiate",
    "load_config",
    "read_config",
    "redact",
]
