"""smidgen: few bits, few labels, little data.

Importing this package is cheap: torch is loaded only by the command that needs it.
"""

__version__ = "0.1.0"
