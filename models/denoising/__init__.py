"""The denoising thread: steps, their order, their costs, and what speeds them up."""
