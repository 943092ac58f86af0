"""Learning from Feedback: the small library behind the course's notebooks.

Modules are flat and named by the field's nouns.  Imports go one way:
runtime -> assets -> data -> models -> generation -> losses -> scoring -> metrics -> plots -> training.
"""
