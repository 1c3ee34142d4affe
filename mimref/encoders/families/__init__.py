"""Foreign weights of encoders other than plain vision transformers, as saved by their publishers and by transformers.

There is one module per family or group of similar families. It determines the timm model of a file's tensors and where
in the file each of timm's tensors comes from: the same mapping reads a file and writes it back.
"""
