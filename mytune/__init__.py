"""Fine-tune language models with native PyTorch: recipes to read, copy and change."""

__version__ = "0.1.0"
