"""The command line: `siglip-fast embed | demo | tune | info`, a module each."""
