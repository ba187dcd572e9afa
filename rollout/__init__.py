"""Sampling from a live policy: the `Rollout` record, the vLLM engine, weight transfer."""
