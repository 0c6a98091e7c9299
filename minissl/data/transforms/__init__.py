"""Transforms of batches of images: augmentations, multi-view crops, masks, color spaces."""
