"""The loops and their actors: RL, SFT, replay, sampling and evaluation."""
