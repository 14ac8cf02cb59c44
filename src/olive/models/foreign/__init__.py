"""Models that other tools stored, presented in our own layout without a copy on disk.

A format is one file. It reads headers and config alone, and gives for each tensor of our layout the dtype,
the shape, and how to make it from the stored ones; ``view.ForeignTensors`` makes each when it is asked for.
Formats on a uniform grid become integers (``quant_method: olive``), byte by byte; the others become the
floating-point weights they stand for.
"""
