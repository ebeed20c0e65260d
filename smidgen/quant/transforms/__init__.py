"""Rewritings of a model that leave its float output as it was."""
