"""Where samples come from: folders of images, files of arrays, arrays in memory.

A data set gives feeds (input name -> array) for one inference at a time, checked against the model's
inputs, and a fingerprint over the identifiers and contents of its samples.
"""

from bitalloy.data.arrays import check_feeds
from bitalloy.data.datasets import (
    ArrayDataset,
    Dataset,
    FeedFolder,
    ImageFolder,
    Samples,
    Subset,
    choose,
    open_dataset,
)
from bitalloy.data.images import Geometry, ImageSpec, image_feed, infer_image_spec, letterbox, open_image

__all__ = [
    "ArrayDataset",
    "Dataset",
    "FeedFolder",
    "Geometry",
    "ImageFolder",
    "ImageSpec",
    "Samples",
    "Subset",
    "check_feeds",
    "choose",
    "image_feed",
    "infer_image_spec",
    "letterbox",
    "open_dataset",
    "open_image",
]
