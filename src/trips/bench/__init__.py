"""Operation counts and timings."""
