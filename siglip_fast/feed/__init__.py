"""From image files to the model, and from embeddings to files: what the commands and Ray share."""
