"""How figures and settings are written in tables, titles and messages alike."""


def signed(points: float) -> str:
    """A gain with its sign; never "-0.00"."""
    return f"{round(points, 2) + 0.0:+.2f}"


def bits_name(w_bits: int, a_bits: int) -> str:
    """Such as `W2A4`."""
    return f"W{w_bits}A{a_bits}"
