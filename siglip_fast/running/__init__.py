"""How a forward is run: CUDA graphs, torch.compile, images as bytes."""
