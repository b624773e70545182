"""Sampling of tokens: one sampler for every next-token model, one for every masked model, the same filters for both."""
