"""The `tune` command, one file per verb; imports no torch."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(__name__, {"run": "run_recipe"})
