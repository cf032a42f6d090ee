"""Fine-tune language models with native PyTorch: recipes to read, copy and change."""

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of mytune, of these packages and of Python, by name."""
    import platform
    from importlib.metadata import version

    own = {"mytune": __version__, "python": platform.python_version()}
    return own | {package: version(package) for package in packages}
