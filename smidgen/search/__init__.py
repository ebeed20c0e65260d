"""Search: describe what you need, get the feature."""
