"""The implementations of the operations of `siglip_fast.ops`, one module each, and their selection."""
