"""Few- and any-shot classification."""
