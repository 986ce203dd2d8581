"""Side-by-side benchmarks against the peers, one file per axis: `python -m bench.depth`."""
