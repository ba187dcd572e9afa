"""What learns: losses, batching, the DeepSpeed engine and its actors, SFT, checkpoints."""
