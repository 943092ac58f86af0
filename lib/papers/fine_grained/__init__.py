"""Fine-grained RLHF (Wu et al. 2023): the schema of its feedback, its reward models, a toy task, toxicity."""
