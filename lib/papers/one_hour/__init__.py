"""One hour of an annotator's time, spent on every kind of feedback (notebook 90): what no paper has.

It compares the papers' methods on one ground, so it alone takes its parts from several of them.
"""
