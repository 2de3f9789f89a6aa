"""The YOLO11 detection network that the scripts here train: the model zoo's own."""

from __future__ import annotations

from bitalloy.zoo.networks.yolo11 import REG_MAX, SCALES, STRIDES, DetectHead, Multipliers, Yolo11, fuse
from bitalloy.zoo.networks.yolo11_blocks import Conv

__all__ = ["REG_MAX", "SCALES", "STRIDES", "Conv", "DetectHead", "Multipliers", "Yolo11", "fuse"]
