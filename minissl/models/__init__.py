"""Encoders and their parts: vision transformers, convolutional networks, text encoder, heads, EMA teacher."""
