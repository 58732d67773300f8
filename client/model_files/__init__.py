"""Readers of model files: Hugging Face configurations, safetensors and GGUF headers, and plain numbers."""

from .read import read_model

__all__ = ["read_model"]
