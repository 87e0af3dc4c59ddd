"""A correction and its report as files that hold data only."""
