"""Foreign weights of encoders that are no plain vision transformers, as their publishers and transformers save them.

A module per family or group of like ones. Each says whether tensors are of its family, which model of timm they are,
and where in the file each of timm's tensors comes from: the same answer reads a file and writes it back.
"""
