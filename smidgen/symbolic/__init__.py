"""Learned rules over symbols: questions are laid out on a grid, a network reads the answer off it."""
