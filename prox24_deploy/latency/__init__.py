"""Time dense and sparse in turns, with intervals, and watch the clocks."""
