"""What follows from measured requests: statistics, results of a run, the comparison of two runs, and a sweep."""
