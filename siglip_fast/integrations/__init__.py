"""One file a stack: what puts siglip_fast into it."""
