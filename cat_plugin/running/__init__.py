"""Run the two models and collect their paired outputs, leaving no trace."""
