"""Data only: profiles, job types, prompt templates and negative prompts, read with `importlib.resources`."""
