from bitalloy.zoo.yolo11 import FAMILY
