"""Quark and ALT (alignment with textual feedback): labels, conditions, critics, and the loop that trains."""
