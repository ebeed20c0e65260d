"""Refining an image set: what is it worth, what is wrong with it, what would help it.

evidence.py     what methods look at and answer: method(Evidence) -> Scores
valuation/      VALUATIONS: what an image is worth
detectors/      wrong labels (Ensemble joins its members), duplicates, outsiders, bad pictures
"""
