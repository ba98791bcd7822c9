"""raymi: attention-knockout and sparse-autoencoder experiments in batches."""
