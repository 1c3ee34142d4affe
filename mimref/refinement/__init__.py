"""The refinement method: heads, queue, Nearest Neighbor Alignment, and the two training stages."""
