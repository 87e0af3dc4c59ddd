"""One engine that learns roundings and scales unit by unit."""
