"""A release against an accepted one: limits, intervals, the baseline file."""
