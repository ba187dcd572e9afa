"""Reward terms, their composition into advantages, and what they tell about seeing and thinking."""
