"""The command ``anomalib-ot monitor``: the drift of a folder of images, and a page to look at."""
