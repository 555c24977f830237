"""The suites of the evaluate stage: one file each, a score never without n, unit, interval and the hash of its set."""
