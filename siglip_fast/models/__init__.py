"""The towers: what becomes fast, one file a family, and what they share."""
