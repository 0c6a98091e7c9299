"""Names of data sets, without importing what loads them."""

DOWNLOADS = ("cifar10", "stl10", "stl10-unlabeled", "imagenette", "pets")
DATASET_NAMES = f"scenes, scenes:PART, digits, {', '.join(DOWNLOADS)}, folder:PATH, flickr8k:PATH or coco:PATH"
