"""Values as people write them: durations, units, globs, names, and words for errors."""
