"""Rows on disk: runs that resume, their records and their environment."""
