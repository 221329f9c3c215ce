"""Tuned models in the forms that other programs take: GGUF, Ollama, an archive, the Hub."""
