"""Controlled experiments on the methods themselves: `smidgen lab`."""
