"""What was fitted, in words, figures and warnings."""
