"""Trained encoders and methods: load, save and export them."""
