"""A rehearsal of the papers' settings on any machine: `python -m rehearsal [NN ...]` (`make rehearse`).

Every notebook runs at `full` with its own settings, but for counts, which `counts.json` lowers (articles,
samples, steps, tokens), against stand-ins on loopback: a Hub with tiny models of the classes and conventions
of the real ones and tables of their schemas, a chat endpoint, and a service like Perspective.  No model or
data set is renamed and no code is replaced, so what breaks here breaks on the GPU, too; what only size
breaks (memory, hours, numbers) is not seen.

hub        the Hugging Face Hub, as unmodified clients ask it
models     tiny repositories of the models that notebooks name
data       tables of the data sets that they name, and of the papers' released files
services   a chat endpoint, and a service like Perspective
plan       the notebooks to run, with their counts
run        runs them, and prints what happened
"""
