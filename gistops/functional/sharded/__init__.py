"""Classifiers whose classes are divided between processes: centers are DTensors with placement Shard(0).

Each process scores the rows of all processes against its own classes. Its sums over classes are joined by all-reduce, so that
no process has logits [B, K] or the centers of another. The layout is that of Megatron-LM's parallel cross-entropy (Shoeybi et
al., 2019) and of Partial FC (An et al., ICCV Workshops 2021).
"""
