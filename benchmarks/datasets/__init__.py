"""Labelled images, by the name of their data set."""
