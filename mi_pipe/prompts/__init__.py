"""Prompts: corpora packed into windows, and tasks with clean and corrupted pairs."""
