"""The fitted correction as a module, as a hook, and baked into a plain model."""
