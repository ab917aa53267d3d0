"""What guides a picture beside its words: references, masks, adapters, frames."""
