"""Measure, report and seal a release bundle."""
