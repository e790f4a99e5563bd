"""Measure what generating with a bounded cache costs, against transformers' own cache. Results in runs/bench/decode.json."""

from a2sf import app, bench_decode

if __name__ == "__main__":
    app.guard(bench_decode.main)
