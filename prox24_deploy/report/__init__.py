"""From the results of the stages to the report, its verdict and its views."""
