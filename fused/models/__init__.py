"""Hugging Face causal language models: packed sequences, padding-free runs, and functions in place of the head."""
