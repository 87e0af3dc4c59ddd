"""Corrections inside the network: of every layer's output, channel by channel, fitted through the whole of it."""
