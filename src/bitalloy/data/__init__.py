"""Data sets of samples: folders of images, files of arrays, and arrays in memory.

A data set gives feeds (input name -> array) for one inference at a time, checked against the model's
inputs, and a fingerprint over the identifiers and contents of its samples.
"""
