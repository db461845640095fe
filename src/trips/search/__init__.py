"""Image search: a folder of photos indexed once, asked in words, the best hits matched with text guidance (5.1.3)."""
