"""The user's network: what it calls, in which units, and with what folded."""
