"""LoRAs: names, files, adapters in memory, and rows of a batch with different ones."""
