"""Full-precision networks and their quantized copies."""
