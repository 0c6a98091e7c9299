"""Reports on folders of images and on finished runs."""
