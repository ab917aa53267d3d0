"""The language model: batching, sampling, caching and the backend's interface."""
