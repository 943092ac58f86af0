"""Speed, measured beside what a reader would use instead: `python -m bench [NAME ...]`.

A benchmark has our side and one or more peers on the same model, inputs and dtype.  After a warm-up of
each, all sides run in turn, five times; each run is printed as it ends.  `--quick` decides within eight
minutes on two cores whether the goals are met, on fewer rows and beside the fastest peer alone; `--growth`
runs our side on inputs of growing size.  Rates count useful units only: response tokens that were asked
for, never padding or tokens after the end.  `share` is the least time the machine could need (arithmetic at
the matrix rate, or weights at the memory bandwidth, both measured in the same run) over the time taken; for
`feedback` it is the share of the server's limit.

Simplified: the least time leaves out attention and activations, so `share` is a lower bound.

`measure` runs the sides in turn, `cases` holds the benchmarks, `report` the tables and the command.
"""
