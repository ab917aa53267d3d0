"""Prompts: templates, enhancement, budgets, weights, negatives."""
