"""Learning from Feedback: the small library behind the course's notebooks.

Modules are flat and named by the field's nouns.  Imports go one way:
runtime -> assets -> data -> models -> generation -> losses -> scoring -> metrics -> plots ->
preferences -> rubric -> feedback -> sft, reward_models, segments -> rewards -> ppo -> rloo -> what one
paper needs (refinement, imitation, conditioning, qa_feedback, fine_grained, grounded_qa, annotate) ->
bench, runner.
"""

import os
import warnings

# Threads that wait should sleep, not spin: on two cores shared with one busy process, sampling was
# measured 3.5 times faster so.  Read when torch loads its OpenMP; your own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Hub libraries ask for notebook widgets, which the course does without.
warnings.filterwarnings("ignore", message="IProgress not found")
