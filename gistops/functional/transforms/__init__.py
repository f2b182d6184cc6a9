"""The transforms that are neither a translation nor sub-centers: rotations and MLPs."""
