"""What a conversion bought: cache, memory and speed of donor and student."""
